"""Our side of a benchmark, in a process of its own, so that its time and memory are counted like a peer's.

Jobs: `preprocess` (the whole job, stage by stage), `dedup` (tables in, survivors out), `parse` (`ast.parse` and nothing
else, on a pool). In: a folder of Parquet tables with a column `content`. Out: one line of JSON.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import importlib
import json
import multiprocessing
import os
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
import xxhash
import yaml

from cert_ray import manifests, storage
from cert_ray.corpus.inputs import SourceConfig
from cert_ray.dataset import on_ray as dataset_on_ray
from cert_ray.dataset.options import PreprocessConfig
from cert_ray.dedup.minhash import MinHashConfig
from cert_ray.dedup.on_ray import deduplicate
from cert_ray.manifests import ShardReport
from cert_ray.operations.recipe import override
from cert_ray.schemas import DOCUMENTS
from cert_ray.shards.on_ray import run_units
from cert_ray.shards.units import WorkUnit, attempt, inputs_digest, shard_name, write_table
from tests.bench import stages
from tests.bench.measuring import Usage, cpu_by_kind


def main() -> None:
    """Run one job and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=("preprocess", "dedup", "parse"))
    parser.add_argument("--tables", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--pool", action="store_true", help="preprocess on a plain process pool instead of Ray")
    parser.add_argument("--by-stage", action="store_true", help="preprocess: what each stage used")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="an option of preprocessing")
    given = parser.parse_args()
    if given.job == "parse":
        figures = parse_all(given.tables, given.workers)
    elif given.job == "dedup":
        figures = dedup(given.tables, given.output, given.workers)
    else:
        figures = preprocess(given.tables, given.output, given.workers, given.pool, given.by_stage, given.set)
    print(json.dumps(figures))


def preprocess(
    tables: Path, output: Path, workers: int, pool: bool, by_stage: bool, assignments: list[str]
) -> dict[str, Any]:
    """The whole job. Ray and its worker processes are up before the clock starts.

    Args:
        by_stage: look at the whole process tree at each border of a stage as well, which takes time itself: more of it
            the more processes there are, so not for comparing Ray with a pool.
    """
    options: dict[str, Any] = {"sources": {"inputs": [str(tables)], "open_containers": True}}
    for text in assignments:
        key, _, value = text.partition("=")
        override(options, key, yaml.safe_load(value))
    config = PreprocessConfig.from_mapping(options, "bench")

    def run() -> tuple[float, Any, dict[str, Usage]]:
        if by_stage:
            manifest, used = stages.preprocess(config, output, workers, pool)
            return sum(stage.wall_s for stage in used.values()), manifest, used
        with stages.pooled(workers) if pool else contextlib.nullcontext():
            before, started = cpu_by_kind(os.getpid()), time.perf_counter()
            manifest = dataset_on_ray.preprocess(config, str(output), workers)
            seconds = time.perf_counter() - started
            cpu_s.update(cpu_by_kind(os.getpid()))
            cpu_s.subtract(before)
            return seconds, manifest, {}

    cpu_s: Counter[str] = Counter()
    seconds, manifest, used = run() if pool else _on_ray(run)
    return {
        "seconds": seconds,
        "rows_read": manifest.rows_read,
        "rows_kept": manifest.rows_kept,
        "dropped": manifest.dropped,
        "cpu_s": {kind: round(used, 2) for kind, used in cpu_s.most_common() if used > 0},
        "stages": {
            name: {**asdict(usage), "written_bytes": stages.written_bytes(output, name)} for name, usage in used.items()
        },
    }


def _on_ray(work: Callable[[], Any]) -> Any:
    # As datatrove's side: without a dashboard, whose dozen processes would be starting while the clock runs.
    with tempfile.TemporaryDirectory(prefix="cr", ignore_cleanup_errors=True) as folder:
        ray.init(address="local", include_dashboard=False, log_to_driver=False, _temp_dir=folder)
        try:
            _bring_up(int(ray.cluster_resources()["CPU"]))
            return work()
        finally:
            ray.shutdown()


def _bring_up(workers: int) -> None:
    """Worker processes, their imports, and the actors which Ray Data keeps for a cluster, before the clock starts.

    As of the pool: its processes import this module when they start.
    """
    processes: set[int] = set()
    for _ in range(5):
        dataset = ray.data.range(4 * workers, override_num_blocks=4 * workers).map_batches(_process_id, batch_size=1)
        processes.update(row["process"] for row in dataset.iter_rows())
        if len(processes) >= workers:
            return
    raise RuntimeError(f"only {len(processes)} of {workers} worker processes came up")


def _process_id(batch: dict[str, Any]) -> dict[str, Any]:
    """Of a task that takes a moment, so that all worker processes get some."""
    importlib.import_module("tests.bench.ours")
    time.sleep(0.2)
    return {"process": [os.getpid()]}


