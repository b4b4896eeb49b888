"""Many prompts answered side by side, for offline work such as an evaluation: one forward pass for all of them.

In: prompts and sampling options. Out: for each prompt what `Answerer.answer` would say, up to rounding (padding and
wider batches add floats in another order, so a near tie may fall the other way). Two things make it cheap on a CPU,
where a forward pass of one row costs nearly as much as of sixteen:

- prompts are decoded together, padded on the left: each prompt's inference runs in a thread of its own, and the engines
  wait until every thread waits for one of them;
- samples that have drawn the same tokens so far are one row: at temperature 0.2 most samples of a prompt are equal for
  long (SPIKES: 0.14 rows for a sampled token at n = 20).

Which prompts share a pass follows from their order alone, never from the threads.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from tokenizers import Tokenizer

from cert_ray.serving.answering import ModelConfig
from cert_ray.serving.boundaries import FirstTokens, StopWatch, cut_at, drop_start
from cert_ray.serving.cascade import CascadeAnswer, run_cascade, run_single
from cert_ray.serving.completers import CompleterConfig
from cert_ray.serving.engines import Completion, Engine, EngineConfig, TransformersEngine, check_length
from cert_ray.serving.sampling import Sampling, draw_tokens, uniform_streams
from cert_ray.sketching import prompt_format

_T = TypeVar("_T")
_Decoded = list[list[Completion]]


class LockstepEngine:
    """An `Engine` that decodes all prompts of a call together. Not safe to call from several threads at once."""

    def __init__(self, folder: str, config: EngineConfig | None = None) -> None:
        """Load the model in `folder`; raises as `TransformersEngine`."""
        loaded = TransformersEngine(folder, config)
        self.tokenizer: Tokenizer = loaded.tokenizer
        self.context_tokens: int = loaded.context_tokens
        self._model, self._device, self._end_ids = loaded._model, loaded._device, loaded._end_ids
        self._first_tokens = FirstTokens(self.tokenizer, self._model.get_input_embeddings().num_embeddings)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        n: int,
        max_tokens: int,
        temperature: float,
        top_p: float,
        seed: int,
        stop: Sequence[str],
        starts: Sequence[str] | None = None,
    ) -> _Decoded:
        """`n` completions for each prompt, in order; see `Engine.generate`.

        Raises:
            RequestError: 400, when a prompt leaves no room for one token.
        """
        distinct = 1 if temperature == 0 else n
        rows: list[list[_Row]] = []
        given = [list(prompt) or [min(self._end_ids, default=0)] for prompt in prompts]
        for ids, start in zip(given, starts or [""] * len(given), strict=True):
            check_length(len(ids), self.context_tokens)
            steps = min(max_tokens, self.context_tokens - len(ids))
            rows.append([_Row(start, stream) for stream in uniform_streams(seed, ids, range(distinct), steps)])
        watch = StopWatch(self.tokenizer, stop)
        with torch.inference_mode():
            self._decode(given, rows, temperature, top_p, watch)
        return [[self._completion(row, stop) for row in group] * (n // distinct) for group in rows]

    def _decode(
        self, prompts: list[list[int]], rows: list[list[_Row]], temperature: float, top_p: float, watch: StopWatch
    ) -> None:
        """Draw every row to its end. A node is a set of rows with the same tokens so far; one row of the model each."""
        ids_NT, mask_NT = self._padded(prompts)
        positions_NT = (mask_NT.cumsum(-1) - 1).clamp(min=0)
        found = self._model(
            input_ids=ids_NT, attention_mask=mask_NT, position_ids=positions_NT, use_cache=True, logits_to_keep=1
        )
        nodes, cache = rows, found.past_key_values
        next_N = positions_NT[:, -1] + 1
        while True:
            children = self._draw(nodes, found.logits[:, -1].float(), temperature, top_p, watch)
            if not children:
                return
            parents_N = torch.tensor([parent for parent, _ in children], device=self._device)
            tokens_N1 = torch.tensor([[token] for _, token in children], device=self._device)
            nodes = list(children.values())
            cache.batch_select_indices(parents_N)
            mask_NT = _drop_padding(cache, mask_NT[parents_N])
            mask_NT = torch.nn.functional.pad(mask_NT, (0, 1), value=1)
            next_N = next_N[parents_N]
            found = self._model(
                input_ids=tokens_N1,
                attention_mask=mask_NT,
                position_ids=next_N[:, None],
                past_key_values=cache,
                use_cache=True,
            )
            next_N = next_N + 1

    def _padded(self, prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        longest = max(map(len, prompts))
        ids_NT = torch.zeros(len(prompts), longest, dtype=torch.long)
        mask_NT = torch.zeros(len(prompts), longest, dtype=torch.long)
        for place, ids in enumerate(prompts):
            ids_NT[place, longest - len(ids) :] = torch.tensor(ids)
            mask_NT[place, longest - len(ids) :] = 1
        return ids_NT.to(self._device), mask_NT.to(self._device)

    def _draw(
        self, nodes: list[list[_Row]], logits_NV: torch.Tensor, temperature: float, top_p: float, watch: StopWatch
    ) -> dict[tuple[int, int], list[_Row]]:
        """One token for every row; the rows that go on, by node and token."""
        children: dict[tuple[int, int], list[_Row]] = {}
        for node, members in enumerate(nodes):
            logits_V = self._refuse(logits_NV[node], members[0])
            logprobs_V = logits_V.log_softmax(dim=-1)
            uniform_B = torch.stack([row.stream[row.drawn] for row in members])
            tokens = draw_tokens(logits_V.expand(len(members), -1), uniform_B, temperature, top_p).tolist()
            for row, token in zip(members, tokens, strict=True):
                self._append(row, token, float(logprobs_V[token]), watch)
                if not row.ended and row.drawn < len(row.stream):
                    children.setdefault((node, token), []).append(row)
        return children

    def _refuse(self, logits_V: torch.Tensor, row: _Row) -> torch.Tensor:
        """Mask the tokens that would break the blanks with which a row must begin."""
        refused_V = self._first_tokens.refused(row.start_left) if row.start_left else None
        if refused_V is None:
            return logits_V
        return logits_V.masked_fill(refused_V.to(logits_V.device), float("-inf"))

    def _append(self, row: _Row, token: int, logprob: float, watch: StopWatch) -> None:
        row.logprob_sum += logprob
        row.drawn += 1
        if token in self._end_ids:
            row.ended = True
            return
        row.ids.append(token)
        if row.start_left:
            row.start_left = row.start_left[len(self._first_tokens.text_of(token)) :]
        row.ended = watch.seen(row.ids)

    def _completion(self, row: _Row, stop: Sequence[str]) -> Completion:
        text = drop_start(prompt_format.decode_code(self.tokenizer, row.ids), row.start)
        cut = cut_at(text, stop)
        ended = row.ended or len(cut) < len(text)
        return Completion(tuple(row.ids), cut, "stop" if ended else "length", row.logprob_sum / row.drawn)


def _drop_padding(cache: Any, mask_NT: torch.Tensor) -> torch.Tensor:
    """Take the columns off the left that are padding in every row, so that no cache outgrows the model's window."""
    used = mask_NT.any(dim=0).nonzero()
    unused = int(used[0])
    if unused:
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[:, :, unused:], layer.values[:, :, unused:]
    return mask_NT[:, unused:]


