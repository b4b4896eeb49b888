"""Training speed of one worker beside Hugging Face Trainer and a plain PyTorch loop, on this CPU.

The same 12.5M Llama (`SHAPE`), rows, batch, precision and fused AdamW for all. In: nothing but random ids. Ours: the
DeepSpeed engine in a plain process, eager and compiled, and the whole of `train` on a Ray of its own, compiled. Peers:
the Trainer as it comes and with torch_compile, the plain loop as it is and compiled. Each run is a process; the
contenders take turns. Out: tokens/s by the clock, tokens per CPU-second of the training process (on a machine that does
other work too, with --threads 1, the figure to go by), and, apart, the first step, which compiles.

Example: python -m tests.bench.bench_training --output results --peers .venv-bench/bin/python
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.bench.measuring import Spread, markdown, peers_python, publish

TRAINER = Path(__file__).parent / "peers" / "hf_trainer.py"
VOCABULARY = 4_864
SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6,
    "num_key_value_heads": 6, "intermediate_size": 1_024, "tie_word_embeddings": True, "bos_token_id": 0,
    "eos_token_id": 0, "pad_token_id": 1,
}  # fmt: skip
OURS = ("ray", "engine", "engine-eager")
PEERS = ("plain", "plain-compiled", "trainer", "trainer-compiled")


def main() -> None:
    """Take turns, or, as a child, do one run and print its steps' seconds."""
    given = _arguments()
    warnings.simplefilter("ignore")
    if given.child:
        print(json.dumps(CONTENDERS[given.child](given)))
        return
    chosen = given.contender or [*OURS, *PEERS]
    rates: dict[str, list[float]] = {name: [] for name in chosen}
    cpu_rates: dict[str, list[float]] = {name: [] for name in chosen}
    starts: dict[str, list[float]] = {name: [] for name in chosen}
    with tempfile.TemporaryDirectory(prefix="bench-training-") as folder:
        given.folder = Path(folder)
        _write_inputs(given)
        for _ in range(given.runs):
            for name in chosen:
                ticks = _run(name, given)
                wall_s, cpu_s = np.diff(ticks, axis=0)[given.warmup_steps :].sum(axis=0)
                tokens = given.rows * given.context * given.steps
                rates[name].append(tokens / wall_s)
                cpu_rates[name].append(tokens / cpu_s)
                starts[name].append(ticks[1][0] - ticks[0][0])
                print(f"{name}: {tokens / wall_s:,.0f} tokens/s, {tokens / cpu_s:,.0f} per CPU-s", file=sys.stderr)
    spreads, cpu_spreads = ({name: Spread.of(found[name]) for name in chosen} for found in (rates, cpu_rates))
    first, first_cpu = spreads[chosen[0]].median, cpu_spreads[chosen[0]].median
    rows = [
        (
            name,
            spreads[name],
            f"{first / spreads[name].median:.2f}x",
            cpu_spreads[name],
            f"{first_cpu / cpu_spreads[name].median:.2f}x",
            Spread.of(starts[name]),
        )
        for name in chosen
    ]
    headers = ["contender", "tokens/s", f"{chosen[0]} is", "tokens per CPU-s", f"{chosen[0]} is", "first step, s"]
    sizes = f"{given.rows} x {given.context} tokens, {given.precision}, {given.threads} threads, {given.steps} steps "
    publish(
        given.output,
        "training",
        "python -m tests.bench.bench_training " + " ".join(sys.argv[1:]),
        [markdown(headers, rows), f"{sizes}per run after {given.warmup_steps} of warm-up."],
        {"tokens_per_s": rates, "tokens_per_cpu_s": cpu_rates, "first_step_s": starts},
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--peers", type=peers_python, help="the Python of the peers' environment; needed for the Trainer"
    )
    parser.add_argument("--contender", action="append", choices=[*OURS, *PEERS], help="default: all")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="measured steps of a run")
    parser.add_argument("--warmup-steps", type=int, default=3)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16", help="of all contenders")
    parser.add_argument("--seed", type=int, default=0, help="of the ids")
    parser.add_argument("--child", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    wanted = given.contender or [*OURS, *PEERS]
    if given.peers is None and any(name.startswith("trainer") for name in wanted):
        parser.error("--peers: needed for the Trainer; or leave it out with --contender")
    return given


def _write_inputs(given: argparse.Namespace) -> None:
    """config.json and rows.npy, and for `train` the weights, a tokenizer and a pack of documents of random ids."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from tests.training.conftest import write_tokenizer

    shape = LlamaConfig(**SHAPE, max_position_embeddings=given.context)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(shape, dtype=torch.float32).save_pretrained(given.folder)
    tokenizer = write_tokenizer(given.folder, words=VOCABULARY - 2)
    count = given.rows * (given.warmup_steps + given.steps)
    ids = np.random.default_rng(given.seed).integers(2, VOCABULARY, (count, given.context + 1))
    np.save(given.folder / "rows.npy", ids)
    _write_pack(given, ids, tokenizer)


def _write_pack(given: argparse.Namespace, ids: Any, tokenizer: Any) -> None:
    """One document per row, none held out: evaluation would stand between the steps."""
    import pyarrow as pa

    from cert_ray import manifests, schemas
    from cert_ray.manifests import ShardReport
    from cert_ray.tokens.pack import PackConfig
    from cert_ray.tokens.shards import UNIGRAMS, write_shard
    from cert_ray.tokens.vocabulary import tokenizer_digest

    count, length = ids.shape
    columns = (range(count), range(0, count * length, length), [length] * count, [1.0] * count)
    flags = ([False] * count, [False] * count)
    pieces = pa.table(dict(zip(schemas.PIECES.names, (*columns, *flags), strict=True)), schema=schemas.PIECES)
    pack = str(given.folder / "pack")
    files = write_shard(pack, "shard-00000", ids.ravel().astype("<u2"), pieces, UNIGRAMS.empty_table())
    report = ShardReport(shard="shard-00000", unit_digest="0", files=files, rows_read=count, rows_kept=count)
    notes = {"vocab_size": VOCABULARY, "tokenizer_digest": tokenizer_digest(tokenizer), "pad_id": 1, "end_id": 0}
    config = PackConfig(view="base", context_tokens=given.context)
    manifests.write_manifest(pack, manifests.summarize("tokens", config, "0", [report], notes))


def _run(name: str, given: argparse.Namespace) -> list[tuple[float, float]]:
    """The clock and the CPU-seconds at the start and after each step of a run of `name`, in a process of its own."""
    sizes = {"rows": given.rows, "warmup-steps": given.warmup_steps, "steps": given.steps, "threads": given.threads}
    options = [f"--{option}={value}" for option, value in sizes.items()]
    if name.startswith("trainer"):
        command = [str(given.peers), str(TRAINER), str(given.folder), *options]
        command += ["--compile"] if name == "trainer-compiled" else []
        command += ["--fp32"] if given.precision == "fp32" else []
    else:
        command = [sys.executable, "-m", "tests.bench.bench_training", "--child", name, *options]
        command += ["--contender", name, f"--context={given.context}", f"--precision={given.precision}"]
        command += [f"--folder={given.folder}", f"--output={given.output}"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(given.threads), "DS_ACCELERATOR": "cpu"}
    # Every run compiles anew: the first step's time is a cold one, and a broken cache of others does no harm.
    environment["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(dir=given.folder)
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}: exit status {done.returncode}\n{done.stderr[-3000:]}")
    ticks: list[tuple[float, float]] = json.loads(done.stdout.strip().splitlines()[-1])
    assert len(ticks) == 1 + given.warmup_steps + given.steps, f"{name}: {len(ticks) - 1} steps"
    return ticks


def _config(given: argparse.Namespace, output: str, *, compiled: bool) -> Any:
    from cert_ray.training.config import TrainConfig

    return TrainConfig(
        base=str(given.folder), tokens=str(given.folder / "pack"), output=output, precision=given.precision,
        zero_stage=1, steps=given.warmup_steps + given.steps, warmup_steps=0, micro_batch=given.rows,
        gradient_accumulation=1, cpus_per_worker=given.threads, compile=compiled,
    )  # fmt: skip


def _batches(given: argparse.Namespace) -> list[Any]:
    import torch

    ids = torch.from_numpy(np.load(given.folder / "rows.npy"))
    return list(ids.split(given.rows))


def _tick() -> tuple[float, float]:
    return time.time(), time.process_time()


def _clocked(given: argparse.Namespace, step: Callable[[Any], object]) -> list[tuple[float, float]]:
    """Ticks at the start and after `step` of each batch."""
    ticks = [_tick()]
    for batch in _batches(given):
        step(batch)
        ticks.append(_tick())
    return ticks


def _model(given: argparse.Namespace) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(given.threads)
    return AutoModelForCausalLM.from_pretrained(given.folder, dtype=torch.float32)


def engine(given: argparse.Namespace, *, compiled: bool = True) -> list[tuple[float, float]]:
    """Our engine and step, one rank, without Ray."""
    import torch

    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}
    os.environ.update(place)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    from cert_ray.training.deepspeed_engine import Engine

    ours = Engine(_model(given), _config(given, "unused", compiled=compiled))
    return _clocked(given, lambda ids: ours.train_step([(ids, torch.ones_like(ids, dtype=torch.bool))], 5e-4))


class _Ticks:
    """Writes a line after each step, in the worker."""

    def __init__(self, file: str) -> None:
        self._file = file

    def __call__(self, step: int, rank: int) -> None:
        with open(self._file, "a") as lines:  # noqa: PTH123
            lines.write(json.dumps(_tick()) + "\n")


def on_ray(given: argparse.Namespace) -> list[tuple[float, float]]:
    """All of `train`: Ray Train, rows from the pack, records. Its first step counts from the call of `train`."""
    import ray

    from cert_ray.training.on_ray import train

    with tempfile.TemporaryDirectory(prefix="cr") as folder:
        ray.init(address="local", num_cpus=given.threads + 1, include_dashboard=False, _temp_dir=folder)
        ticks, start = Path(folder) / "ticks", time.time()
        result = train(_config(given, str(Path(folder) / "model"), compiled=True), after_step=_Ticks(str(ticks)))
        ray.shutdown()
        assert result.tokens == result.steps * given.rows * given.context, "every token of a row is learned from"
        return [(start, 0.0), *(tuple(json.loads(line)) for line in ticks.read_text().splitlines())]


def plain(given: argparse.Namespace, *, compiled: bool = False) -> list[tuple[float, float]]:
    """What one writes without a library: autocast, backward, clip, step."""
    import torch
    from torch.nn.functional import cross_entropy

    model = _model(given).train()
    forward = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step(ids: Any) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=given.precision == "bf16"):
            logits = forward(input_ids=ids[:, :-1], use_cache=False).logits
        cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return _clocked(given, step)


CONTENDERS: dict[str, Callable[[argparse.Namespace], list[tuple[float, float]]]] = {
    "ray": on_ray,
    "engine": engine,
    "engine-eager": lambda given: engine(given, compiled=False),
    "plain": plain,
    "plain-compiled": lambda given: plain(given, compiled=True),
}


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
