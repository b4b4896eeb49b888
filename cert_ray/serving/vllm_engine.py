"""An engine over vLLM, for the architectures that vLLM runs (Llama, GPT-2 and the like): extra `vllm`.

In: a local Hugging Face folder. Out: an `Engine`. vLLM batches requests and shares their prompts by itself. Each sample
is a request of its own to it, and `joint.JointSamples` decides where it ends, as for the other engine. vLLM draws with
its own random numbers, so a seed gives other samples than there, but from the same distribution. It reports a token's
log-probability among all tokens, even where a prompt's blanks leave only some (`vllm_blanks.py`). Run on vLLM's build
for CPUs; this project has not run it on a GPU.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib
import math
import os
import queue
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import xxhash
from tokenizers import Tokenizer
from transformers import AutoConfig

from cert_ray import storage
from cert_ray.errors import ConfigError, InputError, RequestError
from cert_ray.serving.boundaries import FirstTokens
from cert_ray.serving.engines import (
    DEFAULT_HOOKS,
    Drawn,
    EngineConfig,
    Hooks,
    TokenLogprobs,
    Work,
    check_length,
    not_finite,
)
from cert_ray.serving.joint import Branch, JointSamples, Top, tell_logprobs
from cert_ray.serving.model_folders import end_ids, find_infill, generation_config, window
from cert_ray.sketching import prompt_format

START: Final = "cert_ray_start"  # key in a request's `extra_args`: the blanks that its text must begin with
_BLANKS: Final = "cert_ray.serving.vllm_blanks:StartsWithBlanks"
# For vLLM's processes, which inherit it. vLLM's second model runner, the default on GPUs, takes logits processors of
# another interface than that of `vllm_blanks.py` (vLLM 0.32). And vLLM would report to its makers what it runs on.
_ENVIRONMENT: Final = {"VLLM_USE_V2_MODEL_RUNNER": "0", "VLLM_NO_USAGE_STATS": "1"}
_NEVER: Final = -100.0  # added to the logit of a token that must not be drawn: the least that vLLM takes
_LOOK_S: Final = 0.02  # between two checks that the answer is still wanted
_MOST_LOGPROBS: Final = 20
_CLOSED: Final = "this engine was closed"
_STOP_S: Final = 10.0  # assumed: enough for a loop that only has to let go

_Scores = Sequence[Mapping[int, Any] | None]  # one mapping by token per token of the prompt; the first has none


@dataclass(frozen=True, slots=True)
class _News:
    """What vLLM said of a sample: the tokens drawn since, and whether those were the last; or what ended it."""

    sample: int
    tokens: Sequence[tuple[int, float, Top | None]] = ()
    is_last: bool = False
    error: BaseException | None = None
    cached_tokens: int = 0
    prompt_logprobs: _Scores | None = None


class _Silence:
    """How long requests have waited for vLLM since it last said something.

    Waits that were given up count too: otherwise a hang would go unseen when requests have a shorter deadline.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting = 0
        self._since_s = 0.0  # when the current wait began, by `time.monotonic`
        self._before_s = 0.0  # total of the waits before it

    @property
    def seconds(self) -> float:
        with self._lock:
            return self._before_s + (time.monotonic() - self._since_s if self._waiting else 0.0)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the caller as waiting, beside others or alone."""
        with self._lock:
            self._waiting += 1
            if self._waiting == 1:
                self._since_s = time.monotonic()
        try:
            yield
        finally:
            with self._lock:
                self._waiting -= 1
                if not self._waiting:
                    self._before_s += time.monotonic() - self._since_s

    def broken(self) -> None:
        """Record that vLLM said something."""
        with self._lock:
            self._before_s, self._since_s = 0.0, time.monotonic()


class VllmEngine:
    """An `Engine` whose model runs in vLLM's own processes, which end with this object."""

    def __init__(self, folder: str, config: EngineConfig) -> None:
        """Start vLLM over the model in `folder`.

        Raises:
            InputError: when the folder is not local.
            ConfigError: when vLLM is not installed.
        """
        if not storage.is_local(folder):
            raise InputError(folder, "vLLM needs a local folder", "Copy the model to this machine.")
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        try:
            engine_module = importlib.import_module("vllm.v1.engine.async_llm")
            self._vllm = importlib.import_module("vllm")
        except ImportError as error:
            raise ConfigError(
                f"engine.kind='vllm': vLLM cannot be imported ({error}). Install cert-ray[vllm], or use "
                "engine.kind='transformers'."
            ) from error
        path = storage.local_path(folder)
        self._tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        described = AutoConfig.from_pretrained(path, trust_remote_code=False)
        self._context_tokens = window(folder, described)
        self._infill_tokens = find_infill(folder, self._tokenizer, config.infill)
        self._end_ids = end_ids(described, generation_config(path, described), self._tokenizer)
        self._first_tokens = FirstTokens(self._tokenizer, described.vocab_size)
        options = self._vllm.AsyncEngineArgs(**_engine_options(str(path), config, self._context_tokens))

        async def start() -> Any:
            return engine_module.AsyncLLM.from_engine_args(options)

        self._silence = _Silence()
        self._loop = asyncio.new_event_loop()
        thread = threading.Thread(target=_run, args=[self._loop], name="cert-ray-vllm", daemon=True)
        thread.start()
        try:
            self._engine = asyncio.run_coroutine_threadsafe(start(), self._loop).result()
        except BaseException:
            _stop(self._loop, thread)
            raise
        self._end = weakref.finalize(self, _end, self._engine, self._loop, thread)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the folder."""
        return self._tokenizer

    @property
    def context_tokens(self) -> int:
        """The model's window."""
        return self._context_tokens

    @property
    def infill_tokens(self) -> tuple[int, int, int] | None:
        """The tokens of `EngineConfig.infill`."""
        return self._infill_tokens

    @property
    def takes_drafts(self) -> bool:
        """Never: vLLM takes no drafts."""
        return False

    @property
    def step_s(self) -> float:
        """How long vLLM's step has taken so far, judged by its silence: it says nothing during a step."""
        return self._silence.seconds

    def close(self) -> None:
        """End vLLM's processes. Unfinished work fails."""
        self._end()

    def draw(self, work: Work, hooks: Hooks = DEFAULT_HOOKS) -> Drawn:
        """Draw the samples; see `Engine.draw`."""
        if work.template is not None:
            problem = "mode constrained: vLLM's engine does not support it; ask for mode=cascade."
            raise RequestError(400, problem, "mode", "unsupported")
        if not self._end.alive:
            raise RuntimeError(_CLOSED)
        prompt = work.prompt or (min(self._end_ids, default=0),)  # a text starts after an end of text
        check_length(len(prompt), self._context_tokens)
        samples = JointSamples(work, self._context_tokens, self._tokenizer, self._end_ids, self._first_tokens)
        asked = self._options(work, len(prompt))
        with self._silence.waiting():
            heard, tells_tops = self._silence.broken, work.logprobs is not None
            request = _Request(self._engine, self._loop, list(prompt), asked, heard, tells_tops=tells_tops)
            try:
                return _Drawing(samples, request, hooks).run(lambda scores: self._tell_prompt(prompt, scores))
            finally:
                request.end_others()

    def _options(self, work: Work, prompt_tokens: int) -> dict[int, Any]:
        """Each sample's `SamplingParams`. To score only the prompt, those of one sample, whose token is not used."""
        refused = prompt_format.marker_ids(self._tokenizer) if work.code_only else ()
        room = self._context_tokens - prompt_tokens
        make = functools.partial(
            self._vllm.SamplingParams,
            max_tokens=max(1, min(work.max_tokens + len(work.start), room)),  # blanks do not count
            temperature=work.temperature,
            top_p=work.top_p,
            stop_token_ids=sorted(self._end_ids | work.stop_token_ids),
            ignore_eos=True,  # the tokenizer's own; as with the other engine, the model's configurations name the ends
            logit_bias=dict.fromkeys(refused, _NEVER) if refused else None,
            logprobs=work.logprobs or 0,
            detokenize=False,
            extra_args={START: work.start} if work.start else None,
            output_kind=self._vllm.sampling_params.RequestOutputKind.DELTA,
        )
        told = f"{work.seed!r}, {work.prompt!r}"
        asked = {}
        for index in range(work.n if work.max_tokens else 1):
            stream = index % (work.streams or work.n)
            seed = xxhash.xxh3_64_intdigest(f"({told}, {stream})".encode()) >> 1  # vLLM takes 63 bits
            scores = work.logprobs or 0 if work.score_prompt and index == 0 else None
            asked[index] = make(seed=seed, prompt_logprobs=scores)
        return asked

    def _tell_prompt(self, prompt: Sequence[int], scores: _Scores) -> TokenLogprobs:
        rows = [row or {} for row in scores]
        logprobs = [row[token].logprob if token in row else None for token, row in zip(prompt, rows, strict=True)]
        tops = [_top(row) if row else None for row in rows]
        return tell_logprobs(self._tokenizer, prompt, logprobs, tops, "", 1 << 62)


