"""Linear layers on the CPU whose weights are laid out for oneDNN once, instead of at every call.

In: a loaded model in fp32 or bf16. Out: the same model. Decoding multiplies a few rows by large weights, and laying the
weights out costs more than the product. Measured (one core of a Xeon with AMX, 49,152 x 576, CPU-ms, unchanged and laid
out): fp32 19 and 10 for 4 rows, 31 and 12 for 8, 35 and 23 for 45; bf16 8.4 and 5.5, 9.7 and 5.5, 10.7 and 6.7. A whole
answer of SmolLM2-135M takes 0.7 to 0.8 of the CPU time, except for a single row in fp32 (1.1 to 1.2 times as much).

The two operators are PyTorch's own but not public (its compiler's "freezing" uses them). Only this module calls them;
where they are missing or refuse, layers stay as they are.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

_log = logging.getLogger(__name__)

_EXPECTED_ROWS = 16  # the layout is chosen for this many rows; it works for any number


class PackedLinear(nn.Module):
    """An `nn.Linear` whose weight is laid out for oneDNN."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _EXPECTED_ROWS)
        self._bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """The product, plus the bias."""
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._packed, self._bias, "none", [], "")
        return product


@torch.inference_mode()
def pack_linear_layers(model: Any) -> bool:
    """Replace the linear layers of `model`, if this PyTorch can; weights that nothing else holds are freed."""
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear
    ]
    if model.device.type != "cpu" or model.dtype not in (torch.float32, torch.bfloat16) or not places:
        return False
    try:
        packed = PackedLinear(places[0][2])
        packed(torch.zeros(1, places[0][2].in_features, dtype=model.dtype))
    except (AttributeError, RuntimeError, NotImplementedError) as failure:
        _log.info("linear layers are not packed: %s", failure)
        return False
    for parent, name, child in places:
        setattr(parent, name, PackedLinear(child))
    return True