@dataclass(slots=True)
class _Row:
    """A sample while it is being drawn; `stream` are its uniform numbers, one a step."""

    start: str
    stream: torch.Tensor
    ids: list[int] = field(default_factory=list)
    start_left: str = ""
    logprob_sum: float = 0.0
    drawn: int = 0
    ended: bool = False

    def __post_init__(self) -> None:
        self.start_left = self.start


class LockstepCompleter:
    """`complete(prompts, n)` by one model or the cascade, `width` prompts side by side."""

    def __init__(self, models: ModelConfig, config: CompleterConfig | None = None, width: int = 16) -> None:
        """Load the models; raises as `Answerer.load`."""
        self._config, self._width, self._cascade = config or CompleterConfig(), width, models.cascade
        folders = [folder for folder in (models.sketcher, models.generator or models.model) if folder is not None]
        self._engines = [LockstepEngine(folder, models.engine) for folder in folders]

    def with_config(self, config: CompleterConfig) -> LockstepCompleter:
        """The same models, sampled otherwise."""
        other = copy.copy(self)
        other._config = config
        return other

    def __call__(self, prompts: list[str], n: int) -> list[list[str]]:
        """`n` completions for each prompt, in order."""
        answers = self.answer(prompts, self._config.sampling(n))
        return [[choice.text for choice in answer.choices] for answer in answers]

    def answer(self, prompts: Sequence[str], sampling: Sampling) -> list[CascadeAnswer]:
        """One answer per prompt, in order.

        Raises:
            RequestError: 400, for a prompt that does not fit the window.
        """

        def work(prompt: str, engines: list[Engine]) -> CascadeAnswer:
            if len(engines) == 1:
                return run_single(prompt, sampling, engines[0])
            return run_cascade(prompt, sampling, engines[0], engines[1], self._cascade)

        answers = []
        for first in range(0, len(prompts), self._width):
            answers += run_together(prompts[first : first + self._width], self._engines, work)
        return answers


