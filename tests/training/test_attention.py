"""Attention without a mask is the same attention, and is left alone where it would not be."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, MistralConfig

from cert_ray.gpt_neo import fuse_attention
from cert_ray.training.attention import leave_out_masks
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
