"""What the vLLM engine asks of vLLM and reads from it, with a fake in vLLM's place: vLLM itself was not run."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from cert_ray.errors import ConfigError, RequestCancelledError, RequestError
from cert_ray.serving.answering import load_engine
from cert_ray.serving.engines import EngineConfig, Hooks, Work
from cert_ray.sketching import prompt_format
from tests.serving.builders import save_model


class FakeLLM:
    """Draws the text ` df\\n#` n times; what it was asked stands in `asked`."""

    def __init__(self, tokenizer: Any) -> None:
        self.asked: list[tuple[Any, Any]] = []
        self.aborted: list[str] = []
        self._tokenizer = tokenizer

    async def generate(self, prompt: Any, options: Any, request_id: str) -> AsyncIterator[Any]:
        self.asked.append((prompt, options))
        ids = prompt_format.encode_code(self._tokenizer, " df\n#")
        rows = [{token: SimpleNamespace(logprob=-0.5)} for token in ids]
        one = {"token_ids": ids, "logprobs": rows, "finish_reason": "stop"}
        outputs = [SimpleNamespace(index=place, **one) for place in reversed(range(options.n))]
        yield SimpleNamespace(outputs=outputs, num_cached_tokens=3)

    async def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[FakeLLM, str]:
    from tokenizers import Tokenizer

    folder = save_model(tmp_path, "llama")
    llm = FakeLLM(Tokenizer.from_file(f"{folder}/tokenizer.json"))
    vllm, engine = ModuleType("vllm"), ModuleType("vllm.v1.engine.async_llm")
    vllm.AsyncEngineArgs = SimpleNamespace  # type: ignore[attr-defined]
    vllm.SamplingParams = SimpleNamespace  # type: ignore[attr-defined]
    engine.AsyncLLM = SimpleNamespace(from_engine_args=lambda _: llm)  # type: ignore[attr-defined]
    for name, module in (("vllm", vllm), ("vllm.v1.engine.async_llm", engine)):
        monkeypatch.setitem(sys.modules, name, module)
    return llm, folder


def test_samples_are_cut_and_in_order(fake: tuple[FakeLLM, str]) -> None:
    llm, folder = fake
    engine = load_engine(folder, EngineConfig(kind="vllm"))
    drawn = engine.draw(Work((5, 6), n=3, max_tokens=500, seed=4, stop=("\n#",), logprobs=0))
    assert [sample and (sample.text, sample.finish_reason) for sample in drawn.samples] == [(" df", "stop")] * 3
    assert drawn.samples[0] is not None
    assert drawn.samples[0].mean_logprob == -0.5
    assert drawn.samples[0].logprobs is not None
    assert "".join(drawn.samples[0].logprobs.tokens) == " df"
    assert drawn.cached_tokens == 3
    prompt, options = llm.asked[0]
    assert prompt == {"prompt_token_ids": [5, 6]}
    assert (options.n, options.seed, options.stop, options.max_tokens) == (3, 4, ["\n#"], 62)


def test_work_nobody_wants_is_aborted(fake: tuple[FakeLLM, str]) -> None:
    llm, folder = fake

    def check() -> None:
        raise RequestCancelledError(499, "gone", None, "cancelled")

    with pytest.raises(RequestCancelledError):
        load_engine(folder, EngineConfig(kind="vllm")).draw(Work((5,)), Hooks(check=check))
    assert len(llm.aborted) == 1


def test_what_it_cannot_do_is_refused(fake: tuple[FakeLLM, str]) -> None:
    engine = load_engine(fake[1], EngineConfig(kind="vllm"))
    with pytest.raises(RequestError, match="64 tokens"):
        engine.draw(Work(tuple(range(64))))
    with pytest.raises(RequestError, match="score"):
        engine.draw(Work((5,), score_prompt=True))


def test_without_vllm_the_extra_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cert-ray\[vllm\]"):
        load_engine(save_model(tmp_path), EngineConfig(kind="vllm"))
