"""Which precision this CPU multiplies faster. In: nothing. Out: floating-point operations per second of one thread.

This is measured, since a CPU's instruction set does not tell: with bf16 instructions, an AMD EPYC is 2.4 times as fast
as with fp32, and an Intel Xeon without AMX half as fast.
"""

from __future__ import annotations

import time
from typing import Literal

import torch

_ROWS, _IN, _OUT = 512, 576, 1_536  # of a matrix product as in a small model; takes 1 to 10 ms
_RUNS = 5
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def measure() -> dict[str, float]:
    """Operations per second of one thread in matrix products, fp32 and bf16: the best of a few runs; about 50 ms."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {name: _measure(dtype) for name, dtype in _DTYPES.items()}
    finally:
        torch.set_num_threads(threads)


@torch.inference_mode()
def _measure(dtype: torch.dtype) -> float:
    rows, weights = torch.ones(_ROWS, _IN, dtype=dtype), torch.ones(_OUT, _IN, dtype=dtype)
    taken: list[float] = []
    for _ in range(1 + _RUNS):
        began = time.perf_counter()
        torch.nn.functional.linear(rows, weights)
        taken.append(time.perf_counter() - began)
    return 2 * _ROWS * _IN * _OUT / min(taken[1:])


def faster_precision() -> Literal["fp32", "bf16"]:
    """bf16 if it is multiplied at least as fast as fp32."""
    measured = measure()
    return "bf16" if measured["bf16"] >= measured["fp32"] else "fp32"
