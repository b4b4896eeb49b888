"""Architectures to train from scratch: GPT-Neo and Llama, two sizes each. In: a name and what the tokens require.

Out: a Hugging Face config, without weights. `pycodegpt-110m` is PyCodeGPT as in the paper: GPT-Neo 125M with a 32K
vocabulary and a window of 1,024. `modern-110m` has as many parameters in the shape of Llama (Touvron et al. 2023,
arXiv:2302.13971: rotary positions, SwiGLU, RMSNorm, no biases), so that the two can be compared and other runtimes can
load it: docs/models.md. `tiny` and `modern-tiny` learn something in a minute on two CPU cores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import GPTNeoConfig, LlamaConfig

from cert_ray.errors import ConfigError


@dataclass(frozen=True, slots=True)
class GPTNeoPreset:
    """The shape of a GPT-Neo; layers alternate between global attention and a local window."""

    layers: int
    hidden: int
    heads: int
    local_window_tokens: int
    max_context_tokens: int | None  # None: as many positions as the packed rows have
    initializer_range: float = 0.02  # GPT-Neo's

    def config(self, vocab_size: int, context_tokens: int, **special_ids: int) -> GPTNeoConfig:
        """The shape for a vocabulary and a window."""
        return GPTNeoConfig(
            vocab_size=vocab_size,
            max_position_embeddings=self.max_context_tokens or context_tokens,
            hidden_size=self.hidden,
            num_layers=self.layers,
            attention_types=[[["global", "local"], self.layers // 2]],
            num_heads=self.heads,
            window_size=self.local_window_tokens,
            initializer_range=self.initializer_range,
            use_cache=True,
            **special_ids,
        )


@dataclass(frozen=True, slots=True)
class LlamaPreset:
    """The shape of a Llama. Input and output embeddings are tied, as in GPT-Neo.

    Untied, a 32K vocabulary would add 25M parameters to a 110M model, a fifth of it (MobileLLM, arXiv:2402.14905, also
    ties them at this size).
    """

    layers: int
    hidden: int
    heads: int
    feed_forward: int
    max_context_tokens: int | None  # None: as many positions as the packed rows have
    initializer_range: float = 0.02  # Llama's

    def config(self, vocab_size: int, context_tokens: int, **special_ids: int) -> LlamaConfig:
        """The shape for a vocabulary and a window."""
        return LlamaConfig(
            vocab_size=vocab_size,
            max_position_embeddings=self.max_context_tokens or context_tokens,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            intermediate_size=self.feed_forward,
            initializer_range=self.initializer_range,
            tie_word_embeddings=True,
            use_cache=True,
            **special_ids,
        )


PRESETS: dict[str, GPTNeoPreset | LlamaPreset] = {
    # Measured on standard library code, vocabulary 4,096, rows of 256, after 154,000 tokens (80 CPU-seconds): held-out
    # loss 6.14 nats per token with an initial deviation of 0.05, 6.69 with 0.02 (learning rates 3e-3 and 6e-3), 6.28
    # with 0.08; two layers 256 wide take two thirds of the time and end at 6.22. Unigram entropy 6.19.
    "tiny": GPTNeoPreset(
        layers=4, hidden=192, heads=6, local_window_tokens=128, max_context_tokens=None, initializer_range=0.05
    ),
    # GPT-Neo 125M (12 layers, 768 wide, 12 heads, window 256) with PyCodeGPT's positions
    "pycodegpt-110m": GPTNeoPreset(layers=12, hidden=768, heads=12, local_window_tokens=256, max_context_tokens=1024),
    # Measured like `tiny`, 154,000 tokens in bf16: held-out loss 6.13 with an initial deviation of 0.05, 6.35 and 6.58
    # (learning rates 3e-3 and 6e-3) with 0.02; `tiny` in the same runs 6.32 and 6.28.
    "modern-tiny": LlamaPreset(
        layers=4, hidden=192, heads=6, feed_forward=512, max_context_tokens=None, initializer_range=0.05
    ),
    # A feed-forward of 8/3 of the width, as in Llama, has as many parameters in three matrices as GPT-Neo's in two.
    "modern-110m": LlamaPreset(layers=12, hidden=768, heads=12, feed_forward=2048, max_context_tokens=1024),
}


def preset_config(name: str, vocab_size: int, context_tokens: int, end_id: int, pad_id: int) -> Any:
    """The Hugging Face config of preset `name` for a vocabulary and a window.

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
    return preset.config(vocab_size, context_tokens, bos_token_id=end_id, eos_token_id=end_id, pad_token_id=pad_id)
