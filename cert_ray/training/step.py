"""The loss of one micro batch, and of the held-out rows. In: a causal language model, rows, masks. Out: summed losses.

Sums, not means, because micro batches hold different numbers of tokens, and a step's loss is the mean over its tokens
with any number of workers. Shapes: B rows, T context tokens, V vocabulary; a row has T + 1 tokens. No Ray, no engine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

Forward = Callable[..., Any]  # a Hugging Face causal language model, or an engine around one


def summed_loss(model: Forward, ids_BT1: torch.Tensor, mask_BT1: torch.Tensor) -> torch.Tensor:
    """Sum of the negative log-likelihoods, in nats, of the tokens that `mask_BT1` marks, each given those before it.

    The first token of a row is never predicted. The softmax is in fp32, whatever the model's precision.
    """
    logits_BTV = model(input_ids=ids_BT1[:, :-1], use_cache=False).logits
    targets_BT = ids_BT1[:, 1:].masked_fill(~mask_BT1[:, 1:], -100)
    return functional.cross_entropy(
        logits_BTV.flatten(0, 1).float(), targets_BT.flatten(), ignore_index=-100, reduction="sum"
    )


class Learner(torch.nn.Module):
    """A model together with its loss, as one module for the engine to partition and the compiler to compile.

    When compiled, the softmax is computed where the logits are made, and no fp32 copy of them is written.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        """`model`: a Hugging Face causal language model."""
        super().__init__()
        self.learned = model

    def forward(self, ids_BT1: torch.Tensor, mask_BT1: torch.Tensor) -> torch.Tensor:
        """`summed_loss` of the model."""
        return summed_loss(self.learned, ids_BT1, mask_BT1)


def plain_names(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of a `Learner`, under the names that they have in its model."""
    return {name.removeprefix("learned."): weight for name, weight in weights.items()}


def predicted_tokens(mask_BT1: torch.Tensor) -> int:
    """How many tokens `summed_loss` sums over."""
    return int(mask_BT1[:, 1:].sum())
