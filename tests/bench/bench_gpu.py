"""Training speed and MFU of the presets on one GPU, in one command; on a CPU it runs too, for small ones.

In: random ids. For every base and micro batch a process of its own builds the engine as `train` does (DeepSpeed, ZeRO
1, bf16, fused AdamW, compiled unless --eager), takes warm-up steps, then the steps that count. Beside it with --plain,
the same model and batch in a loop of PyTorch alone: fp32 weights, autocast to bf16, fused AdamW, compiled likewise.
Out: tokens/s, MFU (`cert_ray/training/utilization.py`: PaLM's formula over the data sheet's dense peak), peak memory,
seconds of the first step, which compiles; gpu.md and gpu.json with device and date; with --profile the kernels of two
steps. A micro batch that does not fit is a row that says so. --at-once lets so many processes compile side by side
(each keeps its memory on the device); their steps are counted one process after the other.

Example: python -m tests.bench.bench_gpu --output results
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tests.bench.measuring import Spread, markdown, publish

BASES = ("pycodegpt-110m", "modern-110m")
GOAL = "goal 50% MFU; beside it: about 22% of the paper, about 40% of llm.c (463,000 tokens/s on an H100)"
_NO_MEMORY = "out of memory"
_RATE = 5e-4
_READY = "ready"


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
        print(json.dumps(dataclasses.asdict(measure(given))), flush=True)
        return
    rows, figures = [], {}
    device = _device()
    loops = ("engine", "plain") if given.plain else ("engine",)
    wanted = [(base, rows, loop) for base in given.base for rows in given.micro_batch for loop in loops]
    for first in range(0, len(wanted), given.at_once):
        group = wanted[first : first + given.at_once]
        for (base, micro_batch, loop), found in zip(group, _children(group, given), strict=True):
            figures[f"{base}, {micro_batch} rows, {loop}"] = found
            rows.append(_row(base, micro_batch, loop, found))
            print(*rows[-1], sep="  ", file=sys.stderr, flush=True)
    headers = ["model", "rows per pass", "loop", "tokens/s", "MFU", "peak memory, GB", "first step, s"]
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
    parser.add_argument("--plain", action="store_true", help="also a loop of PyTorch alone")
    parser.add_argument("--profile", action="store_true", help="also write which kernels two steps spend their time in")
    parser.add_argument("--attention", choices=["flash", "cudnn"], help="whose kernels; default: PyTorch's choice")
    parser.add_argument("--join", action="store_true", help="queries, keys and values as one product; gate and up too")
    parser.add_argument("--autotune", action="store_true", help="let the compiler try kernels for every product")
    parser.add_argument("--at-once", type=int, default=1, help="processes that compile side by side; default 1")
    parser.add_argument("--activation-checkpointing", action="store_true")
    parser.add_argument("--child", choices=["engine", "plain"], help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.base = given.base or list(BASES)
    given.micro_batch = given.micro_batch or [8, 16, 32, 64]
    return given


def _device() -> str:
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, CUDA {torch.version.cuda}"
    return f"no GPU: CPU, PyTorch {torch.__version__}"


def _children(group: Sequence[tuple[str, int, str]], given: argparse.Namespace) -> list[dict[str, Any] | str]:
    """What each process measured: all of the group warm up side by side, then one after the other counts its steps."""
    options = list(sys.argv[1:])
    for option in ("--base", "--micro-batch", "--at-once"):
        while option in options:
            place = options.index(option)
            del options[place : place + 2]
    started = []
    for base, micro_batch, loop in group:
        command = [sys.executable, "-m", "tests.bench.bench_gpu", *options, "--child", loop]
        command += ["--base", base, "--micro-batch", str(micro_batch)]
        log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        pipe = subprocess.PIPE
        started.append((command, log, subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, text=True)))
    for _, _, process in started:
        assert process.stdout is not None
        while (line := process.stdout.readline()) and line.strip() != _READY:  # or it has ended
            pass
    return [_found(*one) for one in started]


def _found(command: Sequence[str], log: IO[str], process: subprocess.Popen[str]) -> dict[str, Any] | str:
    with log:
        printed, _ = process.communicate("go\n")
        if process.returncode == 0:
            found: dict[str, Any] = json.loads(printed.strip().splitlines()[-1])
            return found
        log.seek(0)
        said = log.read()
    if "OutOfMemoryError" in said:
        return _NO_MEMORY
    raise SystemExit(f"{' '.join(command)}: exit status {process.returncode}\n{said[-3000:]}")


def _row(base: str, micro_batch: int, loop: str, found: dict[str, Any] | str) -> list[object]:
    if isinstance(found, str):
        return [base, micro_batch, loop, found, "", "", ""]
    share = "-" if found["mfu"] is None else f"{found['mfu']:.1%}"
    memory = f"{found['memory_bytes'] / 1e9:.1f}"
    return [base, micro_batch, loop, Spread(**found["tokens_per_s"]), share, memory, f"{found['first_step_s']:.0f}"]


def measure(given: argparse.Namespace) -> Measured:
    """One base with one micro batch, in this process, which becomes a process group of one."""
    import psutil
    import torch
    import torch._inductor.config

    gpu = torch.cuda.is_available()
    if not gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29531"}
    os.environ.update(place)
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("nccl" if gpu else "gloo", store=store, rank=0, world_size=1)
    from transformers import AutoModelForCausalLM

    from cert_ray.gpt_neo import fuse_attention
    from cert_ray.training.presets import preset_config
    from cert_ray.training.utilization import flops_per_token, peak_flops, utilization
    from tests.bench import joined_products

    if given.attention:
        torch.backends.cuda.enable_flash_sdp(given.attention == "flash")
        torch.backends.cuda.enable_cudnn_sdp(given.attention == "cudnn")
    if given.join:
        joined_products.install()
    torch._inductor.config.max_autotune_gemm = given.autotune
    config = _config(given, gpu)
    torch.manual_seed(0)
    shape = preset_config(config.base, given.vocabulary, given.context, 0, 1)
    model = fuse_attention(AutoModelForCausalLM.from_config(shape, dtype=torch.float32))
    token_flops = flops_per_token(model, given.context)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    ids = torch.randint(2, given.vocabulary, (config.gradient_accumulation, config.micro_batch, given.context + 1))
    batches = [(rows, torch.ones_like(rows, dtype=torch.bool)) for rows in ids]
    step = _engine_step(model, config, batches) if given.child == "engine" else _plain_step(model, config, batches)
    first_step_s = _seconds(step)
    for _ in range(given.warmup_steps - 1):
        step()
    print(_READY, flush=True)
    sys.stdin.readline()
    tokens = config.rows_per_step * given.context
    speed = Spread.of([tokens / _seconds(step) for _ in range(given.steps)])
    loss = step()
    share = utilization(speed.median, token_flops, peak_flops(config.precision))
    memory = torch.cuda.max_memory_allocated() if gpu else psutil.Process().memory_info().rss
    if given.profile:
        _write_profile(step, given.output / f"{config.base}-{config.micro_batch}-{given.child}.profile.txt")
    torch.distributed.destroy_process_group()
    return Measured(speed, share, memory, first_step_s, parameters, loss)


def _seconds(step: Callable[[], float]) -> float:
    """Of one step, which ends when its loss is there, so nothing is left on the device."""
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def _engine_step(model: Any, config: Any, batches: list[Any]) -> Callable[[], float]:
    from cert_ray.training.deepspeed_engine import Engine

    engine = Engine(model, config)
    return lambda: engine.train_step(batches, _RATE)[0]


def _plain_step(model: Any, config: Any, batches: list[Any]) -> Callable[[], float]:
    """The usual loop: weights in fp32, products in bf16."""
    import torch

    from cert_ray.training.attention import leave_out_masks
    from cert_ray.training.step import Learner

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    learner = Learner(leave_out_masks(model) if config.compile else model).to(device).train()
    optimizer = torch.optim.AdamW(learner.parameters(), lr=_RATE, betas=config.betas, fused=True)
    forward = torch.compile(learner, dynamic=False) if config.compile else learner
    tokens = sum(mask[:, 1:].numel() for _, mask in batches)

    def step() -> float:
        nats = torch.zeros((), device=device)
        for ids, mask in batches:
            with torch.autocast(device.type, torch.bfloat16):
                loss = forward(ids.to(device), mask.to(device)) / tokens
            loss.backward()
            nats += loss.detach()
        torch.nn.utils.clip_grad_norm_(learner.parameters(), config.max_gradient_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(nats)

    return step


def _write_profile(step: Callable[[], float], path: Path) -> None:
    import torch

    with torch.profiler.profile() as found:
        step()
        step()
    order = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(found.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=90))


def _config(given: argparse.Namespace, gpu: bool) -> Any:
    from cert_ray.training.config import TrainConfig

    return TrainConfig(
        base=given.base[0], tokens="-", output="-", steps=given.warmup_steps + given.steps, warmup_steps=0,
        micro_batch=given.micro_batch[0], gradient_accumulation=given.gradient_accumulation, precision="bf16",
        zero_stage=1, use_gpu=gpu, compile=not given.eager, activation_checkpointing=given.activation_checkpointing,
    )  # fmt: skip


if __name__ == "__main__":
    main()
