"""Memory of preprocessing's driver beside dedup's arrays: the sample that near-dedup is judged on, the card's examples.

In: numbers of documents, of two kilobytes each, cut into 64 shards as preprocessing cuts its input. Their texts and
sketches are made up, a fifth of them are near duplicates, and nothing is cleaned or sketched: only what the driver
reads is there. Out: the driver's anonymous memory before, and at its peak, each size in a process of its own, and the
slope between the first size and the last. Linux only.

With `--loose-files N`: what the driver holds while it plans a folder of so many loose files and hands the units over,
paths of 80 characters, in bytes per file.

Examples:
    python -m tests.bench.bench_driver_memory --documents 100000 --documents 1000000
    python -m tests.bench.bench_driver_memory --loose-files 500000
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa

from cert_ray import storage
from cert_ray.corpus.sources import SourceConfig, plan_units
from cert_ray.dedup.decisions import Clusters
from cert_ray.dedup.minhash import MinHashConfig
from cert_ray.dedup.quality import QualityConfig, measure_quality
from cert_ray.shards.units import shard_name
from tests.bench.measuring import machine

SHARDS = 64
_DIFFERENT_SHARDS = QualityConfig().shards  # as many are read; the others are links to them
_TEXT_CHARS = 2_100
_SHOWN_SHARDS = 5  # as `card.examples` reads
_LOOK_EVERY_S = 0.01


def write_shards(folder: Path, rows: int, seed: int) -> None:
    """`SHARDS` shards of `rows` documents, and of as many rows of a dataset, with the columns that the driver reads."""
    generator = np.random.default_rng(seed)
    words = np.array([f"word_{index}" for index in range(5_000)])
    text = " ".join(words[np.minimum(generator.zipf(1.2, 300_000), len(words) - 1)])
    content = pa.array([text[at : at + _TEXT_CHARS] for at in generator.integers(0, len(text) - _TEXT_CHARS, rows)])
    size = pa.array(np.full(rows, _TEXT_CHARS, np.int32))
    placeholder = [{"start": 10 * n, "end": 10 * n + 3, "kind": "number"} for n in range(30)]
    segment = [
        {"code_start": n, "code_end": n + 1, "sketch_start": n, "sketch_end": n + 1, "with_sketch": True}
        for n in range(6)
    ]
    columns = {"content": content, "sketch": content, "size_bytes": size}
    lists = {"placeholders": pa.array([placeholder] * rows), "segments": pa.array([segment] * rows)}
    names = {name: pa.array([name] * rows) for name in ("doc_id", "repository", "path")}
    storage.write_parquet(pa.table({**columns, **lists, **names}), str(folder / "dataset" / "rows.parquet"))
    for index in range(SHARDS):
        document = folder / "documents" / f"{shard_name(index)}.parquet"
        if index < _DIFFERENT_SHARDS:
            hashes = pa.py_buffer(generator.integers(0, 1 << 62, (rows, 2), np.uint64).tobytes())
            packed = pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), rows, [None, hashes])
            columns = {"content": content, "content_hash": packed, "size_bytes": size}
            storage.write_parquet(pa.table(columns), str(document))
        else:
            os.link(document.with_name(f"{shard_name(index - _DIFFERENT_SHARDS)}.parquet"), document)


def clusters_of(documents: int, seed: int) -> Clusters:
    """A fifth of the documents dropped for the one before."""
    generator = np.random.default_rng(seed)
    survivor_D = np.arange(documents)
    dropped = generator.choice(documents, documents // 5, replace=False)
    survivor_D[dropped] = np.maximum(dropped - 1, 0)
    while (survivor_D[survivor_D] != survivor_D).any():
        survivor_D = survivor_D[survivor_D]
    return Clusters(survivor_D, np.bincount(survivor_D, minlength=documents)[survivor_D])


def anonymous_bytes() -> int:
    """What the process holds that is no file's."""
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024


def run_driver(folder: Path, rows: int, seed: int) -> dict[str, int]:
    """Anonymous bytes before, and at the peak of both steps. What they import is there before."""
    import jinja2  # noqa: F401
    import matplotlib.backends.backend_svg  # noqa: F401
    from scipy import stats  # noqa: F401

    from cert_ray.dataset import card

    clusters = clusters_of(rows * SHARDS, seed)
    shards = [shard_name(index) for index in range(SHARDS)]

    def judge_and_show() -> None:
        measure_quality(str(folder / "documents"), shards, [rows] * SHARDS, clusters, MinHashConfig(), QualityConfig())
        for _ in range(_SHOWN_SHARDS):
            list(card._candidates(str(folder / "dataset"), "rows"))

    return watched(judge_and_show)


def watched(work: Callable[[], object]) -> dict[str, int]:
    """Anonymous bytes before `work`, and at its peak."""
    before = peak = anonymous_bytes()
    ended = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(_LOOK_EVERY_S):
            peak = max(peak, anonymous_bytes())

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    work()
    ended.set()
    watching.join()
    return {"before": before, "peak": peak}


def loose_files(count: int) -> list[storage.FileEntry]:
    """The listing of a folder of repositories, twenty files in each."""
    folder = "source/" * 7
    names = (f"/corpus/{file // 20:010d}/{folder}module_{file % 20:02d}.py" for file in range(count))
    return [storage.FileEntry(name, 5_000, f"{file:019d}") for file, name in enumerate(names)]


def plan_loose_files(count: int) -> dict[str, int]:
    """Anonymous bytes before, and at the peak of listing, planning and describing the units to Ray."""
    from cert_ray.shards.on_ray import _row_of

    def listed(url: str) -> list[storage.FileEntry]:
        return loose_files(count)

    def plan() -> list[dict[str, str]]:
        with (
            mock.patch.object(storage, "list_files", listed),
            mock.patch.object(storage, "is_folder", return_value=True),
        ):
            units = plan_units(SourceConfig(inputs=("/corpus",), include=("*",)))
        return [_row_of(unit) for unit in units]

    return watched(plan)


def measure(documents: int, seed: int) -> dict[str, int]:
    """`run_driver` in a process that does nothing else."""
    rows = documents // SHARDS
    with tempfile.TemporaryDirectory() as folder:
        write_shards(Path(folder), rows, seed)
        child = [sys.executable, "-m", "tests.bench.bench_driver_memory", "--child", folder, "--rows", str(rows)]
        found: dict[str, int] = json.loads(subprocess.run(child, check=True, capture_output=True).stdout)
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, action="append", help="repeatable; default 100000 and 1000000")
    parser.add_argument("--loose-files", type=int, metavar="N")
    parser.add_argument("--seed", type=int, default=1, help="(%(default)s)")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(run_driver(given.child, given.rows, given.seed)))
        return
    if given.loose_files:
        used = plan_loose_files(given.loose_files)
        each = (used["peak"] - used["before"]) / given.loose_files
        print(f"{given.loose_files:,} loose files: {each:.0f} bytes for each; {time.strftime('%Y-%m-%d')}")
        return
    sizes = given.documents or [100_000, 1_000_000]
    found = [measure(documents, given.seed) for documents in sizes]
    for documents, used in zip(sizes, found, strict=True):
        print(f"{documents:,} documents: {used['before'] / 1e6:.0f} MB before, {used['peak'] / 1e6:.0f} MB at the peak")
    if len(sizes) > 1:
        slope = (found[-1]["peak"] - found[0]["peak"]) / (sizes[-1] - sizes[0])
        print(f"{slope:.0f} bytes per document")
    where = machine()
    print(f"{where['processor']}, {time.strftime('%Y-%m-%d')}")


if __name__ == "__main__":
    main()
