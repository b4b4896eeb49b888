"""Training speed of one worker beside Hugging Face Trainer and a plain PyTorch loop, in tokens/s on this CPU.

The same 12.5M Llama (`SHAPE`), rows, batch, bf16 and fused AdamW for all. In: nothing but random ids. Ours twice: the
DeepSpeed engine in a plain process, and the whole of `train` on a Ray of its own, whose steps are taken from its
losses' file. Peers: the Trainer as it comes and with torch_compile, the plain loop as it is and compiled. Each run is a
process; the contenders take turns, and the steps of the warm-up, compiling included, do not count.

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

from tests.bench.measuring import Spread, markdown, publish

TRAINER = Path(__file__).parent / "peers" / "hf_trainer.py"
VOCABULARY = 4_864
SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6,
    "num_key_value_heads": 6, "intermediate_size": 1_024, "tie_word_embeddings": True, "bos_token_id": 0,
    "eos_token_id": 0, "pad_token_id": 1,
}  # fmt: skip
OURS = ("engine", "ray")
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
    with tempfile.TemporaryDirectory(prefix="bench-training-") as folder:
        given.folder = Path(folder)
        _write_inputs(given)
        for _ in range(given.runs):
            for name in chosen:
                seconds = _run(name, given)
                rates[name].append(given.rows * given.context * len(seconds) / sum(seconds))
                print(f"{name}: {rates[name][-1]:,.0f} tokens/s", file=sys.stderr, flush=True)
    spreads = {name: Spread.of(values) for name, values in rates.items()}
    first = spreads[chosen[0]].median
    rows = [(name, spread, f"{first / spread.median:.2f}x") for name, spread in spreads.items()]
    sizes = f"{given.rows} x {given.context} tokens, {given.threads} threads, {given.steps} steps per run after "
    publish(
        given.output,
        "training",
        "python -m tests.bench.bench_training " + " ".join(sys.argv[1:]),
        [markdown(["contender", "tokens/s", f"{chosen[0]} is"], rows), f"{sizes}{given.warmup_steps} of warm-up."],
        {"tokens_per_s": spreads, "runs": rates},
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--peers", type=Path, help="the Python of the peers' environment; needed for the Trainer")
    parser.add_argument("--contender", action="append", choices=[*OURS, *PEERS], help="default: all")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="measured steps of a run")
    parser.add_argument("--warmup-steps", type=int, default=3)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
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


def _run(name: str, given: argparse.Namespace) -> list[float]:
    """Seconds of each measured step of one run of contender `name`, in a process of its own."""
    sizes = {"rows": given.rows, "warmup-steps": given.warmup_steps, "steps": given.steps, "threads": given.threads}
    options = [f"--{option}={value}" for option, value in sizes.items()]
    if name.startswith("trainer"):
        command = [str(given.peers), str(TRAINER), str(given.folder), *options]
        command += ["--compile"] if name == "trainer-compiled" else []
    else:
        command = [sys.executable, "-m", "tests.bench.bench_training", "--child", name, *options]
        command += ["--contender", name, f"--context={given.context}"]
        command += [f"--folder={given.folder}", f"--output={given.output}"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(given.threads), "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}: exit status {done.returncode}\n{done.stderr[-3000:]}")
    seconds: list[float] = json.loads(done.stdout.strip().splitlines()[-1])
    assert len(seconds) == given.steps, f"{name}: {len(seconds)} steps"
    return seconds


def _config(given: argparse.Namespace, output: str) -> Any:
    from cert_ray.training.config import TrainConfig

    return TrainConfig(
        base=str(given.folder), tokens=str(given.folder / "pack"), output=output, precision="bf16", zero_stage=1,
        steps=given.warmup_steps + given.steps, warmup_steps=0, micro_batch=given.rows, gradient_accumulation=1,
        cpus_per_worker=given.threads,
    )  # fmt: skip


def _batches(given: argparse.Namespace) -> list[Any]:
    import torch

    ids = torch.from_numpy(np.load(given.folder / "rows.npy"))
    return list(ids.split(given.rows))


def _clocked(given: argparse.Namespace, step: Callable[[Any], object]) -> list[float]:
    """Seconds of `step` for each batch after the warm-up."""
    ends = [time.perf_counter()]
    for batch in _batches(given):
        step(batch)
        ends.append(time.perf_counter())
    return np.diff(ends)[given.warmup_steps :].tolist()


def _model(given: argparse.Namespace) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(given.threads)
    return AutoModelForCausalLM.from_pretrained(given.folder, dtype=torch.float32)


def engine(given: argparse.Namespace) -> list[float]:
    """Our engine and step, one rank, without Ray."""
    import torch

    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}
    os.environ.update(place)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    from cert_ray.training.deepspeed_engine import Engine

    ours = Engine(_model(given), _config(given, "unused"))
    return _clocked(given, lambda ids: ours.train_step([(ids, torch.ones_like(ids, dtype=torch.bool))], 5e-4))


def on_ray(given: argparse.Namespace) -> list[float]:
    """All of `train`: Ray Train, rows from the pack, records; the seconds of its steps are those it wrote."""
    import ray

    from cert_ray.training.on_ray import train

    with tempfile.TemporaryDirectory(prefix="cr") as folder:
        ray.init(address="local", num_cpus=given.threads + 1, include_dashboard=False, _temp_dir=folder)
        result = train(_config(given, str(Path(folder) / "model")))
        records = [json.loads(line) for line in Path(result.metrics).read_text().splitlines()]
        ray.shutdown()
    tokens = np.diff([0, *(record["tokens"] for record in records)])
    seconds = [float(count) / record["tokens_per_s"] for count, record in zip(tokens, records, strict=True)]
    assert set(tokens.tolist()) == {given.rows * given.context}, "every token of a row is learned from"
    return seconds[given.warmup_steps :]


def plain(given: argparse.Namespace, *, compiled: bool = False) -> list[float]:
    """What one writes without a library: autocast, backward, clip, step."""
    import torch
    from torch.nn.functional import cross_entropy

    model = _model(given).train()
    forward = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step(ids: Any) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            logits = forward(input_ids=ids[:, :-1], use_cache=False).logits
        cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return _clocked(given, step)


CONTENDERS: dict[str, Callable[[argparse.Namespace], list[float]]] = {
    "engine": engine,
    "ray": on_ray,
    "plain": plain,
    "plain-compiled": lambda given: plain(given, compiled=True),
}


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
