"""Seconds from opening a pack to the first new step's rows, at a late step of a long run; beside a replay of the epoch.

In: a synthetic pack, as one stream (base's view) and as pairs that stay whole (the generator's). Ours: open and check
the pack, plan the step's epoch, read its rows, knowing from the checkpoint where epochs end; and without knowing, which
plans every epoch before. Replay: a loader that reads the rows of the epoch up to the step once more, which Trainer does
with an iterable dataset (`accelerate.skip_first_batches`); a sample of its steps is timed and scaled up. Loading the
weights and compiling come on top, in all of them alike.

Example: python -m tests.bench.bench_resume --output results
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tests.bench.measuring import Spread, markdown, publish

_SAMPLED_STEPS = 50
_VOCABULARY = 32_000


def main() -> None:
    """Measure both kinds of pack."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument("--epochs", type=int, default=20, help="that are over before the step")
    parser.add_argument("--context", type=int, default=1_024)
    parser.add_argument("--runs", type=int, default=3)
    given = parser.parse_args()
    rows, figures = [], {}
    for kind in ("one stream", "pairs"):
        with tempfile.TemporaryDirectory(prefix="bench-resume-") as folder:
            tokens = _write(folder, given, pairs=kind == "pairs")
            found = _measure(folder, given)
        figures[kind] = found
        cells = [found[name] for name in ("known", "unknown", "replay")]
        rows.append([kind, f"{given.documents:,}", f"{tokens / 1e6:.0f}M", f"{found['step']:,}", *cells])
    headers = [
        "pack",
        "documents",
        "tokens",
        "step",
        "ours, s",
        "without the epochs' ends, s",
        "replay of the epoch, s",
    ]
    command = "python -m tests.bench.bench_resume " + " ".join(sys.argv[1:])
    publish(given.output, "resume", command, [markdown(headers, rows), f"{given.runs} runs."], figures)


def _write(folder: str, given: argparse.Namespace, *, pairs: bool) -> int:
    """A pack of documents of log-normal length, of five pieces each where `pairs`; returns its tokens."""
    from cert_ray import manifests, schemas
    from cert_ray.manifests import ShardReport
    from cert_ray.tokens.pack import PackConfig
    from cert_ray.tokens.shards import UNIGRAMS, write_shard

    rng = np.random.default_rng(0)
    each = 5 if pairs else 1
    lengths = np.clip(rng.lognormal(5.7 - np.log(each), 0.8, given.documents * each), 4, given.context).astype(np.int64)
    starts = np.cumsum(lengths) - lengths
    columns = [np.repeat(np.arange(given.documents), each).astype(np.int32), starts, lengths.astype(np.int32)]
    weights, held_out = np.ones(len(lengths)), np.zeros(len(lengths), bool)
    arrays = [pa.array(column) for column in (*columns, weights, held_out, np.full(len(lengths), pairs))]
    pieces = pa.Table.from_arrays(arrays, schema=schemas.PIECES)
    ids = rng.integers(2, _VOCABULARY, int(lengths.sum())).astype("<u2")
    files = write_shard(folder, "shard-00000", ids, pieces, UNIGRAMS.empty_table())
    count = given.documents
    report = ShardReport(shard="shard-00000", unit_digest="0", files=files, rows_read=count, rows_kept=count)
    notes = {"vocab_size": _VOCABULARY, "tokenizer_digest": "0", "pad_id": 1, "end_id": 0}
    config = PackConfig(view="generator" if pairs else "base", context_tokens=given.context)
    manifests.write_manifest(folder, manifests.summarize("tokens", config, "0", [report], notes))
    return len(ids)


def _measure(folder: str, given: argparse.Namespace) -> dict[str, Any]:
    from cert_ray.tokens.shards import PackedTokens
    from cert_ray.training.batches import Batches
    from cert_ray.training.config import TrainConfig

    config = TrainConfig(base="-", tokens=folder, output="-", steps=10**6, warmup_steps=0)
    before = Batches(PackedTokens.open(folder), config, 0, 1)
    before.epoch_of(0)
    per_epoch = before.ends[0] // config.rows_per_step
    step = per_epoch * given.epochs + per_epoch * 9 // 10  # late in its epoch, too
    before.of_step(step)

    def resume(ends: list[int]) -> float:
        started = time.perf_counter()
        Batches(PackedTokens.open(folder), config, 0, 1, ends).of_step(step)
        return time.perf_counter() - started

    def replay() -> float:
        started = time.perf_counter()
        for earlier in range(step - _SAMPLED_STEPS, step):
            before.of_step(earlier)
        return (time.perf_counter() - started) / _SAMPLED_STEPS * (per_epoch * 9 // 10)

    runs = range(given.runs)
    return {
        "step": step,
        "known": Spread.of([resume(before.ends) for _ in runs]),
        "unknown": Spread.of([resume([])]),
        "replay": Spread.of([replay() for _ in runs]),
    }


if __name__ == "__main__":
    main()
