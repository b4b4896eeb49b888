"""Training speed and MFU of the presets on one GPU, in one command; on a CPU it runs too, for small ones.

In: random ids. For every base and micro batch a process of its own builds the engine as `train` does (DeepSpeed, ZeRO
1, bf16, fused AdamW, compiled unless --eager), takes warm-up steps, then the steps that count. Out: tokens/s, MFU
(`cert_ray/training/utilization.py`: PaLM's formula over the data sheet's dense peak), peak memory, seconds of the first
step, which compiles; gpu.md and gpu.json with device and date. A micro batch that does not fit is a row that says so.

Example: python -m tests.bench.bench_gpu --output results
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench.measuring import Spread, markdown, publish

BASES = ("pycodegpt-110m", "modern-110m")
GOAL = "goal 50% MFU; beside it: about 22% of the paper, about 40% of llm.c (463,000 tokens/s on an H100)"
_NO_MEMORY = "out of memory"


@dataclass(frozen=True, slots=True)
class Measured:
    """One process's figures; MFU is None where the device's peak is not known."""

    tokens_per_s: Spread
    mfu: float | None
    memory_bytes: int
    first_step_s: float
    parameters: int
    loss: float


def main() -> None:
    """Measure every combination, or, as a child, one."""
    given = _arguments()
    warnings.simplefilter("ignore")
    if given.child:
        print(json.dumps(dataclasses.asdict(measure(given))))
        return
    rows, figures = [], {}
    device = _device()
    for base in given.base:
        for micro_batch in given.micro_batch:
            found = _child(base, micro_batch, given)
            figures[f"{base}, {micro_batch} rows"] = found
            rows.append(_row(base, micro_batch, found))
            print(*rows[-1], sep="  ", file=sys.stderr, flush=True)
    headers = ["model", "rows per pass", "tokens/s", "MFU", "peak memory, GB", "first step, s"]
    how = "eager" if given.eager else "compiled"
    what = (
        f"{device}; {how}, bf16, ZeRO 1, {given.context} tokens a row, {given.gradient_accumulation} passes per step, "
        f"{given.steps} steps after {given.warmup_steps} of warm-up; {GOAL}."
    )
    command = "python -m tests.bench.bench_gpu " + " ".join(sys.argv[1:])
    publish(given.output, "gpu", command, [markdown(headers, rows), what], {"device": device, "runs": figures})


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--base", action="append", help=f"a preset; default: {' and '.join(BASES)}")
    parser.add_argument("--micro-batch", action="append", type=int, help="rows per pass; default: 8, 16, 32 and 64")
    parser.add_argument("--gradient-accumulation", type=int, default=2)
    parser.add_argument("--context", type=int, default=1_024)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup-steps", type=int, default=5)
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--activation-checkpointing", action="store_true")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.base = given.base or list(BASES)
    given.micro_batch = given.micro_batch or [8, 16, 32, 64]
    return given


def _device() -> str:
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, CUDA {torch.version.cuda}"
    return f"no GPU: CPU, PyTorch {torch.__version__}"


def _child(base: str, micro_batch: int, given: argparse.Namespace) -> dict[str, Any] | str:
    command = [sys.executable, "-m", "tests.bench.bench_gpu", *sys.argv[1:], "--child"]
    for option in ("--base", "--micro-batch"):
        while option in command:
            place = command.index(option)
            del command[place : place + 2]
    command += ["--base", base, "--micro-batch", str(micro_batch)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        return found
    if "OutOfMemoryError" in done.stderr:
        return _NO_MEMORY
    raise SystemExit(f"{' '.join(command)}: exit status {done.returncode}\n{done.stderr[-3000:]}")


def _row(base: str, micro_batch: int, found: dict[str, Any] | str) -> list[object]:
    if isinstance(found, str):
        return [base, micro_batch, found, "", "", ""]
    share = "-" if found["mfu"] is None else f"{found['mfu']:.1%}"
    memory = f"{found['memory_bytes'] / 1e9:.1f}"
    return [base, micro_batch, Spread(**found["tokens_per_s"]), share, memory, f"{found['first_step_s']:.0f}"]


def measure(given: argparse.Namespace) -> Measured:
    """One base with one micro batch, in this process, which becomes a process group of one."""
    import psutil
    import torch

    gpu = torch.cuda.is_available()
    if not gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29531"}
    os.environ.update(place)
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("nccl" if gpu else "gloo", store=store, rank=0, world_size=1)
    from transformers import AutoModelForCausalLM

    from cert_ray.gpt_neo import fuse_attention
    from cert_ray.training.deepspeed_engine import Engine
    from cert_ray.training.presets import preset_config
    from cert_ray.training.utilization import flops_per_token, peak_flops, utilization

    config = _config(given, gpu)
    torch.manual_seed(0)
    shape = preset_config(config.base, given.vocabulary, given.context, 0, 1)
    model = fuse_attention(AutoModelForCausalLM.from_config(shape, dtype=torch.float32))
    token_flops = flops_per_token(model, given.context)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    engine = Engine(model, config)
    ids = torch.randint(2, given.vocabulary, (config.gradient_accumulation, config.micro_batch, given.context + 1))
    batches = [(rows, torch.ones_like(rows, dtype=torch.bool)) for rows in ids]
    seconds, loss = [], 0.0
    for _ in range(given.warmup_steps + given.steps):
        started = time.perf_counter()
        loss, _, _ = engine.train_step(batches, 5e-4)  # ends when the loss is there, so nothing is left on the device
        seconds.append(time.perf_counter() - started)
    tokens = config.rows_per_step * given.context
    speed = Spread.of([tokens / one for one in seconds[given.warmup_steps :]])
    share = utilization(speed.median, token_flops, peak_flops(config.precision))
    memory = torch.cuda.max_memory_allocated() if gpu else psutil.Process().memory_info().rss
    torch.distributed.destroy_process_group()
    return Measured(speed, share, memory, seconds[0], parameters, loss)


def _config(given: argparse.Namespace, gpu: bool) -> Any:
    from cert_ray.training.config import TrainConfig

    return TrainConfig(
        base=given.base[0], tokens="-", output="-", steps=given.warmup_steps + given.steps, warmup_steps=0,
        micro_batch=given.micro_batch[0], gradient_accumulation=given.gradient_accumulation, precision="bf16",
        zero_stage=1, use_gpu=gpu, compile=not given.eager, activation_checkpointing=given.activation_checkpointing,
    )  # fmt: skip


if __name__ == "__main__":
    main()
