"""Requests in one batch: each is answered as if alone, whoever joins, leaves, is given up or fails."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cert_ray.errors import RequestCancelledError, RequestError
from cert_ray.serving import batching, packed_attention, sampling
from cert_ray.serving.answering import check_wanted
from cert_ray.serving.batching import Turns
from cert_ray.serving.engines import Completion, Drawn, EngineConfig, Hooks, Work
from cert_ray.serving.kept_prompts import KeptPrompts
from cert_ray.serving.packed_attention import Feed, Kept
from cert_ray.serving.transformers_engine import TransformersEngine
from cert_ray.sketching import prompt_format
from tests.serving.builders import save_model

TEXTS = [
    "import pandas as pd\nimport numpy as np\n\n\ndef head(df, n):\n",  # longer than a local layer's window
    "df",
    "import pandas as pd\nimport numpy as np\n\n\nclass Thing:\n",
    "x = df['a'].astype(float)\nreturn",
]


@pytest.fixture(scope="module", params=["gpt_neo", "llama", "gpt2", "mistral"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp(request.param), request.param, window=128)


@pytest.fixture(scope="module")
def engine(folder: str) -> TransformersEngine:
    engine = TransformersEngine(folder)
    assert engine.is_packed
    return engine


def work(engine: TransformersEngine, text: str, **changed: Any) -> Work:
    options: dict[str, Any] = {"n": 6, "max_tokens": 30, "temperature": 0.7, "top_p": 0.95, "seed": 7}
    return Work(tuple(prompt_format.encode_code(engine.tokenizer, text)), **{**options, **changed})


def ids(drawn: Drawn) -> list[tuple[int, ...] | None]:
    return [None if sample is None else sample.ids for sample in drawn.samples]


@pytest.fixture(scope="module")
def alone(engine: TransformersEngine) -> list[list[tuple[int, ...] | None]]:
    return [ids(engine.draw(work(engine, text))) for text in TEXTS]


def one_by_one(folder: str, monkeypatch: pytest.MonkeyPatch) -> TransformersEngine:
    monkeypatch.setattr(packed_attention, "enable", lambda _: False)
    return TransformersEngine(folder)


def test_packed_attention_gives_what_transformers_cache_gives(
    folder: str, alone: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = one_by_one(folder, monkeypatch)
    assert not plain.is_packed
    assert [ids(plain.draw(work(plain, text))) for text in TEXTS] == alone


def test_branches_that_die_leave_the_others_as_they_are(
    engine: TransformersEngine, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many branches, most of which end early, so that what only they saw is dropped."""
    plain = one_by_one(folder, monkeypatch)
    asked = work(engine, TEXTS[0], n=40, temperature=1.5, max_tokens=60, stop=("a", "e", "(", "7"))
    assert ids(engine.draw(asked)) == ids(plain.draw(asked))


@pytest.mark.parametrize(
    "config",
    [
        EngineConfig(prefill_tokens=3),
        EngineConfig(max_rows=1),
        EngineConfig(prefix_cache_tokens=0),
        EngineConfig(packed_weights=False),
    ],
)
def test_an_answer_does_not_depend_on_how_the_batch_is_run(folder: str, alone: list[Any], config: EngineConfig) -> None:
    engine = TransformersEngine(folder, config)
    with ThreadPoolExecutor(8) as pool:
        drawn = list(pool.map(lambda text: engine.draw(work(engine, text)), TEXTS * 2))
    assert [ids(one) for one in drawn] == alone * 2


def test_a_prompt_that_begins_like_one_before_is_not_read_again(folder: str, alone: list[Any]) -> None:
    engine = TransformersEngine(folder)
    first, second, again = (engine.draw(work(engine, TEXTS[place])) for place in (0, 2, 0))
    assert first.cached_tokens == 0
    assert second.cached_tokens >= len(prompt_format.encode_code(engine.tokenizer, "import pandas as pd\nimport numpy"))
    assert again.cached_tokens == len(work(engine, TEXTS[0]).prompt) - 1
    assert [ids(first), ids(second), ids(again)] == [alone[0], alone[2], alone[0]]


