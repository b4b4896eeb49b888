"""Attention without a mask is the same attention, and is left alone where it would not be."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, Llama4TextConfig, LlamaConfig, MistralConfig

from cert_ray.gpt_neo import fuse_attention
from cert_ray.training.attention import TabulatedRotations, leave_out_masks, tabulate_rotations
from cert_ray.training.presets import preset_config


@pytest.mark.parametrize("name", ["tiny", "modern-tiny"])
def test_logits_are_the_same(name, tmp_path):
    """`tiny` has local layers, whose window of 128 tokens must stay."""
    torch.manual_seed(0)
    model = fuse_attention(AutoModelForCausalLM.from_config(preset_config(name, 50, 200, 0, 1))).eval()
    model.save_pretrained(tmp_path / "before")
    ids_BT = torch.randint(0, 50, (2, 200))
    with torch.no_grad():
        masked = model(ids_BT).logits
        assert torch.equal(leave_out_masks(model)(ids_BT).logits, masked)
    model.save_pretrained(tmp_path / "after")
    assert (tmp_path / "after" / "config.json").read_text() == (tmp_path / "before" / "config.json").read_text()


def test_a_window_keeps_its_mask():
    shape = MistralConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=32,
        sliding_window=8,
    )
    model = AutoModelForCausalLM.from_config(shape)
    assert leave_out_masks(model).config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("dtype", "rotation"),
    [
        (torch.float32, {"rope_type": "default", "rope_theta": 10_000.0}),
        (torch.bfloat16, {"rope_type": "default", "rope_theta": 10_000.0}),
        (torch.float32, {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}),
    ],
)
def test_positions_that_are_looked_up_rotate_as_those_that_are_computed(dtype, rotation, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(_llama(rotation)).to(dtype).eval()
    model.save_pretrained(tmp_path / "before")
    ids_BT = torch.randint(0, 50, (2, 60))
    with torch.no_grad():
        computed, short = model(ids_BT).logits, model(ids_BT[:, :7]).logits
        tabulate_rotations(model)
        assert isinstance(model.model.rotary_emb, TabulatedRotations)
        assert torch.equal(model(ids_BT).logits, computed)
        assert torch.equal(model(ids_BT[:, :7]).logits, short)
    model.save_pretrained(tmp_path / "after")
    names = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("before", "after")]
    assert names[0] == names[1]


def test_rotations_that_change_with_the_length_are_left_alone():
    model = AutoModelForCausalLM.from_config(
        _llama({"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 8})
    )
    assert not isinstance(tabulate_rotations(model).model.rotary_emb, TabulatedRotations)


@pytest.mark.parametrize(
    ("shape", "more"),
    [
        (Gemma3TextConfig, {"head_dim": 16}),  # rotations by kind of layer
        (Llama4TextConfig, {"head_dim": 16, "num_local_experts": 2, "intermediate_size_mlp": 32}),  # complex numbers
    ],
)
def test_rotations_of_another_make_are_left_alone(shape, more):
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 32}
    heads = {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    model = AutoModelForCausalLM.from_config(shape(**sizes, **heads, **more, max_position_embeddings=64))
    assert model.model.rotary_emb is tabulate_rotations(model).model.rotary_emb
    assert not isinstance(model.model.rotary_emb, TabulatedRotations)


def _llama(rotation):
    return LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        max_position_embeddings=64,
        rope_parameters=rotation,
    )