class _Request:
    """The samples of one piece of work, each a request to vLLM."""

    def __init__(
        self,
        engine: Any,
        loop: asyncio.AbstractEventLoop,
        prompt: list[int],
        asked: dict[int, Any],
        on_word: Callable[[], None],
        *,
        tells_tops: bool,
    ) -> None:
        """`asked`: each sample's `SamplingParams`. `on_word`: called whenever vLLM says something.

        `tells_tops`: whether the likeliest tokens are wanted.
        """
        self._on_word, self._tells_tops = on_word, tells_tops
        self._mailbox: queue.SimpleQueue[_News] = queue.SimpleQueue()
        self._engine, self._loop = engine, loop
        self._name = uuid.uuid4().hex
        self._running: dict[int, Future[None]] = {
            index: asyncio.run_coroutine_threadsafe(self._listen(prompt, options, index), loop)
            for index, options in asked.items()
        }

    async def _listen(self, prompt: list[int], options: Any, index: int) -> None:
        outputs = self._engine.generate({"prompt_token_ids": prompt}, options, f"{self._name}-{index}")
        try:
            async for output in outputs:
                self._on_word()
                self._mailbox.put(_read(output, index, self._tells_tops))
        except asyncio.CancelledError:  # from `end`, after which nobody listens; or the engine was closed
            self._mailbox.put(_News(index, error=RuntimeError(_CLOSED)))
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, the thread that waits raises it
            self._mailbox.put(_News(index, error=error))

    def news(self) -> list[_News]:
        """What was said since the last call, of all samples in a step; empty after a short wait."""
        found: list[_News] = []
        with contextlib.suppress(queue.Empty):
            found.append(self._mailbox.get(timeout=_LOOK_S))
            while True:
                found.append(self._mailbox.get_nowait())
        return found

    def is_running(self, index: int) -> bool:
        """Whether more of a sample is wanted."""
        return index in self._running

    def end(self, index: int) -> None:
        """Draw no more of a sample: vLLM aborts a request when nobody listens."""
        running = self._running.pop(index, None)
        if running is not None:
            running.cancel()

    def end_others(self) -> None:
        """Draw no more of any sample."""
        for index in list(self._running):
            self.end(index)


