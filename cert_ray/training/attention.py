"""Attention of rows without padding, which needs no mask. In: a loaded model. Out: the same model.

transformers gives a model under `torch.compile` a causal mask of its own making, [B, 1, T, T], with every PyTorch below
2.14 (`masking_utils._ignore_causal_mask_sdpa`); with a mask, PyTorch's attention computes what lies above the diagonal
too, and on a GPU its flash kernel is out of question. Rows of a pack are never padded on the left, so being causal is
all that is asked: an attention registered under a name for which transformers makes no mask.
"""

from __future__ import annotations

from typing import Any

from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

CAUSAL = "cert_ray_causal"


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
