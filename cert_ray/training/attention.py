"""What attention of a pack's rows need not do. In: a loaded model. Out: the same model, with the same results.

Rows are never padded on the left, and begin at position 0.

**Masks.** transformers gives a model under `torch.compile` a causal mask of its own making, [B, 1, T, T], with every
PyTorch below 2.14 (`masking_utils._ignore_causal_mask_sdpa`); with a mask, PyTorch's attention computes what lies above
the diagonal too, and on a GPU its flash kernel is out of question. Here being causal is all that is asked: an attention
registered under a name for which transformers makes no mask.

**Rotations.** The compiler finds the cosine and sine of a rotary position wherever they are used, for each head of each
layer again, forward and backward: 8% of an H100's time with `modern-110m` (docs/training.md). Here they are found once
and looked up.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

CAUSAL = "cert_ray_causal"
_STATIC = {"default", "linear", "llama3", "yarn"}  # kinds of rotation that do not change with the length of a row
_MOST_POSITIONS = 1 << 16  # of a table: 32 MB for heads of 64


def leave_out_masks(model: Any) -> Any:
    """Let `model` attend causally without a mask, where that is the same; any other comes back as it is.

    Not the same: windows, chunks, prefixes that see each other, or an attention that is not PyTorch's.
    """
    config = model.config
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if config._attn_implementation == "sdpa" and not any(windows) and kinds == {"full_attention"}:
        AttentionInterface.register(CAUSAL, sdpa_attention_forward)
        config._attn_implementation = CAUSAL  # never saved
    return model


class TabulatedRotations(torch.nn.Module):
    """Rotary positions from 0 on, found once by transformers' own module."""

    def __init__(self, rotary: torch.nn.Module, cos_1TD: torch.Tensor, sin_1TD: torch.Tensor) -> None:
        """In fp32; buffers must keep that type (DeepSpeed 0.19 leaves them alone in bf16)."""
        super().__init__()
        self._rotary = rotary
        self.cos_1TD = torch.nn.Buffer(cos_1TD, persistent=False)
        self.sin_1TD = torch.nn.Buffer(sin_1TD, persistent=False)

    def forward(self, hidden_BTH: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, [1, T, D] each. Longer rows than the table's are left to transformers."""
        tokens = position_ids.shape[-1]
        if tokens > self.cos_1TD.shape[1]:
            found: tuple[torch.Tensor, torch.Tensor] = self._rotary(hidden_BTH, position_ids)
            return found
        return self.cos_1TD[:, :tokens].to(hidden_BTH.dtype), self.sin_1TD[:, :tokens].to(hidden_BTH.dtype)


def tabulate_rotations(model: Any) -> Any:
    """Let `model` look its rotary positions up, where they depend on the position alone; any other comes back as it is.

    For training on rows that begin at position 0 only: whatever positions are given, the row's places count.
    """
    for module in list(model.modules()):
        rotary = getattr(module, "rotary_emb", None)
        kind = getattr(rotary, "rope_type", None)  # by kind of layer, a dict: left alone
        if isinstance(rotary, torch.nn.Module) and isinstance(kind, str) and kind in _STATIC:
            positions = min(int(getattr(model.config, "max_position_embeddings", 0)), _MOST_POSITIONS)
            table = _tabulate(rotary, positions)
            if table is not None:
                module.rotary_emb = TabulatedRotations(rotary, *table)
    return model


def _tabulate(rotary: torch.nn.Module, positions: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """cos and sin [1, T, D] where that is what `rotary` gives for positions; some give one complex tensor, or ask for
    more than positions."""
    if list(inspect.signature(rotary.forward).parameters) != ["x", "position_ids"] or not positions:
        return None
    device = next((buffer.device for buffer in rotary.buffers()), torch.device("cpu"))
    with torch.no_grad():
        found = rotary(torch.zeros(1, device=device), torch.arange(positions, device=device)[None])
    is_pair = isinstance(found, tuple) and len(found) == 2
    if not is_pair or any(one.dtype != torch.float32 or one.shape[:2] != (1, positions) for one in found):
        return None
    return found[0], found[1]
