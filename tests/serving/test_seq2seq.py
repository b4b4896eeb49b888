"""Sequence-to-sequence models as completers: tiny random ones of two families."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    PLBartConfig,
    PLBartForConditionalGeneration,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from cert_ray.errors import InputError, RequestError
from cert_ray.operations.sources import Source, complete_at
from cert_ray.serving.completers import CompleterConfig
from cert_ray.serving.seq2seq import Seq2SeqCompleter, is_seq2seq
from tests.serving.builders import save_model, small_tokenizer

PROMPTS = ["x =", "def f(df):\n    return "]
SAMPLED = CompleterConfig(max_tokens=8, temperature=1.0, seed=1)


def save_seq2seq(folder: Path, family: str) -> str:
    """A random model of some thousand parameters, and a tokenizer as transformers saves it."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=small_tokenizer(), eos_token="<|endoftext|>", pad_token="<|pad|>"
    )
    torch.manual_seed(0)
    ends = {"vocab_size": len(tokenizer), "eos_token_id": 0, "pad_token_id": 1, "decoder_start_token_id": 1}
    model: torch.nn.Module
    if family == "t5":
        model = T5ForConditionalGeneration(T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, **ends))
    else:
        layers = {
            f"{part}_{what}": size
            for part in ("encoder", "decoder")
            for what, size in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 16))
        }
        config = PLBartConfig(d_model=16, max_position_embeddings=64, forced_eos_token_id=None, **layers, **ends)
        model = PLBartForConditionalGeneration(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", params=["t5", "plbart"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_seq2seq(tmp_path_factory.mktemp(request.param), request.param)


def test_samples_are_as_many_as_asked_distinct_and_the_prompts_own(folder: str) -> None:
    complete = Seq2SeqCompleter(folder, SAMPLED)
    drawn = complete(PROMPTS, 60)  # more than are decoded side by side
    assert [len(texts) for texts in drawn] == [60, 60]
    assert len(set(drawn[0])) > 50
    assert complete(PROMPTS[1:], 60) == drawn[1:]
    assert Seq2SeqCompleter(folder, SAMPLED.model_copy(update={"seed": 2}))(PROMPTS[:1], 60) != drawn[:1]
    assert not any(stop in text for texts in drawn for text in texts for stop in SAMPLED.stop)


def test_without_temperature_every_sample_is_the_likeliest(folder: str) -> None:
    greedy = Seq2SeqCompleter(folder, CompleterConfig(max_tokens=4, temperature=0))(PROMPTS, 3)
    assert [len(set(texts)) for texts in greedy] == [1, 1]


def test_the_random_state_of_others_is_left_alone(folder: str) -> None:
    complete = Seq2SeqCompleter(folder, SAMPLED)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    complete(PROMPTS[:1], 1)
    assert torch.equal(torch.rand(3), expected)


def test_evaluation_finds_out_what_a_model_is(folder: str, tmp_path: Path) -> None:
    assert is_seq2seq(folder)
    assert not is_seq2seq(save_model(tmp_path / "causal"))
    assert not is_seq2seq(str(tmp_path))
    at = complete_at(Source(model=folder), {"max_tokens": 8, "seed": 1})
    assert at(1.0)(PROMPTS, 2) == Seq2SeqCompleter(folder, SAMPLED)(PROMPTS, 2)


def test_a_mask_stands_behind_the_prompt_and_an_echo_of_the_prompt_is_taken_off(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete = Seq2SeqCompleter(folder, SAMPLED, mask="<mask>")
    asked = []

    def generate(input_ids: torch.Tensor, **_: object) -> torch.Tensor:
        asked.append(complete._tokenizer.decode(input_ids[0]))
        return complete._tokenizer("x = 12", return_tensors="pt")["input_ids"]  # type: ignore[no-any-return]

    monkeypatch.setattr(complete._model, "generate", generate)
    assert complete(["x ="], 1) == [[" 12"]]
    assert asked == ["x =<mask>"]


def test_a_prompt_beyond_the_encoders_window_is_refused(tmp_path: Path) -> None:
    complete = Seq2SeqCompleter(save_seq2seq(tmp_path, "plbart"), SAMPLED)
    with pytest.raises(RequestError, match="window is 64 tokens"):
        complete(["x = 1 + " * 50], 1)


def test_weights_that_are_not_safetensors_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5", "is_encoder_decoder": True}))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match="no local folder with safetensors"):
        Seq2SeqCompleter(str(tmp_path))
