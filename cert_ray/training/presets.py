"""Architectures to start from scratch: GPT-Neo in two sizes. In: a name and what the tokens ask for. Out: a config.

`pycodegpt-110m` is PyCodeGPT as PAPER describes it: GPT-Neo 125M with a 32K vocabulary and a window of 1,024. `tiny` is
of the same family, small enough to learn something in a minute on two CPU cores. Neither holds weights.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import GPTNeoConfig

from cert_ray.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Preset:
    """The shape of a GPT-Neo; layers alternate between global attention and a local window."""

    layers: int
    hidden: int
    heads: int
    local_window_tokens: int
    max_context_tokens: int | None  # None: as many positions as the packed rows have
    initializer_range: float = 0.02  # GPT-Neo's


PRESETS: dict[str, Preset] = {
    # Measured on standard library code, vocabulary 4,096, rows of 256, after 154,000 tokens (80 CPU-seconds): held-out
    # loss 6.14 nats per token with an initial deviation of 0.05, 6.69 with 0.02 (learning rates 3e-3 and 6e-3), 6.28
    # with 0.08; two layers 256 wide need two thirds of the time and end at 6.22. Unigram entropy 6.19.
    "tiny": Preset(
        layers=4, hidden=192, heads=6, local_window_tokens=128, max_context_tokens=None, initializer_range=0.05
    ),
    # GPT-Neo 125M (12 layers, 768 wide, 12 heads, window 256) with PyCodeGPT's positions
    "pycodegpt-110m": Preset(layers=12, hidden=768, heads=12, local_window_tokens=256, max_context_tokens=1024),
}


def preset_config(name: str, vocab_size: int, context_tokens: int, end_id: int, pad_id: int) -> GPTNeoConfig:
    """The config of preset `name` for a vocabulary and a window.

    Raises:
        ConfigError: for an unknown name, or rows longer than the preset's window.
    """
    preset = PRESETS.get(name)
    if preset is None:
        raise ConfigError(f"base: {name!r} is no preset; known are {', '.join(PRESETS)}.")
    limit = preset.max_context_tokens
    if limit is not None and context_tokens > limit:
        raise ConfigError(
            f"base: {name} has a window of {limit} tokens, the packed rows have {context_tokens}; "
            f"pack with --context-tokens {limit} or less."
        )
    return GPTNeoConfig(
        vocab_size=vocab_size,
        max_position_embeddings=limit or context_tokens,
        hidden_size=preset.hidden,
        num_layers=preset.layers,
        attention_types=[[["global", "local"], preset.layers // 2]],
        num_heads=preset.heads,
        window_size=preset.local_window_tokens,
        initializer_range=preset.initializer_range,
        bos_token_id=end_id,
        eos_token_id=end_id,
        pad_token_id=pad_id,
        use_cache=True,
    )
