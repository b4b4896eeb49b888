"""Requests that attend together are answered as those that attend one by one, and slots come back."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from cert_ray.gpt_neo import fuse_attention
from cert_ray.serving import gathered_attention, packed_attention, transformers_engine
from cert_ray.serving.engines import EngineConfig, Work
from cert_ray.serving.gathered_attention import Arena, GatheredStep, Slots
from cert_ray.serving.packed_attention import Feed, Kept
from cert_ray.serving.transformers_engine import TransformersEngine
from cert_ray.sketching import prompt_format
from tests.serving.builders import save_model

TEXTS = [
    "import pandas as pd\n\n\ndef head(df, n):\n",
    "df",
    "import pandas as pd\n\n\nclass Thing:\n",
    "x = df['a']\n",
]


@pytest.fixture(scope="module", params=["gpt_neo", "llama", "gpt2", "mistral"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """GPT-Neo and Mistral have windows, Llama and Mistral share key heads."""
    return save_model(tmp_path_factory.mktemp(request.param), request.param, window=128)


@pytest.fixture
def gathering(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers_engine, "gathers", lambda _: True)


def test_logits_of_random_trees_are_the_same(folder: str) -> None:
    """Many requests at once, of other lengths, that branch, die, and are fed drafts which are not drawn."""
    model = fuse_attention(AutoModelForCausalLM.from_pretrained(folder)).eval()
    assert packed_attention.enable(model)
    arena, rng = Arena(), np.random.default_rng(0)
    sizes = [3, 40, 9, 17, 1]
    apart, together = [Kept() for _ in sizes], [Slots(arena) for _ in sizes]
    rows = [1] * len(sizes)
    for step in range(14):
        plans: list[dict[str, Any]] = []
        for place, size in enumerate(sizes):
            if step == place % 2:  # some prompts come beside others' tokens
                plans.append({"tokens": rng.integers(2, 300, size).tolist()})
            elif step > place % 2:
                branches = int(rng.integers(1, 7)) if step % 5 else 1
                runs = rng.integers(1, 4, branches).tolist()
                tokens = rng.integers(2, 300, sum(runs)).tolist()
                plans.append(
                    {"tokens": tokens, "parents": rng.integers(0, rows[place], branches).tolist(), "runs": runs}
                )
                rows[place] = sum(runs)
            else:
                plans.append({})
        used = [place for place, plan in enumerate(plans) if plan]
        expected = packed_attention.forward(model, [Feed(apart[place], **plans[place]) for place in used])
        found = packed_attention.forward(
            model,
            [Feed(together[place], **plans[place]) for place in used],
            lambda parts: GatheredStep(parts, arena, torch.device("cpu")),
        )
        for one, other in zip(expected, found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert arena.used == sum(len(kept) for kept in together)


def test_samples_are_those_of_requests_that_attend_one_by_one(
    folder: str, gathering: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answers(engine: TransformersEngine) -> list[Any]:
        works = [
            Work(tuple(prompt_format.encode_code(engine.tokenizer, text)), n=6, max_tokens=30, temperature=0.9, seed=7)
            for text in TEXTS
        ]
        works.append(replace(works[0], n=40, temperature=1.5, stop=("a", "e", "(", "7")))  # most end early
        works.append(replace(works[2], draft=(5, 6, 7, 8)))
        with ThreadPoolExecutor(6) as pool:
            return [[sample and sample.ids for sample in drawn.samples] for drawn in pool.map(engine.draw, works)]

    together = TransformersEngine(folder, EngineConfig(prefill_tokens=5))
    assert together.is_packed
    found = answers(together)
    monkeypatch.setattr(transformers_engine, "gathers", lambda _: False)
    assert found == answers(TransformersEngine(folder, EngineConfig(prefill_tokens=5)))


def test_a_prompt_shares_its_slots_and_the_last_user_frees_them() -> None:
    arena = Arena()
    first = Slots(arena)
    first.read(10, 0)
    first.extend(10)
    second = first.beginning(6)
    second.read(3, 0)
    second.extend(3)
    assert arena.used == 13
    assert second.numbers[:6].tolist() == first.numbers[:6].tolist()
    assert not set(second.numbers[6:]) & set(first.numbers)
    del first
    assert arena.used == 9
    kept = second.numbers.copy()
    second.select(torch.tensor([0, 1, 8]))
    assert second.numbers.tolist() == kept[[0, 1, 8]].tolist()
    assert arena.used == 3
    del second
    assert arena.used == 0


def test_an_arena_grows_and_keeps_what_it_holds() -> None:
    arena = Arena()
    slots = arena.take(4_000)
    like = torch.zeros(2, 1, 3)
    arena.layer(0, like)[torch.from_numpy(slots)] = torch.arange(4_000.0)[:, None, None, None]
    more = arena.take(5_000)
    assert not set(slots.tolist()) & set(more.tolist())
    grown = arena.layer(0, like)
    assert len(grown) >= arena.capacity >= 9_000
    assert torch.equal(grown[torch.from_numpy(slots), 1, 1, 2], torch.arange(4_000.0))


def test_where_memory_is_short_an_arena_stays_as_it_is_and_goes_on_when_slots_are_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def short(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("no room for it")

    arena, like = Arena(), torch.zeros(2, 1, 3)
    held = arena.take(4_000)
    arena.layer(0, like)
    capacity = arena.capacity
    with monkeypatch.context() as full:
        full.setattr(gathered_attention, "_larger", short)
        with pytest.raises(torch.OutOfMemoryError):
            arena.take(5_000)
        assert (arena.used, arena.capacity, len(arena.take(50))) == (4_000, capacity, 50)
    arena.take(5_000)
    assert arena.used == 9_050
    arena.release(held)
    assert len(arena.layer(0, like)) >= arena.capacity


def test_an_arena_that_holds_nothing_is_as_small_as_a_new_one() -> None:
    arena = Arena()
    many = arena.take(50_000)
    assert len(arena.layer(0, torch.zeros(2, 1, 3))) >= 50_000
    arena.release(many)
    arena.give_back()
    arena.take(10)
    assert len(arena.layer(0, torch.zeros(2, 1, 3))) == arena.capacity < 5_000


def held(arena: Arena, tokens: int) -> Slots:
    """A request, with the numbers of its slots in every place of its keys and values."""
    request = Slots(arena)
    request.read(tokens, 0)
    slots = torch.from_numpy(request.extend(tokens))
    arena.layer(0, torch.zeros(2, 1, 3))[slots] = slots[:, None, None, None].float()
    return request


def kept(arena: Arena, request: Slots) -> list[float]:
    return arena.layer(0, torch.empty(0))[torch.from_numpy(request.numbers), 1, 1, 2].tolist()


def test_a_prompt_that_is_kept_does_not_hold_a_bursts_memory() -> None:
    """It stood behind the burst, and those that share its slots move with it."""
    arena = Arena()
    before, burst, prompt = held(arena, 100), [held(arena, 5_000) for _ in range(10)], held(arena, 300)
    sharing = prompt.beginning(200)
    expected = [kept(arena, request) for request in (before, prompt, sharing)]
    arena.give_back()
    assert arena.capacity > 50_000  # nothing to give
    gone = burst.pop()
    burst.clear()
    arena.give_back()
    assert arena.used == 5_400
    assert [kept(arena, request) for request in (before, prompt, sharing)] == expected
    assert len(arena.layer(0, torch.empty(0))) == arena.capacity == 2 * 5_400
    del gone, before
    arena.give_back()
    assert arena.capacity == 2 * 5_400  # too little for the copying
    more = held(arena, 6_000)
    assert not set(more.numbers) & set(prompt.numbers)
    assert prompt.numbers[:200].tolist() == sharing.numbers.tolist()
    assert [kept(arena, request) for request in (prompt, sharing)] == expected[1:]
    assert arena.used == 6_300


def test_where_memory_is_short_nothing_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    arena = Arena()
    burst, prompt = held(arena, 50_000), held(arena, 300)
    expected = prompt.numbers.tolist()
    del burst
    with monkeypatch.context() as full:

        def short(*_: object) -> torch.Tensor:
            raise torch.OutOfMemoryError("no room for it")

        full.setattr(torch.Tensor, "new_empty", short)
        arena.give_back()
    assert (prompt.numbers.tolist(), kept(arena, prompt)) == (expected, expected)
    assert arena.capacity > 50_000
    arena.give_back()
    assert (arena.used, kept(arena, prompt)) == (300, expected)
    assert arena.capacity < 5_000


def test_samples_are_the_same_while_memory_is_given_back(
    folder: str, gathering: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slots move at once where most are free: between the steps of requests whose samples end one by one."""
    monkeypatch.setattr(gathered_attention, "_LEAST_SLOTS", 4)
    given: list[int] = []
    give_back = Arena.give_back

    def noted(arena: Arena) -> None:
        before = arena.capacity
        give_back(arena)
        given.extend([arena.used] * (arena.capacity < before))

    monkeypatch.setattr(Arena, "give_back", noted)

    def answers(engine: TransformersEngine) -> list[Any]:
        works = [
            Work(tuple(prompt_format.encode_code(engine.tokenizer, text)), n=40, temperature=1.5, seed=seed)
            for seed in range(2)
            for text in TEXTS
        ]
        works = [replace(one, max_tokens=40, stop=("a", "e", "(", "7", "=", "\n")) for one in works]
        with ThreadPoolExecutor(4) as pool:
            return [[sample and sample.ids for sample in drawn.samples] for drawn in pool.map(engine.draw, works)]

    together = TransformersEngine(folder, EngineConfig(prefix_cache_tokens=30))
    found = answers(together)
    assert any(given)  # with requests or prompts that went on
    monkeypatch.setattr(transformers_engine, "gathers", lambda _: False)
    assert found == answers(TransformersEngine(folder, EngineConfig(prefix_cache_tokens=30)))


