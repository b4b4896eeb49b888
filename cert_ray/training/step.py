"""The loss of one micro batch, and of the held-out rows. In: a causal language model, rows, masks. Out: summed losses.

Sums, not means: micro batches hold different numbers of tokens, and a step's loss is the mean over its tokens, however
many workers there are. Shapes: B rows, T context tokens, V vocabulary; a row has T + 1 tokens. No Ray, no engine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

Forward = Callable[..., Any]  # a Hugging Face causal language model, or an engine around one


def summed_loss(model: Forward, ids_BT1: torch.Tensor, mask_BT1: torch.Tensor) -> torch.Tensor:
    """Sum of the negative log-likelihoods, in nats, of the tokens that `mask_BT1` marks, each given those before it.

    The first token of a row is never predicted. The softmax is in fp32 whatever the model's precision.
    """
    logits_BTV = model(input_ids=ids_BT1[:, :-1], use_cache=False).logits
    targets_BT = ids_BT1[:, 1:].masked_fill(~mask_BT1[:, 1:], -100)
    return functional.cross_entropy(
        logits_BTV.flatten(0, 1).float(), targets_BT.flatten(), ignore_index=-100, reduction="sum"
    )


def predicted_tokens(mask_BT1: torch.Tensor) -> int:
    """How many tokens `summed_loss` is summed over."""
    return int(mask_BT1[:, 1:].sum())
