"""Forward and backward of GPT-Neo on one thread, eager against fused attention.

    python -m tests.bench.bench_gpt_neo_attention

Prints a line per model and precision: medians of 5, in tokens/s, taken in turns.
"""

from __future__ import annotations

import copy
import statistics
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from cert_ray.gpt_neo import fuse_attention
from cert_ray.training.presets import preset_config

RUNS = 5


def _seconds(model: Any, ids_BT: torch.Tensor) -> float:
    started = time.perf_counter()
    model(ids_BT, use_cache=False).logits.float().square().mean().backward()
    model.zero_grad()
    return time.perf_counter() - started


def _compare(preset: str, layers: int | None, rows: int, tokens: int, dtype: torch.dtype) -> str:
    shape = preset_config(preset, 4_096, tokens, 0, 1)
    if layers is not None:
        shape.num_layers, shape.attention_types = layers, [[["global", "local"], layers // 2]]
        shape.attention_layers = ["global", "local"] * (layers // 2)
    eager = AutoModelForCausalLM.from_config(shape, dtype=dtype)
    models = {"eager": eager, "fused": fuse_attention(copy.deepcopy(eager))}
    ids_BT = torch.randint(0, 4_096, (rows, tokens))
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(RUNS + 1):
        for name, model in models.items():
            times[name].append(_seconds(model, ids_BT))
    speed = {name: rows * tokens / statistics.median(seconds[1:]) for name, seconds in times.items()}
    name = f"{preset}, {shape.num_layers} layers, {rows} x {tokens} tokens, {str(dtype).removeprefix('torch.')}"
    return f"{name}: eager {speed['eager']:,.0f}, fused {speed['fused']:,.0f} tokens/s"


def main() -> None:
    """Time every case."""
    torch.set_num_threads(1)
    for dtype in (torch.float32, torch.bfloat16):
        for preset, layers, rows, tokens in (("tiny", None, 8, 256), ("pycodegpt-110m", 2, 2, 1024)):
            print(_compare(preset, layers, rows, tokens, dtype), flush=True)


if __name__ == "__main__":
    main()