def test_numbers_that_are_not_finite_are_an_error_of_their_own_request(
    folder: str, engine: TransformersEngine, alone: list[Any]
) -> None:
    """As of weights that overflow in fp16; whatever the prompt, the same token would be drawn over and over."""
    lost = TransformersEngine(folder)
    prompts = [work(lost, text).prompt for text in TEXTS]
    used = set().union(*prompts, *(tokens for drawn in alone for tokens in drawn))
    poison = next(token for token in range(10, 400) if token not in used)

    def spoil(_: object, args: tuple[torch.Tensor], embedded_1SD: torch.Tensor) -> torch.Tensor:
        return embedded_1SD.masked_fill((args[0] == poison)[..., None], torch.nan)

    lost._model.get_input_embeddings().register_forward_hook(spoil)
    works = [replace(work(lost, TEXTS[0]), prompt=(*prompts[0], poison)), *(work(lost, text) for text in TEXTS)]

    def draw(one: Work) -> Any:
        try:
            return ids(lost.draw(one))
        except RequestError as error:
            return error

    with ThreadPoolExecutor(len(works)) as pool:
        refused, *others = pool.map(draw, works)
    assert others == alone
    assert (refused.status, refused.code) == (500, "not_finite")
    for tokens in (1, 0):  # also where the prompt is only scored
        with pytest.raises(RequestError, match="not finite"):
            lost.draw(replace(works[0], max_tokens=tokens, temperature=0.0, logprobs=0, score_prompt=tokens == 0))
    lost.draw(replace(works[0], max_tokens=0))  # nobody looks at its numbers
    kept = list(lost._batch._prompts._kept)
    assert kept
    assert not any(poison in prompt for prompt in kept)


