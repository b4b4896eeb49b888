"""GPT-Neo with PyTorch's fused attention, for training and serving. In: a loaded model. Out: the same model.

transformers 5 offers GPT-Neo an eager path, which keeps every layer's [B, heads, T, T] weights, and flash-attention 2,
which needs a GPU and a package. This adds `scaled_dot_product_attention`. Weights, their names and the saved config
do not change, so what is saved is a plain GPT-Neo folder. Attention weights are not returned (`output_attentions`).

Forward and backward on one thread of a shared AMD EPYC (AVX-512 bf16), medians of 5, in tokens/s, eager and fused, by
tests/bench/bench_gpt_neo_attention.py: two layers of `pycodegpt-110m`, rows of 1,024, fp32 517 and 703, bf16 1,189 and
1,442; `tiny`, rows of 256, fp32 1,498 and 1,933, bf16 9,167 and 8,841 (such short rows gain nothing there).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoSelfAttention


class FusedSelfAttention(GPTNeoSelfAttention):  # type: ignore[misc]  # transformers is not read by mypy
    """GPT-Neo's attention in one kernel: unscaled, and limited to the window on local layers.

    The eager path casts queries and keys to fp32 before it multiplies them. The kernels sum products of bf16 and fp16
    in fp32, and compute the softmax in fp32, so the cast is not needed.
    """

    def _attn(
        self,
        query_BHQD: torch.Tensor,
        key_BHKD: torch.Tensor,
        value_BHKD: torch.Tensor,
        attention_mask: torch.Tensor | None = None,  # [B, 1, Q, K], True where a query may look; None: causal
    ) -> tuple[torch.Tensor, None]:
        queries, keys = query_BHQD.shape[-2], key_BHKD.shape[-2]
        window = self.config.window_size if self.attention_type == "local" else keys
        if attention_mask is None and queries == 1 and keys > window:  # decoding: read only the window's keys
            key_BHKD, value_BHKD = key_BHKD[:, :, -window:], value_BHKD[:, :, -window:]
        elif keys > window or (attention_mask is None and 1 < queries < keys):
            allowed = self.bias[:, :, keys - queries : keys, :keys]  # causal, and within the window on local layers
            attention_mask = allowed if attention_mask is None else attention_mask & allowed
        attended_BHQD = scaled_dot_product_attention(
            query_BHQD,
            key_BHKD,
            value_BHKD,
            attn_mask=attention_mask,
            dropout_p=self.attn_dropout.p if self.training else 0.0,
            is_causal=attention_mask is None and queries > 1,
            scale=1.0,
        )
        return attended_BHQD, None


def fuse_attention(model: Any) -> Any:
    """Let `model` use fused attention if it is a GPT-Neo with eager attention; any other is returned unchanged."""
    for module in model.modules():
        if type(module) is GPTNeoSelfAttention:
            module.__class__ = FusedSelfAttention  # the same weights and buffers, another `_attn`
            model.config._attn_implementation = "sdpa"  # makes masks boolean or None; never saved
    return model
