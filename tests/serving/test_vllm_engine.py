"""The vLLM engine: what it makes of what vLLM says, a fake in its place; and vLLM itself, where it is installed.

vLLM is no part of the development extra: it wants an older transformers than the one tested here. docs/engine.md says
how the last tests are run.
"""

from __future__ import annotations

import asyncio
import gc
import importlib.util
import os
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from scipy.stats import chi2_contingency
from tokenizers import Tokenizer

from cert_ray.errors import ConfigError, DeadlineError, RequestCancelledError, RequestError
from cert_ray.serving import vllm_engine
from cert_ray.serving.answering import load_engine
from cert_ray.serving.constraints import Template
from cert_ray.serving.engines import Completion, Drawn, EngineConfig, Hooks, Work
from cert_ray.serving.replicas import Engines
from cert_ray.sketching import prompt_format
from tests.serving.builders import save_model

HAS_VLLM = importlib.util.find_spec("vllm") is not None


def runs_vllm(test: Any) -> Any:
    """Marks a test that starts vLLM, which warns of much in other libraries and compiles the model first."""
    return pytest.mark.slow(pytest.mark.timeout(600)(pytest.mark.filterwarnings("ignore")(test)))


class FakeLLM:
    """Draws the tokens of ` df\\n#`, one at a time and then nothing more, as vLLM says it with output kind DELTA."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.asked: list[tuple[Any, Any]] = []
        self.aborted: list[str] = []
        self.is_shut_down = False
        self.error: Exception | None = None
        self.logprob = -0.5
        self.options: Any = None  # what it was started with
        self.finish: str | None = None  # what a request is said to have ended by behind its tokens; None: it goes on
        self.slow: frozenset[int] = frozenset()  # samples that get no further than their first token
        self.hangs: Callable[[], None] | None = None  # called by a request that is told nothing
        self._ids = prompt_format.encode_code(tokenizer, " df\n#")

    async def generate(self, prompt: Any, options: Any, request_id: str) -> AsyncIterator[Any]:
        self.asked.append((prompt, options))
        if self.hangs is not None:
            self.hangs()
            await asyncio.sleep(3600)
        sample = int(request_id.rpartition("-")[2])
        scores = None
        if options.prompt_logprobs is not None:
            scores = [
                None,
                *({token: SimpleNamespace(logprob=-float(token))} for token in prompt["prompt_token_ids"][1:]),
            ]
        try:
            for token in self._ids:
                await asyncio.sleep(0)
                yield self._said([token], sample, scores)
                scores = None
                if sample in self.slow:
                    await asyncio.sleep(3600)
            if self.error is not None:
                raise self.error
            if self.finish is not None:
                yield self._said([], sample, None, self.finish)
                return
            await asyncio.sleep(3600)  # until nobody listens
        except (asyncio.CancelledError, GeneratorExit):
            self.aborted.append(request_id)
            raise

    def _said(self, ids: Sequence[int], sample: int, scores: Any, finish: str | None = None) -> Any:
        rows = [{token: SimpleNamespace(logprob=self.logprob)} for token in ids]
        one = SimpleNamespace(index=0, token_ids=ids, logprobs=rows, finish_reason=finish)
        cached = 1 if sample == 0 else 3  # all but the first find the first one's blocks
        return SimpleNamespace(
            outputs=[one], num_cached_tokens=cached, finished=finish is not None, prompt_logprobs=scores
        )

    def start(self, options: Any) -> FakeLLM:
        """As `AsyncLLM.from_engine_args`."""
        self.options = options
        return self

    def shutdown(self) -> None:
        self.is_shut_down = True


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[FakeLLM, str]:
    folder = save_model(tmp_path, "llama")
    llm = FakeLLM(Tokenizer.from_file(f"{folder}/tokenizer.json"))
    vllm, engine = ModuleType("vllm"), ModuleType("vllm.v1.engine.async_llm")
    platforms = ModuleType("vllm.platforms")
    platforms.current_platform = SimpleNamespace(is_cpu=lambda: True)  # type: ignore[attr-defined]
    vllm.AsyncEngineArgs = SimpleNamespace  # type: ignore[attr-defined]
    vllm.SamplingParams = SimpleNamespace  # type: ignore[attr-defined]
    vllm.sampling_params = SimpleNamespace(RequestOutputKind=SimpleNamespace(DELTA=1))  # type: ignore[attr-defined]
    engine.AsyncLLM = SimpleNamespace(from_engine_args=llm.start)  # type: ignore[attr-defined]
    for module in (vllm, engine, platforms):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for name in ("VLLM_USE_V2_MODEL_RUNNER", "VLLM_NO_USAGE_STATS"):
        monkeypatch.setenv(name, "")  # so that it is taken away again
        monkeypatch.delenv(name)
    return llm, folder


@pytest.fixture
def engine(fake: tuple[FakeLLM, str]) -> Iterator[Any]:
    loaded: Any = load_engine(fake[1], EngineConfig(kind="vllm"))
    yield loaded
    loaded.close()


def texts(drawn: Drawn) -> list[str | None]:
    return [sample and sample.text for sample in drawn.samples]


def test_samples_are_cut_and_vllm_draws_no_more_of_them(fake: tuple[FakeLLM, str], engine: Any) -> None:
    llm = fake[0]
    drawn = engine.draw(Work((5, 6), n=3, max_tokens=500, seed=4, stop=("\n#",), logprobs=0))
    assert [sample and (sample.text, sample.finish_reason) for sample in drawn.samples] == [(" df", "stop")] * 3
    first = drawn.samples[0]
    assert first is not None
    assert first.mean_logprob == -0.5
    assert first.logprobs is not None
    assert "".join(first.logprobs.tokens) == " df"
    assert drawn.cached_tokens == 1  # by the sample that was read first
    assert [prompt for prompt, _ in llm.asked] == [{"prompt_token_ids": [5, 6]}] * 3
    assert {options.max_tokens for _, options in llm.asked} == {62}
    engine.draw(Work((5, 6), stop=("\n#",)))  # what was aborted is, when another was answered
    assert len(llm.aborted) >= 3


def test_each_sample_has_its_own_seed_and_the_same_one_the_next_time(fake: tuple[FakeLLM, str], engine: Any) -> None:
    llm = fake[0]

    def seeds(work: Work) -> list[int]:
        llm.asked.clear()
        engine.draw(work)
        return [options.seed for _, options in llm.asked]

    work = Work((5, 6), n=4, seed=4, stop=("\n#",))
    assert len(set(seeds(work))) == 4
    assert seeds(work) == seeds(work)
    assert set(seeds(work)).isdisjoint(seeds(Work((5, 7), n=4, seed=4, stop=("\n#",))))
    repeated = seeds(Work((5, 6), n=4, seed=4, stop=("\n#",), streams=2))  # the released code's fault, asked for
    assert repeated == repeated[:2] * 2


def test_text_is_told_as_it_settles(engine: Any) -> None:
    told: list[tuple[int, str, str | None]] = []
    hooks = Hooks(on_text=lambda *news: told.append(news), streams_text=True)
    engine.draw(Work((5,), n=2, stop=("\n#",)), hooks)
    for sample in (0, 1):
        assert "".join(text for index, text, _ in told if index == sample) == " df"
        assert [reason for index, _, reason in told if index == sample][-1] == "stop"


def test_samples_beyond_enough_are_left_out(fake: tuple[FakeLLM, str], engine: Any) -> None:
    fake[0].slow = frozenset({1, 3})

    def enough(ended: Sequence[tuple[Completion, int]], begun: Sequence[tuple[tuple[int, ...], int]]) -> bool:
        assert len(ended) + len(begun) == 4
        return len(ended) >= 2

    drawn = engine.draw(Work((5,), n=4, stop=("\n#",)), Hooks(enough=enough))
    assert texts(drawn) == [" df", None, " df", None]


def test_work_nobody_wants_is_aborted(fake: tuple[FakeLLM, str], engine: Any) -> None:
    llm = fake[0]

    def check() -> None:
        if llm.asked:
            raise RequestCancelledError(499, "gone", None, "cancelled")

    with pytest.raises(RequestCancelledError):
        engine.draw(Work((5,)), Hooks(check=check))
    engine.draw(Work((5,), stop=("\n#",)))
    assert llm.aborted


def test_what_ends_vllm_is_raised(fake: tuple[FakeLLM, str], engine: Any) -> None:
    llm = fake[0]
    llm.error = RuntimeError("its process is gone")
    with pytest.raises(RuntimeError, match="process is gone"):
        engine.draw(Work((5,)))


def test_a_vllm_that_says_nothing_to_those_who_wait_is_not_healthy(
    fake: tuple[FakeLLM, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm, folder = fake
    now_s = 0.0

    def advance(seconds: float) -> None:
        nonlocal now_s
        now_s += seconds

    monkeypatch.setattr(vllm_engine, "time", SimpleNamespace(monotonic=lambda: now_s), raising=False)
    engines = Engines({"model": folder, "engine": {"kind": "vllm"}})

    def ask(seed: int, timeout_s: float) -> None:
        assert asyncio.run(engines.answer("cert", ["x ="], {"max_tokens": 2, "seed": seed}, timeout_s))

    llm.hangs, llm.finish = lambda: advance(70), "length"
    with pytest.raises(DeadlineError):
        ask(1, 0.5)
    advance(1_000)  # in which nobody waited
    engines.check_health()
    with pytest.raises(DeadlineError):
        ask(2, 0.5)
    with pytest.raises(RuntimeError, match="hangs: its step takes 140 s"):
        engines.check_health()
    llm.hangs = None
    ask(3, 60)
    engines.check_health()


@pytest.mark.parametrize("finish", ["abort", "error"])
def test_what_vllm_gives_up_is_no_answer(fake: tuple[FakeLLM, str], engine: Any, finish: str) -> None:
    fake[0].finish = finish
    with pytest.raises(RuntimeError, match=finish):
        engine.draw(Work((5,)))


def test_what_vllm_ends_at_the_limit_is_an_answer(fake: tuple[FakeLLM, str], engine: Any) -> None:
    fake[0].finish = "length"
    (sample,) = engine.draw(Work((5,))).samples
    assert (sample.text, sample.finish_reason) == (" df\n#", "length")


def test_numbers_that_are_not_finite_are_an_error(fake: tuple[FakeLLM, str], engine: Any) -> None:
    fake[0].logprob = float("nan")
    with pytest.raises(RequestError, match="not finite"):
        engine.draw(Work((5,)))


@pytest.mark.parametrize("max_tokens", [0, 2])
def test_a_prompt_is_scored_once(fake: tuple[FakeLLM, str], engine: Any, max_tokens: int) -> None:
    work = Work((5, 6, 7), n=2, max_tokens=max_tokens, logprobs=0, score_prompt=True)
    scored = engine.draw(work).prompt_logprobs
    assert scored.token_logprobs == (None, -6.0, -7.0)
    assert [options.prompt_logprobs for _, options in fake[0].asked][:2] == [0, None][: 2 if max_tokens else 1]


def test_work_of_an_engine_that_is_closed_fails(fake: tuple[FakeLLM, str], engine: Any) -> None:
    def close(*_: object) -> None:
        engine.close()

    with pytest.raises(RuntimeError, match="closed"):
        engine.draw(Work((5,)), Hooks(on_text=close, streams_text=True))


def test_vllm_is_started_as_the_project_needs_it(fake: tuple[FakeLLM, str]) -> None:
    llm, folder = fake
    config = EngineConfig(kind="vllm", dtype="bfloat16", kv_cache_gib=0.5, max_rows=7, prefill_tokens=64)
    load_engine(folder, config).close()  # type: ignore[attr-defined]
    asked = llm.options
    assert (asked.dtype, asked.kv_cache_memory_bytes, asked.max_model_len) == ("bfloat16", 1 << 29, 64)
    assert (asked.max_num_seqs, asked.max_num_batched_tokens, asked.enable_chunked_prefill) == (7, 64, False)
    assert (os.environ["VLLM_USE_V2_MODEL_RUNNER"], os.environ["VLLM_NO_USAGE_STATS"]) == ("0", "1")
    with pytest.raises(ConfigError, match=r"engine.prefill_tokens=32 .* give 64 or more"):
        load_engine(folder, EngineConfig(kind="vllm", prefill_tokens=32))


def test_vllm_ends_with_its_engine(fake: tuple[FakeLLM, str]) -> None:
    llm, folder = fake
    engine = load_engine(folder, EngineConfig(kind="vllm"))
    engine.close()  # type: ignore[attr-defined]
    assert llm.is_shut_down
    with pytest.raises(RuntimeError, match="closed"):
        engine.draw(Work((5,)))
    llm.is_shut_down = False
    forgotten = load_engine(folder, EngineConfig(kind="vllm"))
    del forgotten
    gc.collect()
    assert llm.is_shut_down


def test_what_it_cannot_do_is_refused(engine: Any) -> None:
    with pytest.raises(RequestError, match="64 tokens"):
        engine.draw(Work(tuple(range(64))))
    with pytest.raises(RequestError, match="constrained"):
        engine.draw(Work((5,), template=Template(("a", "b"), ("number",), 0.001)))


@pytest.mark.skipif(HAS_VLLM, reason="vLLM is installed")
def test_without_vllm_the_extra_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cert-ray\[vllm\]"):
        load_engine(save_model(tmp_path), EngineConfig(kind="vllm"))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"kind": "vllm", "device": "cuda:1", "threads": 2}, r"device='cuda:1', threads=2.*kind='vllm'"),
        ({"kind": "transformers", "kv_cache_gib": 2.0}, r"kv_cache_gib=2.0.*kind='transformers'"),
    ],
)
def test_options_of_the_other_engine_are_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        EngineConfig.from_mapping(options, "a test")


def test_a_text_begins_with_the_blanks_that_were_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = ModuleType("vllm.v1.sample.logits_processor")
    module.AdapterLogitsProcessor = type(  # type: ignore[attr-defined]
        "AdapterLogitsProcessor", (), {"__init__": lambda *_: None}
    )
    monkeypatch.setitem(sys.modules, module.__name__, module)
    source = Path(vllm_engine.__file__).with_name("vllm_blanks.py")
    spec = importlib.util.spec_from_file_location("vllm_blanks_over_a_fake", source)
    assert spec is not None
    assert spec.loader is not None
    vllm_blanks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(vllm_blanks)
    folder = save_model(tmp_path, "llama")
    tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
    size = tokenizer.get_vocab_size()
    model = SimpleNamespace(tokenizer=folder, get_vocab_size=lambda: size)
    blanks = vllm_blanks.StartsWithBlanks(SimpleNamespace(model_config=model), "cpu", False)
    assert blanks.new_req_logits_processor(SimpleNamespace(extra_args=None)) is None
    restrict = blanks.new_req_logits_processor(SimpleNamespace(extra_args={"cert_ray_start": "\n    "}))
    drawn: list[int] = []
    text = ""
    while len(text) < len("\n    "):
        left_V = restrict(drawn, torch.zeros(size))
        allowed = [tokenizer.decode([token]) for token in range(size) if left_V[token] == 0]
        assert allowed
        assert all(one.startswith("\n    "[len(text) :]) or "\n    "[len(text) :].startswith(one) for one in allowed)
        drawn.append(int(left_V.argmax()))
        text = tokenizer.decode(drawn)
    assert text.startswith("\n    ")
    assert bool((restrict(drawn, torch.zeros(size)) == 0).all())


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any]]:
    """The two engines over one random model of a size that vLLM's kernels take, in fp32."""
    if not HAS_VLLM:
        pytest.skip("vLLM is not installed; docs/engine.md says how")
    folder = save_model(tmp_path_factory.mktemp("vllm"), "llama", hidden_size=64)
    vllm = load_engine(folder, EngineConfig(kind="vllm", kv_cache_gib=0.25))
    yield vllm, load_engine(folder, EngineConfig())
    vllm.close()  # type: ignore[attr-defined]


