"""Memory of dedup's driver per document: exact duplicates, components, survivors and the clusters' files.

In: a number of documents. They have no text: content hashes, stars and sizes are random, `--copies` of them exact
copies, and every band's task ties `--near` of them at random, mostly the same ones. Out: peak resident bytes per
document, from the difference between a run with that many documents and one with half of them, each in a process of its
own, so that what Python and the libraries take is left out. Linux only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from cert_ray import storage
from cert_ray.dedup import survivors
from cert_ray.dedup.buckets import joined
from cert_ray.dedup.decisions import rank_documents
from cert_ray.dedup.minhash import U64, MinHashConfig
from cert_ray.shards.units import shard_name

BANDS = int(MinHashConfig.model_fields["bands"].default)
SHARD_ROWS = 50_000


def write_synthetic(folder: Path, documents: int, copies: float, seed: int) -> list[int]:
    """Keys and documents of `documents` rows, with the columns that the driver reads; returns the shards' rows."""
    generator = np.random.default_rng(seed)
    hashes_D2 = generator.integers(1 << 62, size=(documents, 2), dtype=np.uint64)
    copied = generator.choice(documents, int(documents * copies), replace=False)
    hashes_D2[copied] = hashes_D2[generator.integers(documents, size=len(copied))]
    rows = []
    for index, start in enumerate(range(0, documents, SHARD_ROWS)):
        part = hashes_D2[start : start + SHARD_ROWS]
        rows.append(len(part))
        hashes = pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), len(part), [None, pa.py_buffer(part.tobytes())])
        name = f"{shard_name(index)}.parquet"
        stars = pa.array(generator.integers(100, size=len(part)), mask=generator.random(len(part)) < 0.5)
        sizes = pa.array(generator.integers(1 << 20, size=len(part)), pa.int32())
        shingled = pa.array(np.ones(len(part), bool))
        keys = {"content_hash": hashes, "stars": stars, "size_bytes": sizes, "has_shingle": shingled}
        storage.write_parquet(pa.table(keys), str(folder / "dedup" / "keys" / name))
    return rows


class Bands:
    """Every band's edges, as often as they are asked for, one band in memory at a time, as they come from tasks.

    A document is tied to one of the thousand better ones before it: mostly the same one in every band, as in real ones.
    """

    def __init__(self, ranks: int, near: float, seed: int) -> None:
        self._ranks, self._near, self._seed = ranks, near, seed

    def __iter__(self) -> Iterator[U64]:
        for band in range(BANDS):
            same, other = (np.random.default_rng([self._seed, part]) for part in (0, band + 1))
            member = same.integers(1, self._ranks, int(self._ranks * self._near)).astype(np.uint32)
            better = member - same.integers(1, 1_000, len(member)).clip(max=member).astype(np.uint32)
            moved = other.random(len(member)) < 0.1
            better[moved] = other.integers(0, member[moved])
            yield joined(better, member)


def peak_bytes() -> int:
    """The process's largest resident size so far."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def run_driver(folder: Path, rows: list[int], near: float, seed: int) -> dict[str, int]:
    """What `dedup.on_ray.deduplicate` does on the driver; the peak after every step."""
    output = str(folder / "dedup")
    shards = [shard_name(index) for index in range(len(rows))]
    ends = [sum(rows)]
    peaks = {"start": peak_bytes()}
    columns = survivors.read_documents(output, shards, rows, ends)
    first_D = survivors.exact_firsts(columns)
    peaks["exact duplicates"] = peak_bytes()
    ranking = rank_documents(columns, first_D)
    del columns
    peaks["ranks"] = peak_bytes()
    edges = Bands(len(ranking.number_R), near, seed)
    clusters, _ = survivors.cluster_documents(output, shards, rows, ranking, edges, ends)
    peaks["survivors"] = peak_bytes()
    survivors.write_clusters(output, shards, rows, clusters, first_D, "")
    peaks["clusters written"] = peak_bytes()
    peaks["kept"] = int(clusters.keep.sum())
    return peaks


def measure(documents: int, copies: float, near: float, seed: int) -> dict[str, int]:
    """`run_driver` in a process that does nothing else."""
    with tempfile.TemporaryDirectory() as folder:
        rows = write_synthetic(Path(folder), documents, copies, seed)
        child = [sys.executable, "-m", "tests.bench.bench_dedup_memory", "--child", folder, "--near", str(near)]
        arguments = [*child, "--seed", str(seed), "--rows", *map(str, rows)]
        found: dict[str, int] = json.loads(subprocess.run(arguments, check=True, capture_output=True).stdout)
        return found


def bytes_per_document(documents: int, copies: float, near: float, seed: int) -> dict[str, float]:
    """Peak bytes per document up to each step: the slope between half of `documents` and all of them."""
    half, whole = (measure(count, copies, near, seed) for count in (documents // 2, documents))
    return {step: (whole[step] - half[step]) / (documents - documents // 2) for step in whole if step != "start"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--documents", type=int, default=1_000_000, help="in the larger run (%(default)s)")
    parser.add_argument("--copies", type=float, default=0.3, help="share of exact copies (%(default)s)")
    parser.add_argument("--near", type=float, default=0.2, help="edges per document and band (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="(%(default)s)")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=int, nargs="*", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(run_driver(given.child, given.rows, given.near, given.seed)))
        return
    found = bytes_per_document(given.documents, given.copies, given.near, given.seed)
    kept = found.pop("kept")
    print(
        f"{given.documents} documents, {given.copies:.0%} copies, {given.near} edges each and band, {kept:.0%} kept\n"
    )
    print("| the driver's peak up to | bytes per document |\n|---|---|")
    for step, value in found.items():
        print(f"| {step} | {value:.1f} |")


if __name__ == "__main__":
    main()
