"""PyCodeGPT's size against its paper, without allocating it."""

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


def test_refuses_an_unknown_name_and_rows_longer_than_the_window():
    with pytest.raises(ConfigError, match=", ".join(PRESETS)):
        preset_config("huge", 100, 16, 0, 1)
    with pytest.raises(ConfigError, match="--context-tokens 1024"):
        preset_config("pycodegpt-110m", 32_000, 2_048, 0, 1)
