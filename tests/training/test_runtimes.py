"""Other runtimes, where they are installed, give an export's logits."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from cert_ray.serving.answering import load_engine
from cert_ray.serving.engines import EngineConfig, Work
from cert_ray.tokens.vocabulary import TokenizerConfig, save_tokenizer, train_vocabulary
from cert_ray.training.presets import preset_config
from tests.serving.builders import small_tokenizer
from tests.serving.test_vllm_engine import runs_vllm

ROOT = Path(__file__).parents[2]
SOURCE = "import numpy as np\nx = np.zeros(3)\n"


@pytest.fixture
def export(tmp_path: Path) -> tuple[str, list[int], torch.Tensor]:
    """A Llama export, tokens of a text, and transformers' logits [T, V] for them."""
    return _export(tmp_path / "model", small_tokenizer())


def _export(folder: Path, tokenizer: Tokenizer) -> tuple[str, list[int], torch.Tensor]:
    torch.manual_seed(0)
    config = preset_config("modern-tiny", tokenizer.get_vocab_size(), 128, 0, 1)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():  # far enough from uniform that a wrong rotation shows
        torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, str(folder), 128)
    ids = tokenizer.encode(SOURCE).ids
    with torch.no_grad():
        return str(folder), ids, model(torch.tensor([ids])).logits[0]


def test_ctranslate2_gives_the_logits_of_a_llama_export(
    tmp_path: Path, export: tuple[str, list[int], torch.Tensor]
) -> None:
    ctranslate2 = pytest.importorskip("ctranslate2")
    folder, ids, expected_TV = export
    converted = ctranslate2.converters.TransformersConverter(folder).convert(str(tmp_path / "converted"))
    generator = ctranslate2.Generator(converted, device="cpu", compute_type="float32", intra_threads=1)
    found = np.array(generator.forward_batch([[small_tokenizer().id_to_token(number) for number in ids]]))[0]
    np.testing.assert_allclose(found[:, : expected_TV.shape[1]], expected_TV.numpy(), atol=1e-3)


@pytest.mark.slow
@pytest.mark.skipif("LLAMA_CPP" not in os.environ, reason="LLAMA_CPP does not name llama.cpp's source; docs/models.md")
def test_llama_cpp_gives_the_logits_and_the_tokens_of_a_llama_export(tmp_path: Path) -> None:
    """By the lines of the docs, with a tokenizer as `cert-ray tokenizer` trains it."""
    llama_cpp = pytest.importorskip("llama_cpp")
    ours = [path.read_text() for path in sorted((ROOT / "cert_ray").rglob("*.py"))]
    tokenizer = train_vocabulary(ours, TokenizerConfig(vocab_size=2000))
    folder, ids, expected_TV = _export(tmp_path / "model", tokenizer)
    lines = re.search(r"```python\n(.*?)```", (ROOT / "docs/models.md").read_text(), re.DOTALL)
    assert lines is not None
    (tmp_path / "to_gguf.py").write_text(lines[1])
    file = str(tmp_path / "model.gguf")
    subprocess.run([sys.executable, tmp_path / "to_gguf.py", os.environ["LLAMA_CPP"], folder, file], check=True)
    fp32 = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
    model = llama_cpp.Llama(file, n_ctx=128, logits_all=True, verbose=False, n_threads=1, **fp32)
    try:
        model.eval(ids)
        found = np.array(model.scores)[: len(ids), : expected_TV.shape[1]]
        np.testing.assert_allclose(found, expected_TV.numpy(), atol=2e-4)
        lines_of_code = [line for text in ours for line in text.splitlines() if line]
        same = sum(model.tokenize(line.encode(), add_bos=False) == tokenizer.encode(line).ids for line in lines_of_code)
        assert same / len(lines_of_code) > 0.999  # an apostrophe before s, t, re, ve, m, ll or d may be split otherwise
    finally:
        model.close()


@runs_vllm
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed; docs/engine.md says how")
def test_vllm_gives_the_log_probabilities_of_a_llama_export(export: tuple[str, list[int], torch.Tensor]) -> None:
    folder, ids, logits_TV = export
    expected = [float(row[token]) for row, token in zip(logits_TV.log_softmax(-1), ids[1:], strict=False)]
    engine: Any = load_engine(folder, EngineConfig(kind="vllm", kv_cache_gib=0.25))
    try:
        scored = engine.draw(Work(tuple(ids), max_tokens=0, logprobs=0, score_prompt=True)).prompt_logprobs
    finally:
        engine.close()
    assert "".join(scored.tokens) == SOURCE
    assert scored.token_logprobs[1:] == pytest.approx(expected, abs=1e-3)