def dedup(tables: Path, output: Path, workers: int) -> dict[str, Any]:
    """Tables in, survivors out: hash, deduplicate, write what is left. Also `clusters.parquet`, by row of the input."""
    folder = storage.absolute(str(output))
    documents = storage.join(folder, "documents")
    units = [
        WorkUnit(name=shard_name(index), payload=payload, weight=payload["size_bytes"])
        for index, payload in enumerate(_row_groups(tables))
    ]

    def run() -> tuple[float, Any]:
        started = time.perf_counter()
        with attempt(documents, "documents", "bench", "") as begun:
            hashed = run_units(units, functools.partial(_write_hashed, folder=documents), begun, workers=workers)
            notes = {"generations": [len(units)]}
            manifest = manifests.summarize("documents", MinHashConfig(), inputs_digest(units), hashed, notes)
            manifests.write_manifest(documents, manifest)
        clusters = deduplicate(documents, manifest, storage.join(folder, "dedup"), MinHashConfig(), workers)
        kept = storage.join(folder, "kept")
        with attempt(kept, "kept", "bench", "") as begun:
            run_units(units, functools.partial(_write_survivors, folder=kept, run=folder), begun, workers=workers)
        return time.perf_counter() - started, clusters

    seconds, clusters = _on_ray(run)
    parts = [storage.read_parquet(storage.join(folder, "dedup/clusters", f"{unit.name}.parquet")) for unit in units]
    storage.write_parquet(pa.concat_tables(parts), storage.join(folder, "clusters.parquet"))
    return {"seconds": seconds, "rows_read": clusters.rows_read, "rows_kept": clusters.rows_kept}


def _row_groups(tables: Path) -> list[dict[str, Any]]:
    """The row groups of every table, in order, as units of the size that preprocessing takes."""
    units: list[dict[str, Any]] = []
    paths = sorted(tables.glob("*.parquet"))
    unit_bytes = SourceConfig(inputs=(str(tables),)).unit_bytes_of(sum(path.stat().st_size for path in paths))
    for path in paths:
        metadata = pq.read_metadata(path)
        size_bytes = 0
        for group in range(metadata.num_row_groups):
            if not units or units[-1]["file"] != str(path) or size_bytes >= unit_bytes:
                units.append({"file": str(path), "row_groups": [], "size_bytes": 0})
                size_bytes = 0
            units[-1]["row_groups"].append(group)
            size_bytes += metadata.row_group(group).total_byte_size
            units[-1]["size_bytes"] = size_bytes
    return units


def _write_hashed(unit: WorkUnit, folder: str) -> ShardReport:
    with pq.ParquetFile(unit.payload["file"]) as opened:
        contents = opened.read_row_groups(unit.payload["row_groups"], columns=["content"]).column("content")
    encoded = [text.encode() for text in contents.to_pylist()]
    known = {
        "content": contents,
        "size_bytes": pa.array(map(len, encoded), pa.int32()),
        "content_hash": pa.array(map(xxhash.xxh3_128_digest, encoded), pa.binary(16)),
    }
    columns = [known.get(field.name, pa.nulls(len(encoded), field.type)) for field in DOCUMENTS]
    file = write_table(folder, f"{unit.name}.parquet", pa.table(columns, schema=DOCUMENTS))
    return ShardReport(
        shard=unit.name,
        unit_digest="",
        files=(file,),
        rows_read=len(encoded),
        rows_kept=len(encoded),
        counts={"content_bytes": sum(map(len, encoded))},
    )


def _write_survivors(unit: WorkUnit, folder: str, run: str) -> ShardReport:
    name = f"{unit.name}.parquet"
    documents = storage.read_parquet(storage.join(run, "documents", name), ["content"])
    keep = storage.read_parquet(storage.join(run, "dedup", "clusters", name), ["keep"]).column("keep")
    survivors = documents.filter(keep)
    file = write_table(folder, name, survivors)
    rows = len(survivors)
    return ShardReport(shard=unit.name, unit_digest="", files=(file,), rows_read=rows, rows_kept=rows)


def parse_all(tables: Path, workers: int) -> dict[str, Any]:
    """`ast.parse` over every row, reading included: what one pass over the files costs at the least."""
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(abs, range(workers)))  # the processes are up before the clock starts
        started = time.perf_counter()
        parts = list(pool.map(_parse_part, _row_groups(tables)))
        seconds = time.perf_counter() - started
    return {"seconds": seconds, "rows_read": sum(rows for rows, _ in parts), "refused": sum(bad for _, bad in parts)}


def _parse_part(payload: dict[str, Any]) -> tuple[int, int]:
    with pq.ParquetFile(payload["file"]) as opened:
        contents = opened.read_row_groups(payload["row_groups"], columns=["content"]).column("content").to_pylist()
    return len(contents), sum(not parses(text) for text in contents)


def parses(text: str) -> bool:
    """Whether `ast.parse` takes `text`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return False
    return True


if __name__ == "__main__":
    main()
