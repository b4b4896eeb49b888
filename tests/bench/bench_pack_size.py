"""What a pack of a real run's size costs each worker before its first step: seconds and memory; tokens are made up.

In: the number of documents. A pack is written whose index (pieces, weights, held-out marks) is whole, while its tokens
are empty files of the right length, which take no disk. Out, of `--workers` processes of one machine that start
together, the most of any: CPU seconds, and seconds, to open the pack, at the first start on a machine and again; CPU
seconds to the rows of a step late in the 21st epoch, and of the next one; memory of a process alone (USS), and with its
part of what they share (PSS).

Example: python -m tests.bench.bench_pack_size --output results --work WORK --documents 60000000
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa

from tests.bench.measuring import markdown, publish

_VOCABULARY = 32_000
_EPOCHS_OVER = 20
_MEAN_TOKENS = 1_667  # 100 billion in 60 million documents
_PIECES = {"one stream": 1, "pairs": 5}
_HELD_OUT = 0.01
_COLUMNS = ("open", "open_wall", "late", "next", "uss", "pss")


def main() -> None:
    """Measure each kind of pack, on a machine that sees it for the first time and again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--shards", type=int, default=1_000)
    parser.add_argument("--context", type=int, default=1_024)
    parser.add_argument("--workers", type=int, default=1, help="processes at once")
    parser.add_argument("--kind", choices=list(_PIECES), action="append")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        print(json.dumps(_work(given.worker, given.documents)))
        return
    rows, figures = [], {}
    for kind in given.kind or _PIECES:
        folder = given.work / f"pack-{given.documents}-{kind.replace(' ', '-')}"
        if not (folder / "manifest.json").is_file():
            _write(folder, given, kind)
        temporary = given.work / "tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        for when in ("first", "again"):
            found = _together(folder, temporary, given)
            kept = sum(path.stat().st_size for path in temporary.rglob("*") if path.is_file())
            figures[f"{kind}, {when}"] = found
            worst = [max(worker[name] for worker in found) for name in _COLUMNS]
            cells = [f"{value:.3g}" for value in worst[:4]] + [f"{value / 1e9:.2f}" for value in worst[4:]]
            rows.append([kind, when, len(found), *cells, f"{kept / 1e9:.2f}"])
            print(rows[-1], flush=True)
        shutil.rmtree(temporary)
    headers = ["pack", "start", "processes", "open, CPU s", "open, s", "to the late step's rows, CPU s"]
    headers += ["next step's rows, CPU s", "own memory, GB", "with its part of shared, GB", "below TMPDIR, GB"]
    command = "python -m tests.bench.bench_pack_size " + " ".join(sys.argv[1:])
    publish(given.output, "pack_size", command, [markdown(headers, rows)], figures)


def _together(folder: Path, temporary: Path, given: argparse.Namespace) -> list[dict[str, float]]:
    """What each of the processes found."""
    command = [sys.executable, "-m", "tests.bench.bench_pack_size", "--worker", str(folder)]
    command += ["--documents", str(given.documents)]
    environment = {**os.environ, "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"}

    def one(_: int) -> dict[str, float]:
        done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE)
        found: dict[str, float] = json.loads(done.stdout)
        return found

    with ThreadPoolExecutor(given.workers) as starters:
        return list(starters.map(one, range(given.workers)))


