"""Sizes by hand and against PyCodeGPT's paper, without allocating them."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from cert_ray.errors import ConfigError
from cert_ray.training.models import parameter_count
from cert_ray.training.presets import PRESETS, preset_config


def _parameters(name: str, vocab_size: int, context_tokens: int) -> int:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(preset_config(name, vocab_size, context_tokens, end_id=0, pad_id=1))
    return parameter_count(model)


def test_pycodegpt_has_the_110_million_parameters_of_the_paper():
    """By hand: (32,000 + 1,024) x 768 embeddings, tied; 12 layers of 4 x 768^2 attention and 8 x 768^2 feed-forward
    weights with biases (768 + 3,072 + 768) and two norms; one norm at the end."""
    layer = 12 * 768**2 + (768 + 3_072 + 768) + 4 * 768
    assert _parameters("pycodegpt-110m", 32_000, 1024) == (32_000 + 1_024) * 768 + 12 * layer + 2 * 768
    assert _parameters("pycodegpt-110m", 32_000, 1024) == pytest.approx(110e6, rel=0.01)


def test_pycodegpt_is_gpt_neo_125m_but_for_vocabulary_and_window():
    config = preset_config("pycodegpt-110m", 32_000, 1024, end_id=0, pad_id=1)
    shape = (
        config.num_layers,
        config.hidden_size,
        config.num_heads,
        config.window_size,
        config.max_position_embeddings,
    )
    assert shape == (12, 768, 12, 256, 1024)
    assert config.attention_layers == ["global", "local"] * 6


def test_tiny_is_a_few_million_parameters_and_takes_any_window():
    assert 2e6 < _parameters("tiny", 4_096, 256) < 4e6
    assert preset_config("tiny", 4_096, 2_048, 0, 1).max_position_embeddings == 2_048


def test_modern_has_the_parameters_of_pycodegpt_within_one_percent():
    """By hand: 32,000 x 768 embeddings, tied; 12 layers of 4 x 768^2 attention and 3 x 768 x 2,048 feed-forward weights
    and two norms, no biases; one norm at the end."""
    layer = 4 * 768**2 + 3 * 768 * 2_048 + 2 * 768
    found = _parameters("modern-110m", 32_000, 1024)
    assert found == 32_000 * 768 + 12 * layer + 768
    assert found == pytest.approx(_parameters("pycodegpt-110m", 32_000, 1024), rel=0.01)


@pytest.mark.parametrize("name", ["modern-110m", "modern-tiny"])
def test_modern_is_a_plain_llama_that_other_runtimes_know(name):
    config = preset_config(name, 4_096, 256, end_id=0, pad_id=1)
    assert config.model_type == "llama"
    assert config.rope_parameters["rope_type"] == "default"
    assert (config.hidden_act, config.attention_bias, config.mlp_bias) == ("silu", False, False)
    assert config.hidden_size % config.num_attention_heads == 0
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert model.config._attn_implementation == "sdpa"
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_modern_tiny_takes_any_window():
    assert 2e6 < _parameters("modern-tiny", 4_096, 256) < 4e6
    assert preset_config("modern-tiny", 4_096, 2_048, 0, 1).max_position_embeddings == 2_048


def test_refuses_an_unknown_name_and_rows_longer_than_the_window():
    with pytest.raises(ConfigError, match=", ".join(PRESETS)):
        preset_config("huge", 100, 16, 0, 1)
    for name in ("pycodegpt-110m", "modern-110m"):
        with pytest.raises(ConfigError, match="--context-tokens 1024"):
            preset_config(name, 32_000, 2_048, 0, 1)
