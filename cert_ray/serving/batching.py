"""Continuous batching: requests join and leave one model's batch between two tokens.

In: `Work` from many threads. Out: `Drawn`. Every step is one forward pass over the next tokens of all branches of all
requests, and over some tokens of new prompts. `Turns` steps the batches of several models on one thread, since two
models that decode at once on the same cores only slow each other down.

The answer to a request depends on its `Work` alone (`joint.py`); when it comes depends on who else is there.
"""

from __future__ import annotations

import atexit
import logging
import queue
import threading
import time
import traceback
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from cert_ray.serving.engines import Drawn, EngineConfig, FinishReason, Hooks, TokenLogprobs, not_finite, step_sizes
from cert_ray.serving.joint import JointSamples, Top, distinct_in_order, likeliest, tell_logprobs
from cert_ray.serving.kept_prompts import KeptPrompts, Pin
from cert_ray.serving.packed_attention import Feed
from cert_ray.serving.sampling import draw_tokens, log_totals

_log = logging.getLogger(__name__)

# With up to this many rows, a step takes hardly longer than with one: reading the weights decides. Measured
# (SmolLM2-135M, one core of a Xeon with AMX, bf16, a step): 48 ms for 1 row, 54 for 8, 68 for 32, 109 for 90.
_IDLE_ROWS = 16
_KEPT_ROWS = 64  # rows of logits whose memory is kept while no request runs; assumed
# How often a waiting thread checks that the answer is still wanted. Assumed: rarely, since the stepping thread checks
# before every token, unless its step hangs.
_LOOK_S = 5.0
# How long an exiting process waits for the running step; one that hangs must not keep it alive. Assumed.
_LAST_STEP_S = 30.0


class ForwardPass(Protocol):
    """A model, as seen by a batch."""

    tokenizer: Any
    takes_drafts: bool  # whether a branch may be fed several tokens at once, some of which are taken back

    def begin(self) -> Any:
        """The empty cache of a new request."""
        ...

    def forward(self, feeds: Sequence[Feed]) -> list[torch.Tensor]:
        """Logits of each feed, [rows, vocabulary]."""
        ...

    def beginning(self, kept: Any, tokens: int) -> Any | None:
        """A copy of what is kept of a prompt's first tokens; None if that is not possible."""
        ...

    def give_back(self) -> None:
        """Free unused memory, between two steps."""
        ...


@dataclass(slots=True)
class _Told:
    """A message from the stepping thread to the waiting one: text or, at the end, the result."""

    news: list[tuple[int, str, FinishReason | None]] = field(default_factory=list)
    drawn: Drawn | None = None
    error: BaseException | None = None


class Request:
    """One piece of work in a batch."""

    def __init__(self, samples: JointSamples, hooks: Hooks) -> None:
        self.samples, self.hooks = samples, hooks
        self.kept: Any = None
        self.read = 0  # tokens of the prompt read so far
        self.cached_tokens = 0
        self.pin: Pin | None = None
        self.prompt_logprobs: list[tuple[float, Top]] = []
        self.mailbox: queue.SimpleQueue[_Told] = queue.SimpleQueue()
        self.given_up = False  # whether nobody waits any more

    @property
    def prompt(self) -> tuple[int, ...]:
        """The prompt's tokens."""
        return self.samples.work.prompt

    @property
    def is_read(self) -> bool:
        """Whether the whole prompt is read, so that each branch has a token to be fed."""
        return self.read == len(self.prompt)

    def wait(self) -> Drawn:
        """Wait for what is drawn, passing text on as it comes.

        Raises:
            BaseException: what ended the work.
        """
        try:
            return self._wait()
        finally:
            self.given_up = True

    def _wait(self) -> Drawn:
        while True:
            try:
                told = self.mailbox.get(timeout=_LOOK_S)
            except queue.Empty:
                self.hooks.check()
                continue
            for index, text, reason in told.news:
                self.hooks.on_text(index, text, reason)
            drawn, error = told.drawn, told.error
            del told
            if error is not None:
                try:
                    raise error
                finally:  # otherwise the error's traceback would hold this frame, and so itself and the whole request
                    del error
            if drawn is not None:
                return drawn