def test_what_is_not_finite_stays_with_its_own_request(tmp_path: Path) -> None:
    """As overflows in fp16 are; it has slot 0."""
    model = AutoModelForCausalLM.from_pretrained(save_model(tmp_path, "llama", window=128)).eval()
    assert packed_attention.enable(model)
    arena = Arena()
    arena.take(gathered_attention._LEAST_SLOTS - 9)
    requests = [Slots(arena) for _ in range(3)]

    def forward(feeds: list[Feed]) -> list[torch.Tensor]:
        return packed_attention.forward(model, feeds, lambda parts: GatheredStep(parts, arena, torch.device("cpu")))

    forward([Feed(kept, [3] * length) for kept, length in zip(requests, (9, 4, 7), strict=True)])
    assert 0 in requests[0].numbers
    with torch.inference_mode():
        for layer in range(model.config.num_hidden_layers):
            arena.layer(layer, torch.empty(0))[torch.from_numpy(requests[0].numbers)] = torch.nan
    found = forward([Feed(kept, [5, 6], [0, 0], runs=[1, 1]) for kept in requests])
    assert [bool(logits.isnan().any()) for logits in found] == [True, False, False]


def test_long_and_short_requests_are_not_padded_to_each_other() -> None:
    arena = Arena()
    parts = []
    for tokens in (8_000, *[100] * 200):
        kept = Slots(arena)
        kept.read(tokens, 0)
        kept.extend(tokens)
        parts.append(packed_attention.Part(kept, 0, 1, prompt=False))
    groups = gathered_attention._alike(parts)
    assert sorted(map(len, groups)) == [1, 200]
    assert sum(len(group) * max(len(part.kept) for part in group) for group in groups) == 8_000 + 200 * 100
    most = gathered_attention._MOST_GATHERED
    assert all(len(group) * 128 <= most for group in gathered_attention._alike(parts[1:] * 20))


def test_requests_that_have_ended_hold_no_slot(tmp_path: Path, gathering: None) -> None:
    engine = TransformersEngine(save_model(tmp_path, "llama", window=128), EngineConfig(prefix_cache_tokens=0))
    arena = engine._batch._model._arena  # type: ignore[attr-defined]
    for text in TEXTS:
        ids = tuple(prompt_format.encode_code(engine.tokenizer, text))
        engine.draw(Work(ids, n=5, max_tokens=20, temperature=1.0))
    deadline = time.monotonic() + 60  # the thread that steps may still hold its last step
    while arena.used and time.monotonic() < deadline:
        time.sleep(0.01)
    assert arena.used == 0