@runs_vllm
@pytest.mark.parametrize("start", ["", "\n    "])
def test_the_likeliest_tokens_are_those_of_the_other_engine(both: tuple[Any, Any], start: str) -> None:
    vllm, ours = both
    for prompt in ((5, 6, 7), (9,), tuple(range(10, 40))):
        work = Work(prompt, n=2, max_tokens=8, temperature=0.0, start=start, logprobs=2)
        mine, theirs = ours.draw(work), vllm.draw(work)
        for one, other in zip(mine.samples, theirs.samples, strict=True):
            assert (one.text, one.ids, one.finish_reason) == (other.text, other.ids, other.finish_reason)
            assert (one.blank_tokens, one.tokens) == (other.blank_tokens, other.tokens)
            told = other.logprobs.token_logprobs
            after = 1 if start else 0  # a first token behind blanks is told among those that may come there
            assert told[after:] == pytest.approx(one.logprobs.token_logprobs[after:], abs=1e-3)


@runs_vllm
def test_prompts_are_scored_alike(both: tuple[Any, Any]) -> None:
    vllm, ours = both
    for max_tokens in (0, 2):
        work = Work((5, 6, 7, 8), max_tokens=max_tokens, temperature=0.0, logprobs=1, score_prompt=True)
        mine, theirs = ours.draw(work), vllm.draw(work)
        assert texts(theirs) == texts(mine)
        assert theirs.prompt_logprobs.tokens == mine.prompt_logprobs.tokens
        assert theirs.prompt_logprobs.token_logprobs[1:] == pytest.approx(
            mine.prompt_logprobs.token_logprobs[1:], abs=1e-3
        )


@runs_vllm
def test_vllm_draws_from_the_same_distribution(both: tuple[Any, Any]) -> None:
    work = Work((5, 6, 7), n=4_000, max_tokens=1, temperature=0.3, top_p=0.8, seed=11)
    drawn = [[sample.ids[0] if sample.ids else -1 for sample in engine.draw(work).samples] for engine in both]
    often = [token for token in sorted(set(drawn[0] + drawn[1])) if (drawn[0] + drawn[1]).count(token) >= 20]
    table = [[tokens.count(token) for token in often] for tokens in drawn]
    assert len(often) > 5
    assert sum(table[1]) > 3_500
    assert chi2_contingency(table).pvalue > 1e-3  # the seed is given, and so is the p-value


@runs_vllm
def test_vllm_gives_the_same_samples_for_the_same_seed(both: tuple[Any, Any]) -> None:
    work = Work((5, 6, 7), n=20, max_tokens=6, temperature=0.8, seed=3)
    assert texts(both[0].draw(work)) == texts(both[0].draw(work))
    assert len(set(texts(both[0].draw(work)))) > 1