class _Drawing:
    """Assembles the samples from what vLLM says of each, in the thread that waits for them."""

    def __init__(self, samples: JointSamples, request: _Request, hooks: Hooks) -> None:
        self._samples, self._request, self._hooks = samples, request, hooks
        work = samples.work
        self._open = {index: Branch(np.array([index]), work.start) for index in range(work.n) if work.max_tokens}
        self._samples.branches = list(self._open.values())
        self._cached_tokens: int | None = None
        self._scores: _Scores | None = None

    def run(self, tell_prompt: Callable[[_Scores], TokenLogprobs]) -> Drawn:
        """All samples, or as many as are enough."""
        work = self._samples.work
        while self._open or (work.score_prompt and self._scores is None):
            self._hooks.check()
            every = self._request.news()
            for news in every:
                if news.error is None:
                    self._take(news)
                elif self._request.is_running(news.sample):
                    raise news.error
            if every:
                self._samples.branches = list(self._open.values())
                self._tell()
        told = None if self._scores is None else tell_prompt(self._scores)
        return self._samples.finish(self._cached_tokens or 0, told)

    def _take(self, news: _News) -> None:
        # The first sample to be read fills the cache of the prompt's blocks for the others: its count is the true one.
        cached = news.cached_tokens
        self._cached_tokens = cached if self._cached_tokens is None else min(self._cached_tokens, cached)
        self._scores = self._scores or news.prompt_logprobs
        branch = self._open.pop(news.sample, None)
        for token, logprob, top in news.tokens:
            if not math.isfinite(logprob):
                raise not_finite()
            if branch is not None:
                branch = self._samples.grow(branch, token, branch.samples, logprob, top)
        if branch is not None and news.is_last:
            self._samples.end(branch, ended=False)
        elif branch is not None:
            self._open[news.sample] = branch
        if news.sample not in self._open:
            self._request.end(news.sample)

    def _tell(self) -> None:
        hooks, samples = self._hooks, self._samples
        if hooks.streams_text:
            for index, text, reason in samples.settled_text():
                hooks.on_text(index, text, reason)
        samples.leave(hooks.enough)
        if not samples.branches:
            self._open = {}