class Turns:
    """One daemon thread that steps the batches that have work, in turn. It starts with the first work.

    It keeps no batch alive, and so no model: batches that nobody else holds are forgotten, and the thread ends with the
    last one. At exit, the process waits for the running step: Python would stop the thread inside torch's code, which
    aborts the process.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._batches: weakref.WeakSet[Batch] = weakref.WeakSet()
        self._thread: threading.Thread | None = None
        self._leaving = False
        self._step_began_s: float | None = None  # start of the running step, by `time.monotonic`

    @property
    def step_s(self) -> float:
        """How long the running step has taken so far; 0 between two steps."""
        began_s = self._step_began_s
        return 0.0 if began_s is None else time.monotonic() - began_s

    def join(self, batch: Batch) -> None:
        """Step `batch` from now on."""
        with self._changed:
            self._batches.add(batch)
        weakref.finalize(batch, self._forgotten).atexit = False

    def _forgotten(self) -> None:
        with self._changed:  # reentrant: garbage collection may call this while the lock is held
            self._changed.notify()

    def wake(self) -> None:
        """Announce that a batch has new work."""
        with self._changed:
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="cert-ray-decoding", daemon=True)
                self._thread.start()
                atexit.register(self._leave)
            self._changed.notify()

    def _leave(self) -> None:
        with self._changed:
            self._leaving, thread = True, self._thread
            self._changed.notify()
        if thread is not None:
            thread.join(_LAST_STEP_S)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._leaving or not self._batches or self._with_work())
                if self._leaving:
                    return
                if not self._batches:
                    self._thread = None
                    atexit.unregister(self._leave)
                    return
                batches = self._with_work()
            while batches and not self._leaving:
                self._step_began_s = time.monotonic()
                batches.pop().step()  # leaves no reference to the batch while this thread waits
                self._step_began_s = None

    def _with_work(self) -> list[Batch]:
        return [batch for batch in self._batches if batch.has_work]


@dataclass(slots=True)
class Counted:
    """How much a model was used since it was loaded."""

    forward_passes: int = 0
    forward_rows: int = 0  # tokens that went through it, drafted ones included
    drafted_tokens: int = 0
    accepted_tokens: int = 0  # drafted tokens that some sample drew


class Batch:
    """The requests of one model."""

    def __init__(self, model: ForwardPass, config: EngineConfig, turns: Turns, device_type: str) -> None:
        self._model, self._turns = model, turns
        self._max_rows, self._prefill_tokens = step_sizes(config, device_type)
        self._arrived: queue.SimpleQueue[Request] = queue.SimpleQueue()
        self._waiting: list[Request] = []
        self._running: list[Request] = []
        self._prompts = KeptPrompts(model, config.prefix_cache_tokens)
        self._scratch = _Scratch()
        self.counted = Counted()
        turns.join(self)

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._running or self._waiting) or not self._arrived.empty()

    def submit(self, request: Request) -> None:
        """Let `request` join."""
        self._arrived.put(request)
        self._turns.wake()

    @torch.inference_mode()
    def step(self) -> None:
        """One forward pass, and what follows from it. Never raises: an error ends the requests it concerns."""
        self._step()  # a call of its own, so that its locals are released before memory is given back
        try:
            self._model.give_back()
        except Exception:  # noqa: BLE001 - the thread must live on
            _log.exception("memory that is no longer used could not be released")
        if not self._running:
            self._scratch.give_back()

    def _step(self) -> None:
        while not self._arrived.empty():
            self._waiting.append(self._arrived.get())
        self._waiting = [request for request in self._waiting if self._still_wanted(request)]
        self._running = [request for request in self._running if self._still_wanted(request)]
        fed, feeds = self._running, list[Feed]()
        try:
            self._admit()
            fed, feeds = self._feeds()
            if fed:
                self._take(fed, feeds, self._model.forward(feeds))
        except Exception as error:  # noqa: BLE001 - the thread must live on: this step's requests carry the error
            _log.exception("a step over %d requests failed", len(fed))
            feeds.clear()  # it belongs to this frame, which cannot be cleared while it runs
            _clear_frames(error)
            for request in list(fed):
                self._end(request, _Told(error=error))

    def _admit(self) -> None:
        rows = self._rows()
        while rows < self._max_rows and self._waiting:
            request = self._waiting.pop(0)
            self._running.append(request)
            request.kept, request.read = self._prompts.find(request.prompt, request.samples.work)
            request.cached_tokens = request.read
            rows += 1

    def _rows(self) -> int:
        return sum(max(1, len(request.samples.branches)) for request in self._running)

    def _still_wanted(self, request: Request) -> bool:
        if request.given_up:
            self._let_go(request)
            return False
        try:
            request.hooks.check()
        except Exception as error:  # noqa: BLE001 - whoever waits gets it
            self._let_go(request)
            request.mailbox.put(_Told(error=error))
            return False
        return True

    def _feeds(self) -> tuple[list[Request], list[Feed]]:
        """The next forward pass: all branches and, while there is room, prompts in order of arrival."""
        fed, feeds, room = [], [], self._prefill_tokens
        rows = self._rows()
        spare = self._max_rows - rows if self._model.takes_drafts else 0  # for drafts
        idle = max(0, _IDLE_ROWS - rows)
        for request in self._running:
            samples, left = request.samples, len(request.prompt) - request.read
            if request.is_read:
                drafted = samples.guess(spare, idle)
                spare, idle = spare - drafted, max(0, idle - drafted)
                runs = [[branch.ids[-1], *branch.draft] for branch in samples.branches]
                parents = [branch.row for branch in samples.branches]
                tokens = [token for run in runs for token in run]
                feeds.append(Feed(request.kept, tokens, parents, runs=list(map(len, runs))))
            elif room > 0:
                part = list(request.prompt[request.read : request.read + room])
                room -= len(part)
                draft: list[int] = []
                if len(part) == left and samples.branches and not samples.work.score_prompt:
                    drafted = samples.guess(spare, idle)
                    spare, idle = spare - drafted, max(0, idle - drafted)
                    draft = samples.branches[0].draft
                feeds.append(Feed(request.kept, part + draft, None, samples.work.score_prompt, drafted=len(draft)))
            else:
                continue
            fed.append(request)
        self.counted.forward_rows += sum(len(feed.tokens) for feed in feeds)
        self.counted.forward_passes += bool(feeds)
        return fed, feeds

    def _take(self, fed: list[Request], feeds: list[Feed], logits: list[torch.Tensor]) -> None:
        drawing: list[tuple[Request, torch.Tensor]] = []
        begun: list[Request] = []
        for request, feed, logits_QV in zip(fed, feeds, logits, strict=True):
            if feed.parents is not None:
                drawing.append((request, logits_QV))
            elif self._read_prompt(request, feed, logits_QV):
                begun.append(request)
                drawing.append((request, logits_QV[-1 - feed.drafted :]))
        if not drawing:
            return
        logits_RV, scratch_RV = self._scratch.fill([logits_QV for _, logits_QV in drawing])
        firsts = np.cumsum([0, *(len(logits_QV) for _, logits_QV in drawing)]).tolist()
        for request, _ in drawing:
            request.samples.start_drawing()
        while any(request.samples.drawing for request, _ in drawing):
            places = [
                first + one.row
                for (request, _), first in zip(drawing, firsts, strict=False)
                for one in request.samples.drawing
            ]
            _draw([request.samples for request, _ in drawing], _pick(logits_RV, places), scratch_RV[: len(places)])
        for request in begun:
            self._keep_prompt(request)
        for request, _ in drawing:
            self._advance(request)

    def _read_prompt(self, request: Request, feed: Feed, logits_QV: torch.Tensor) -> bool:
        """Record what was read. True if the prompt is now read whole and samples are to be drawn."""
        request.read += len(feed.tokens) - feed.drafted
        if feed.all_logits:
            self._score(request, logits_QV)
        if not request.is_read:
            return False
        if request.samples.work.comes_again:
            request.pin = self._prompts.pin(request.prompt)
        if not request.samples.branches:  # no token was asked for: the prompt was only to be scored or echoed
            if feed.all_logits:
                self._keep_prompt(request)
            self._finish(request)
            return False
        return True

    def _keep_prompt(self, request: Request) -> None:
        """Keep a prompt for others, once the logits after it were checked.

        A number that is not finite also spoils earlier tokens, since a masked NaN stays NaN: no other request may begin
        with them.
        """
        if not request.samples.is_lost and self._prompts.wants(request.prompt):
            self._prompts.add(request.prompt, request.kept)

    def _score(self, request: Request, logits_QV: torch.Tensor) -> None:
        known = request.prompt[len(request.prompt_logprobs) + 1 :][: len(logits_QV)]
        totals_Q1 = log_totals(logits_QV.float())
        request.samples.is_lost |= not bool(torch.isfinite(totals_Q1).all())
        for place, token in enumerate(known):
            logits_V, total = logits_QV[place].float(), float(totals_Q1[place])
            top = likeliest(logits_V, total, request.samples.work.logprobs or 0)
            request.prompt_logprobs.append((float(logits_V[token]) - total, top))

    def _advance(self, request: Request) -> None:
        samples, hooks = request.samples, request.hooks
        if hooks.streams_text:
            news = samples.settled_text()
            if news:
                request.mailbox.put(_Told(news=news))
        samples.leave(hooks.enough)
        if not samples.branches:
            self._finish(request)

    def _finish(self, request: Request) -> None:
        if request.samples.is_lost:
            _log.error("the model's outputs after a prompt of %d tokens are not finite", len(request.prompt))
            self._end(request, _Told(error=not_finite()))
            return
        self.counted.drafted_tokens += request.samples.drafted
        self.counted.accepted_tokens += request.samples.accepted
        told = None
        if request.samples.work.score_prompt:
            told = _tell_prompt(self._model.tokenizer, request)
        drawn = request.samples.finish(request.cached_tokens, told)
        self._end(request, _Told(drawn=replace(drawn, pin=request.pin)))

    def _end(self, request: Request, told: _Told) -> None:
        self._running = [other for other in self._running if other is not request]
        self._let_go(request)
        request.mailbox.put(told)

    def _let_go(self, request: Request) -> None:
        """Hold nothing for a request that has ended: its error, and so the request, may be held for long."""
        request.kept = request.pin = None
        self._prompts.trim()


def _clear_frames(error: BaseException) -> None:
    """Release what a failed step's frames hold, keys and values of all its requests: errors may be held for long.

    The traceback and the causes stay readable.
    """
    causes, seen = [error], set[int]()
    while causes:
        one = causes.pop()
        if id(one) not in seen:
            seen.add(id(one))
            traceback.clear_frames(one.__traceback__)
            causes += [cause for cause in (one.__cause__, one.__context__) if cause is not None]


def _draw(samples: Sequence[JointSamples], logits_DV: torch.Tensor, scratch_DV: torch.Tensor) -> None:
    """Draw a token for every branch that is to draw. The logits, one row per such branch, are overwritten."""
    totals_D1 = log_totals(logits_DV, scratch_DV)
    uniforms: list[npt.NDArray[np.float64]] = []
    temperatures: list[float] = []
    top_ps: list[float] = []
    owns: list[slice] = []
    for one in samples:
        own = slice(len(uniforms), len(uniforms) + len(one.drawing))
        owns.append(own)
        one.restrict(logits_DV[own], totals_D1[own])
        uniforms += one.uniforms()
        temperatures += [one.work.temperature] * len(one.drawing)
        top_ps += [one.work.top_p] * len(one.drawing)
    tokens = draw_tokens(logits_DV, uniforms, temperatures, top_ps, scratch_DV)
    drawn = [distinct_in_order(some) for some in tokens]
    rows = np.repeat(np.arange(len(drawn)), list(map(len, drawn)))
    chosen = logits_DV[torch.from_numpy(rows), torch.from_numpy(np.concatenate(drawn))].tolist()  # one wait for the GPU
    ends, totals = np.cumsum(list(map(len, drawn))).tolist(), totals_D1[:, 0].tolist()
    logits = [chosen[end - len(some) : end] for end, some in zip(ends, drawn, strict=True)]
    for one, own in zip(samples, owns, strict=True):
        one.take(tokens[own], drawn[own], logits[own], logits_DV[own], totals[own])


def _pick(logits_RV: torch.Tensor, places: Sequence[int]) -> torch.Tensor:
    """The rows at rising `places`; not copied if they are adjacent."""
    if places[-1] - places[0] == len(places) - 1:
        return logits_RV[places[0] : places[-1] + 1]
    return logits_RV[places]


class _Scratch:
    """Memory for the logits of a step, reused from step to step: they are a step's largest tensors by far.

    They take 590 KB a row for 49,152 tokens, so the memory of many rows is released when nothing runs.
    """

    def __init__(self) -> None:
        self._places: torch.Tensor | None = None

    def fill(self, logits: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """The logits, stacked in float32, and as much scratch memory again."""
        rows, first = sum(map(len, logits)), logits[0]
        if self._places is None or self._places.shape[1] < rows:
            self._places = torch.empty(2, rows + rows // 2, first.shape[1], device=first.device)
        logits_RV, scratch_RV = self._places[:, :rows]
        for logits_QV, place_QV in zip(logits, logits_RV.split(list(map(len, logits))), strict=True):
            place_QV.copy_(logits_QV)
        return logits_RV, scratch_RV

    def give_back(self) -> None:
        """Release what is more than a few requests need."""
        if self._places is not None and self._places.shape[1] > _KEPT_ROWS:
            self._places = None


def _tell_prompt(tokenizer: Any, request: Request) -> TokenLogprobs:
    logprobs = [None, *(logprob for logprob, _ in request.prompt_logprobs)]
    tops = [None, *(top for _, top in request.prompt_logprobs)]
    return tell_logprobs(tokenizer, request.prompt, logprobs, tops, "", 1 << 62)