def run_together(
    prompts: Sequence[str], engines: Sequence[Engine], work: Callable[[str, list[Engine]], _T]
) -> list[_T]:
    """`work(prompt, engines)` of each prompt, in order; the engines decode what all prompts wait for at once."""
    gather = _Gather(len(prompts))

    def run(prompt: str) -> _T:
        try:
            return work(prompt, [_Gathering(engine, gather) for engine in engines])
        finally:
            gather.leave()

    if not prompts:
        return []
    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(run, prompts))


@dataclass(slots=True)
class _Waiting:
    """A request that waits for the others."""

    engine: Engine
    prompt: list[int]
    start: str
    options: tuple[tuple[str, Any], ...]
    answer: list[Completion] | None = None
    error: Exception | None = None


class _Gather:
    """Holds requests until everyone who is still at work has one, and then decodes them all."""

    def __init__(self, parties: int) -> None:
        self._parties = parties
        self._waiting: list[_Waiting] = []
        self._changed = threading.Condition()

    def ask(self, request: _Waiting) -> list[Completion]:
        """The completions of `request`, once everyone waits."""
        with self._changed:
            self._waiting.append(request)
            self._decode_if_all_wait()
            while request.answer is None and request.error is None:
                self._changed.wait()
        if request.error is not None:
            raise request.error
        assert request.answer is not None
        return request.answer

    def leave(self) -> None:
        """One of the parties is through."""
        with self._changed:
            self._parties -= 1
            self._decode_if_all_wait()

    def _decode_if_all_wait(self) -> None:
        if not self._waiting or len(self._waiting) < self._parties:
            return
        waiting = sorted(self._waiting, key=lambda request: (len(request.prompt), request.prompt, request.start))
        self._waiting = []
        groups: dict[tuple[int, Any], list[_Waiting]] = {}
        for request in waiting:
            groups.setdefault((id(request.engine), request.options), []).append(request)
        for group in groups.values():
            _answer_together(group)
        self._changed.notify_all()


def _answer_together(group: list[_Waiting]) -> None:
    first = group[0]
    try:
        found = first.engine.generate(
            [request.prompt for request in group],
            starts=[request.start for request in group],
            **dict(first.options),
        )
    except Exception as error:  # noqa: BLE001  every thread that waits must hear of it
        for request in group:
            request.error = error
        return
    for request, answer in zip(group, found, strict=True):
        request.answer = answer


class _Gathering:
    """An `Engine` for one thread: what it asks of `engine` is decoded with what the other threads ask."""

    def __init__(self, engine: Engine, gather: _Gather) -> None:
        self._engine, self._gather = engine, gather
        self.tokenizer, self.context_tokens = engine.tokenizer, engine.context_tokens

    def generate(
        self, prompts: Sequence[Sequence[int]], *, starts: Sequence[str] | None = None, **options: Any
    ) -> _Decoded:
        """See `Engine.generate`; a thread has one prompt."""
        (prompt,), (start,) = prompts, starts or [""]
        check_length(len(prompt), self.context_tokens)  # here, so that one prompt cannot fail the others
        frozen = {**options, "stop": tuple(options["stop"])}
        return [self._gather.ask(_Waiting(self._engine, list(prompt), start, tuple(sorted(frozen.items()))))]