def _work(folder: str, documents: int) -> dict[str, float]:
    """As a worker does: open, plan what the step lies in, read its rows, and those of the next."""
    import torch  # noqa: F401 - whose memory is no news

    from cert_ray.tokens.shards import PackedTokens
    from cert_ray.training import sampling
    from cert_ray.training.batches import Batches
    from cert_ray.training.config import TrainConfig

    config = TrainConfig(base="-", tokens=folder, output="-", steps=10**7, warmup_steps=0, workers=16, eval_rows=512)
    before = psutil.Process().memory_full_info()
    started, began_s = _cpu_s(), time.perf_counter()
    packed = PackedTokens.open(folder, verify=False)
    opened, open_wall = _cpu_s(), time.perf_counter() - began_s
    per_segment = getattr(sampling, "SEGMENT_DOCUMENTS", documents)
    segments = -(-round(documents * (1 - _HELD_OUT)) // per_segment)
    rows = min(documents, per_segment) * _MEAN_TOKENS // 1_025  # about what a segment has
    ends = [rows * (number + 1) for number in range(_EPOCHS_OVER * segments + segments // 2)]
    batches = Batches(packed, config, 3, 16, ends)
    step = (ends[-1] + rows // 2) // config.rows_per_step
    batches.of_step(step)
    read = _cpu_s()
    batches.of_step(step + 1)
    after = psutil.Process().memory_full_info()
    return {
        "open": opened - started,
        "open_wall": open_wall,
        "late": read - opened,
        "next": _cpu_s() - read,
        "uss": after.uss - before.uss,
        "pss": after.pss - before.pss,
    }


def _cpu_s() -> float:
    """CPU seconds of this process, its threads, and children that have ended."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def _write(folder: Path, given: argparse.Namespace, kind: str) -> None:
    """A pack of documents of log-normal length and weight, in shards whose tokens are holes."""
    from cert_ray import manifests
    from cert_ray.manifests import ShardReport
    from cert_ray.tokens.pack import PackConfig

    folder.mkdir(parents=True)
    each, context = given.documents // given.shards, given.context
    reports: list[ShardReport] = []
    started = time.perf_counter()
    for number in range(given.shards):
        files = _shard(folder, f"shard-{number:05d}", np.random.default_rng(number), each, _PIECES[kind], context)
        reports.append(
            ShardReport(shard=f"shard-{number:05d}", unit_digest="0", files=files, rows_read=each, rows_kept=each)
        )
    notes = {"vocab_size": _VOCABULARY, "tokenizer_digest": "0", "pad_id": 1, "end_id": 0}
    config = PackConfig(view="generator" if kind == "pairs" else "base", context_tokens=context)
    manifests.write_manifest(str(folder), manifests.summarize("tokens", config, "0", reports, notes))
    print(f"wrote {folder} in {time.perf_counter() - started:.0f} s", file=sys.stderr)


def _shard(folder: Path, name: str, rng: np.random.Generator, documents: int, pieces: int, context: int) -> Any:
    from cert_ray import schemas, storage
    from cert_ray.manifests import WrittenFile

    count, mean = documents * pieces, _MEAN_TOKENS / pieces
    lengths = rng.lognormal(np.log(mean) - 0.32, 0.8, count)  # of which the mean is e to the 0.32 above the median
    lengths = np.clip(lengths, 4, context if pieces > 1 else None).astype(np.int64)
    columns = {
        "document": np.repeat(np.arange(documents, dtype=np.int32), pieces),
        "start": np.cumsum(lengths) - lengths,
        "tokens": lengths.astype(np.int32),
        "weight": np.repeat(rng.lognormal(0, 0.5, documents), pieces),
        "held_out": np.repeat(rng.random(documents) < _HELD_OUT, pieces),
        "atomic": np.full(count, pieces > 1),
    }
    table = pa.Table.from_arrays([pa.array(columns[field.name]) for field in schemas.PIECES], schema=schemas.PIECES)
    written = storage.write_parquet(table, str(folder / f"{name}.pieces.parquet"))
    tokens = folder / f"{name}.bin"
    with tokens.open("wb") as hole:
        hole.truncate(2 * int(lengths.sum()))
    return (
        WrittenFile(name=tokens.name, rows=int(lengths.sum()), size_bytes=tokens.stat().st_size, checksum="0"),
        WrittenFile(
            name=f"{name}.pieces.parquet", rows=count, size_bytes=written.size_bytes, checksum=written.checksum
        ),
    )


if __name__ == "__main__":
    main()