def _engine_options(path: str, config: EngineConfig, context_tokens: int) -> dict[str, Any]:
    """vLLM's `AsyncEngineArgs`.

    Raises:
        ConfigError: when `prefill_tokens` is less than vLLM needs.
    """
    options: dict[str, Any] = {
        "model": path,
        "dtype": config.dtype,
        "max_model_len": context_tokens,
        "max_logprobs": _MOST_LOGPROBS,
        "enable_prefix_caching": True,
        "kv_cache_memory_bytes": int(config.kv_cache_gib * 2**30),
        # vLLM demands that this share of the device is free. Little, since a cascade has two models on one device.
        "gpu_memory_utilization": 0.01,
        "trust_remote_code": False,
        "logits_processors": [_BLANKS],
        "disable_log_stats": True,
    }
    if importlib.import_module("vllm.platforms").current_platform.is_cpu():
        # Reading a prompt in parts draws a token that is not kept, after which vLLM 0.32 rewinds the seeded generator.
        # It cannot do that on a CPU: its worker ends, and with it all requests.
        options["enable_chunked_prefill"] = False
        least = max(context_tokens, config.max_rows or 0)
        if config.prefill_tokens is not None and config.prefill_tokens < least:
            raise ConfigError(
                f"engine.prefill_tokens={config.prefill_tokens} with kind='vllm' on a CPU, where vLLM reads each "
                f"prompt whole: give {least} or more (the larger of the model's window and max_rows), or leave it out."
            )
    given = {"max_num_seqs": config.max_rows, "max_num_batched_tokens": config.prefill_tokens}
    return options | {name: value for name, value in given.items() if value is not None}


def _read(output: Any, index: int, tells_tops: bool) -> _News:
    tokens: list[tuple[int, float, Top | None]] = []
    for one in output.outputs:
        if one.finish_reason in ("abort", "error"):  # by vLLM itself: nobody listens to what we abort
            return _News(index, error=RuntimeError(f"vLLM gave up on a request: {one.finish_reason}"))
        for token, row in zip(one.token_ids, one.logprobs or (), strict=True):
            tokens.append((token, row[token].logprob, _top(row) if tells_tops else None))
    return _News(
        index, tokens, output.finished, None, output.num_cached_tokens or 0, getattr(output, "prompt_logprobs", None)
    )


def _top(row: Mapping[int, Any]) -> Top:
    return tuple((token, entry.logprob) for token, entry in row.items())


def _run(loop: asyncio.AbstractEventLoop) -> None:
    loop.run_forever()
    loop.run_until_complete(_end_tasks())
    loop.close()


async def _end_tasks() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _end(engine: Any, loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    try:
        engine.shutdown()
    finally:
        _stop(loop, thread)


def _stop(loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    loop.call_soon_threadsafe(loop.stop)
    if thread is not threading.current_thread():  # the last reference may have been dropped there
        thread.join(timeout=_STOP_S)
