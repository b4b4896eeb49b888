"""Saves work in attention over a pack's rows. In: a loaded model. Out: the same model, with the same results.

Rows are never padded on the left, and begin at position 0.

**Masks.** Under `torch.compile`, transformers gives a model an explicit causal mask, [B, 1, T, T], with every PyTorch
below 2.14 (`masking_utils._ignore_causal_mask_sdpa`). With a mask, PyTorch's attention also computes what is above the
diagonal, and on a GPU it cannot use its flash kernel. Here, attention is only marked as causal: it is registered under
a name for which transformers makes no mask.

**Rotations.** The compiler computes the cosine and sine of rotary positions wherever they are used, again for each head
of each layer, forward and backward: 8% of an H100's time with `modern-110m` (docs/training.md). Here they are computed
once and looked up.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

CAUSAL = "cert_ray_causal"
_STATIC = {"default", "linear", "llama3", "yarn"}  # kinds of rotation that do not depend on the length of a row
_MOST_POSITIONS = 1 << 16  # in a table: 32 MB for heads of 64


def leave_out_masks(model: Any) -> Any:
    """Let `model` attend causally without a mask if that gives the same result; otherwise leave it unchanged.

    It is not the same with windows, chunks, prefixes that see each other, or an attention that is not PyTorch's.
    """
    config = model.config
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if config._attn_implementation == "sdpa" and not any(windows) and kinds == {"full_attention"}:
        AttentionInterface.register(CAUSAL, sdpa_attention_forward)
        config._attn_implementation = CAUSAL  # never saved
    return model


class TabulatedRotations(torch.nn.Module):
    """Rotary positions from 0 on, computed once by transformers' own module."""

    def __init__(self, rotary: torch.nn.Module, cos_1TD: torch.Tensor, sin_1TD: torch.Tensor) -> None:
        """The tables are fp32, and buffers must stay so (in bf16, DeepSpeed 0.19 leaves them alone)."""
        super().__init__()
        self._rotary = rotary
        self.cos_1TD = torch.nn.Buffer(cos_1TD, persistent=False)
        self.sin_1TD = torch.nn.Buffer(sin_1TD, persistent=False)

    def forward(self, hidden_BTH: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, [1, T, D] each. transformers handles rows longer than the table."""
        tokens = position_ids.shape[-1]
        if tokens > self.cos_1TD.shape[1]:
            found: tuple[torch.Tensor, torch.Tensor] = self._rotary(hidden_BTH, position_ids)
            return found
        return self.cos_1TD[:, :tokens].to(hidden_BTH.dtype), self.sin_1TD[:, :tokens].to(hidden_BTH.dtype)


def tabulate_rotations(model: Any) -> Any:
    """Let `model` look up its rotary positions if they depend only on the position; otherwise leave it unchanged.

    Only for training on rows that begin at position 0: positions are counted in the row, whatever positions are given.
    """
    for module in list(model.modules()):
        rotary = getattr(module, "rotary_emb", None)
        kind = getattr(rotary, "rope_type", None)  # a dict if it differs by kind of layer: left alone
        if isinstance(rotary, torch.nn.Module) and isinstance(kind, str) and kind in _STATIC:
            positions = min(int(getattr(model.config, "max_position_embeddings", 0)), _MOST_POSITIONS)
            table = _tabulate(rotary, positions)
            if table is not None:
                module.rotary_emb = TabulatedRotations(rotary, *table)
    return model


def _tabulate(rotary: torch.nn.Module, positions: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """cos and sin, [1, T, D]; None if `rotary` returns something else (a complex tensor) or needs other arguments."""
    if list(inspect.signature(rotary.forward).parameters) != ["x", "position_ids"] or not positions:
        return None
    device = next((buffer.device for buffer in rotary.buffers()), torch.device("cpu"))
    with torch.no_grad():
        found = rotary(torch.zeros(1, device=device), torch.arange(positions, device=device)[None])
    is_pair = isinstance(found, tuple) and len(found) == 2
    if not is_pair or any(one.dtype != torch.float32 or one.shape[:2] != (1, positions) for one in found):
        return None
    return found[0], found[1]