def test_logits_behind_a_prompt_that_is_kept_are_summed_once(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = TransformersEngine(folder)
    asked = work(engine, TEXTS[0], max_tokens=1)
    summed = []

    def once_more(*_: object) -> torch.Tensor:
        raise AssertionError("summed once more")  # in the stepping thread: whoever draws gets it

    monkeypatch.setattr(torch.Tensor, "logsumexp", once_more)

    def log_totals(logits_DV: torch.Tensor, *scratch: torch.Tensor) -> torch.Tensor:
        summed.append(len(logits_DV))
        return sampling.log_totals(logits_DV, *scratch)

    monkeypatch.setattr(batching, "log_totals", log_totals)
    engine.draw(asked)
    assert summed == [1]
    assert engine.draw(asked).cached_tokens == len(asked.prompt) - 1


class ByHand(Turns):
    """No thread: whoever tests steps."""

    def wake(self) -> None:
        """Nobody sleeps."""


def test_logits_of_a_burst_take_no_memory_once_nothing_runs(folder: str) -> None:
    engine = TransformersEngine(folder, turns=ByHand())
    batch, rows = engine._batch, []
    with ThreadPoolExecutor(1) as pool:
        for samples in (3, 300):
            drawn = pool.submit(engine.draw, Work((5, 6, 7), n=samples, max_tokens=4, temperature=2.0))
            while not drawn.done():
                batch.step()
                places = batch._scratch._places
                rows.append(0 if places is None else places.shape[1])
            batch.step()
            assert batch._scratch._places is None or batch._scratch._places.shape[1] <= 64
    assert max(rows) > 100


class Recited:
    """Keeps the prompts' tokens themselves, as a model keeps their keys."""

    tokenizer, takes_drafts = None, False

    def begin(self) -> tuple[int, ...]:
        return ()

    def beginning(self, kept: tuple[int, ...], tokens: int) -> tuple[int, ...]:
        return kept[:tokens]

    def forward(self, feeds: object) -> list[Any]:
        raise NotImplementedError

    def give_back(self) -> None:
        raise NotImplementedError


def test_prompts_that_go_on_take_the_places_of_their_beginnings() -> None:
    first = [tuple(range(100 * place, 100 * place + 20)) for place in range(16)]
    second = [(*prompt, 7, 8, 9) for prompt in first]
    prompts = KeptPrompts(Recited(), sum(map(len, second)))
    for prompt in first:
        prompts.add(prompt, prompt)
    for prompt, longer in zip(first, second, strict=True):
        assert prompts.find(longer, Work(longer)) == (prompt, 20)  # none was dropped for those that went on before
        assert prompts.wants(longer)
        prompts.add(longer, longer)
    for prompt, longer in zip(first, second, strict=True):
        assert prompts.find(prompt, Work(prompt)) == (prompt[:-1], 19)
        assert prompts.find(longer, Work(longer)) == (longer[:-1], 22)
        assert not prompts.wants(prompt)
        assert not prompts.wants(longer)


def test_a_pinned_prompt_is_kept_beyond_the_limit_until_nobody_holds_its_pin() -> None:
    first = [tuple(range(100 * place, 100 * place + 20)) for place in range(16)]
    prompts = KeptPrompts(Recited(), 10)  # less than any of them has
    assert not prompts.wants(first[0])
    pins = [prompts.pin(prompt) for prompt in first]
    for prompt in first:
        assert prompts.wants(prompt)
        prompts.add(prompt, prompt)
    longer = (*first[0], 7)
    prompts.add(longer, longer)  # which serves the pin as well
    assert [prompts.find(prompt, Work(prompt))[1] for prompt in first] == [19] * 16
    del pins[4:]
    assert [prompts.find(prompt, Work(prompt))[1] for prompt in first] == [19] * 4 + [0] * 12
    pins.clear()
    prompts.trim()  # as a request that ends does
    assert not prompts._kept
    off = KeptPrompts(Recited(), 0)
    pin = off.pin(first[0])
    assert not off.wants(pin.prompt)


def test_a_cancelled_request_ends_and_the_others_go_on(engine: TransformersEngine, alone: list[Any]) -> None:
    cancelled, asked = threading.Event(), []

    def check() -> None:
        asked.append(1)
        if len(asked) == 5:
            cancelled.set()
        check_wanted(cancelled, None)

    with ThreadPoolExecutor(2) as pool:
        other = pool.submit(engine.draw, work(engine, TEXTS[3]))
        with pytest.raises(RequestCancelledError):
            engine.draw(work(engine, TEXTS[0]), Hooks(check=check))
        assert ids(other.result()) == alone[3]
    assert len(asked) == 5  # it is asked before every token, and never again
    assert not engine._batch.has_work


@pytest.mark.parametrize("where", ["forward", "begin"])
def test_a_step_that_fails_fails_its_requests_alone(
    engine: TransformersEngine, alone: list[Any], where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise MemoryError("no room for a step")

    with monkeypatch.context() as patched:
        patched.setattr(engine._batch._model, where, broken)
        with pytest.raises(MemoryError, match="no room"):
            engine.draw(work(engine, "a text that nothing before began like"))
    assert ids(engine.draw(work(engine, TEXTS[0]))) == alone[0]


def test_the_error_of_a_failed_step_holds_no_keys_and_values(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the cyclic collector; nor does what the error came from."""
    forward, kept = engine._batch._model.forward, []

    def fails(feeds: Sequence[Feed]) -> list[torch.Tensor]:
        logits = forward(feeds)
        kept.extend(weakref.ref(tensor) for feed in feeds for tensor in tensors_of(feed.kept))
        try:
            raise ZeroDivisionError
        except ZeroDivisionError as error:
            raise MemoryError(f"no room for {len(logits)}") from error

    monkeypatch.setattr(engine._batch._model, "forward", fails)
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(MemoryError) as raised:
            engine.draw(work(engine, "another text that nothing before began like"))
        monkeypatch.undo()
        engine.draw(work(engine, TEXTS[1], max_tokens=1))  # by now the other thread has left the step that failed
        assert raised.traceback[-1].name == "fails"  # where it was raised stays told
        assert kept
        assert [tensor() for tensor in kept] == [None] * len(kept)
    finally:
        gc.enable()


def tensors_of(kept: Any) -> list[torch.Tensor]:
    """The keys and values of a request, packed or in transformers' cache."""
    if isinstance(kept, Kept):
        return list(kept._layers.values())
    return [layer.keys for layer in kept["cache"].layers]


def test_text_is_told_as_it_settles_and_never_taken_back(engine: TransformersEngine, alone: list[Any]) -> None:
    told: dict[int, list[str]] = {place: [] for place in range(6)}
    reasons: dict[int, str] = {}

    def on_text(index: int, text: str, reason: str | None) -> None:
        assert index not in reasons
        told[index].append(text)
        if reason is not None:
            reasons[index] = reason

    stop = ("ab", "return", "\n")
    drawn = engine.draw(work(engine, TEXTS[0], stop=stop), Hooks(on_text=on_text, streams_text=True))
    for place, sample in enumerate(drawn.samples):
        assert sample is not None
        assert "".join(told[place]) == sample.text
        assert reasons[place] == sample.finish_reason
    assert max(map(len, told.values())) > 2


def test_a_listener_that_fails_ends_its_request(engine: TransformersEngine) -> None:
    def on_text(index: int, text: str, reason: str | None) -> None:
        raise ConnectionResetError("the client is gone")

    with pytest.raises(ConnectionResetError):
        engine.draw(work(engine, TEXTS[0], max_tokens=100), Hooks(on_text=on_text, streams_text=True))
    engine.draw(work(engine, TEXTS[1], max_tokens=1))  # by the step that answers this, the other was given up
    assert not engine._batch.has_work


def test_the_rest_is_left_undrawn_when_there_is_enough(engine: TransformersEngine, alone: list[Any]) -> None:
    seen: list[int] = []

    def enough(ended: Sequence[tuple[Completion, int]], begun: Sequence[tuple[tuple[int, ...], int]]) -> bool:
        assert sum(count for _, count in (*ended, *begun)) == 12
        seen.append(sum(count for _, count in ended))
        return seen[-1] >= 2

    stop = ("a", "e", "i", "o", "u")
    whole = ids(engine.draw(work(engine, TEXTS[0], n=12, stop=stop)))
    drawn = ids(engine.draw(work(engine, TEXTS[0], n=12, stop=stop), Hooks(enough=enough)))
    assert 2 <= sum(sample is not None for sample in drawn) < 12
    assert all(sample in (None, other) for sample, other in zip(drawn, whole, strict=True))


def test_a_token_may_end_a_sample(engine: TransformersEngine, alone: list[Any]) -> None:
    free = alone[0][0]
    ended = engine.draw(work(engine, TEXTS[0], stop_token_ids=frozenset({free[4]}))).samples[0]
    assert ended is not None
    assert ended.ids == free[: free.index(free[4])]
    assert ended.finish_reason == "stop"


def test_a_model_that_nobody_holds_is_freed_and_its_thread_ends(tmp_path: Path) -> None:
    """An evicted model's weights would otherwise stay in memory for ever."""
    engine = TransformersEngine(save_model(tmp_path, "llama", window=64))
    engine.draw(work(engine, "df"))
    turns = weakref.ref(engine._batch._turns)
    model = weakref.ref(engine._batch._model)
    thread = engine._batch._turns._thread
    assert thread is not None
    del engine
    gc.collect()
    thread.join(30)
    gc.collect()
    assert not thread.is_alive()
    assert model() is None
    assert turns() is None


BUSY_AT_THE_END = """
import threading
import torch
from cert_ray.serving.batching import Turns

class Busy:
    has_work = True
    def step(self):
        began.set()
        for _ in range(20):
            square @ square

began, square, busy, turns = threading.Event(), torch.ones(1500, 1500), Busy(), Turns()
turns.join(busy)
turns.wake()
began.wait()
print("answered")
"""


@pytest.mark.slow
def test_a_process_that_ends_within_a_step_is_not_aborted() -> None:
    ended = subprocess.run([sys.executable, "-c", BUSY_AT_THE_END], capture_output=True, text=True, timeout=120)
    assert (ended.stdout, ended.stderr, ended.returncode) == ("answered\n", "", 0)
