"""Kernels that give the same bits each time: `deterministic` of a `TrainConfig`. In: a block. Out: its effects, so.

Many GPU kernels add with atomics, in a different order each time. PyTorch has one switch against this. As of 2.13, it
also fixes the order in the backward passes of flash and memory-efficient attention, excludes cuDNN's attention, and
keeps `torch.compile` from choosing kernels by timing them. Two libraries also need environment variables, which they
read at their first call: after Ray Train has started the process group, and before a step.

Not handled: results across devices, versions or numbers of workers. From reading PyTorch's source and running on CPUs,
not on GPUs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch

from cert_ray.errors import ConfigError

_ENVIRONMENT: Final = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # otherwise streams share workspaces (cuBLAS, "Results Reproducibility")
    "NCCL_NVLS_ENABLE": "0",  # sums in the switch come in another order each call (github.com/NVIDIA/nccl/issues/1497)
}
_SWITCH: Final = "torch.use_deterministic_algorithms"  # in every message of PyTorch about a missing kernel


@contextmanager
def deterministic_kernels() -> Iterator[None]:
    """Run the block with kernels that give equal bits for equal input; afterwards, settings are restored.

    Variables that are already in the environment stay.

    Raises:
        ConfigError: when an operation of the block has no such kernel.
    """
    added = _ENVIRONMENT.keys() - os.environ.keys()
    enabled, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    benchmark = torch.backends.cudnn.benchmark
    os.environ.update({name: _ENVIRONMENT[name] for name in added})
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False  # would choose convolutions by timing them
    try:
        yield
    except RuntimeError as error:
        if _SWITCH not in str(error):
            raise
        raise ConfigError(
            f"deterministic: this model cannot be trained so here: {error}. Take the option out of the recipe (the run "
            "is then another one: choose another output), or train another base."
        ) from error
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        torch.backends.cudnn.benchmark = benchmark
        for name in added:
            del os.environ[name]
