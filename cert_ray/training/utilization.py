"""How much of a device's peak training uses (MFU). In: a model, tokens per second, a device's name. Out: a share.

Model FLOPs utilization as PaLM defines it (Chowdhery et al. 2022, arXiv:2204.02311, appendix B): tokens/s x FLOPs per
token / peak, with 6 FLOPs per token for each weight that it is multiplied with, and 12 x layers x width x context for
attention. Recomputation (activation checkpointing) is not useful work and does not count. As in PaLM, attention counts
in full, although causal attention needs only half. The peak is for dense matrix products in the run's precision.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Gpu:
    """A device from its data sheet: operations per second in dense matrix products, without structured sparsity."""

    memory_bytes: float
    half_flops: float  # bf16 and fp16
    fp32_flops: float  # not TF32, which PyTorch does not use by default

    def peak_flops(self, precision: str) -> float:
        """Operations per second in `precision`: fp32, bf16 or fp16."""
        return self.fp32_flops if precision == "fp32" else self.half_flops


# From NVIDIA's data sheets, for SXM if there are two versions. Those of H100 and H200 count sparsity: twice this.
GPUS: dict[str, Gpu] = {
    "a100": Gpu(80e9, 312e12, 19.5e12),
    "a100-40gb": Gpu(40e9, 312e12, 19.5e12),
    "a10": Gpu(24e9, 125e12, 31.2e12),
    "h100": Gpu(80e9, 989.4e12, 67e12),
    "h100-nvl": Gpu(94e9, 835e12, 60e12),
    "h100-pcie": Gpu(80e9, 756e12, 51e12),
    "h200": Gpu(141e9, 989.4e12, 67e12),
    "l4": Gpu(24e9, 121e12, 30.3e12),
    "rtx4090": Gpu(24e9, 165.2e12, 82.6e12),
}
# Names from `torch.cuda.get_device_name`, the longer ones first.
_NAMES = (
    ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
    ("NVIDIA A100-PCIE-40GB", "a100-40gb"),
    ("NVIDIA A100", "a100"),
    ("NVIDIA A10G", None),  # a different chip from the A10
    ("NVIDIA A10", "a10"),
    ("NVIDIA H100 NVL", "h100-nvl"),
    ("NVIDIA H100 PCIe", "h100-pcie"),
    ("NVIDIA H100", "h100"),
    ("NVIDIA H200 NVL", None),
    ("NVIDIA H200", "h200"),
    ("NVIDIA L40", None),
    ("NVIDIA L4", "l4"),
    ("NVIDIA GeForce RTX 4090 ", None),  # D, Laptop GPU
    ("NVIDIA GeForce RTX 4090", "rtx4090"),
)
_PART = " MIG "  # in the name of a partition of a device, which is all that a process sees


def gpu_of_device(device_name: str) -> Gpu | None:
    """The data sheet of the device that PyTorch calls `device_name`, or None if it is not known."""
    if _PART in device_name:
        return None
    for beginning, key in _NAMES:
        if device_name.startswith(beginning):
            return GPUS[key] if key else None
    return None


def peak_flops(precision: str) -> float | None:
    """The peak of this process's GPU in `precision`, or None without a GPU, or if it is not known."""
    if not torch.cuda.is_available():
        return None
    gpu = gpu_of_device(torch.cuda.get_device_name())
    return None if gpu is None else gpu.peak_flops(precision)


def flops_per_token(model: Any, context_tokens: int) -> float:
    """Useful work per token of a Hugging Face causal language model, in forward and backward pass."""
    shape = model.config
    attention = 12.0 * int(shape.num_hidden_layers) * int(shape.hidden_size) * context_tokens
    return 6.0 * _multiplied(model) + attention


def utilization(tokens_per_s: float, token_flops: float, peak: float | None, devices: int = 1) -> float | None:
    """The share of the peak of `devices` that goes into the model, or None if the peak is not known."""
    return None if peak is None else tokens_per_s * token_flops / (peak * devices)


def _multiplied(model: Any) -> int:
    """How many weights every token is multiplied with: all matrices except look-up tables, and the output matrix."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    matrices = sum(int(weight.numel()) for weight in model.parameters() if weight.ndim > 1 and id(weight) not in tables)
    output = model.get_output_embeddings()
    tied = output is not None and id(output.weight) in tables
    return matrices + (int(output.weight.numel()) if tied else 0)
