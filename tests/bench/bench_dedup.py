"""Near-dedup beside datatrove's MinHash: the same tables, 14 bands of 8, 5-grams, two cores, read and write included.

In: a folder of Parquet tables. Out: documents per second and peak memory of both whole process trees, and how well each
agrees with brute force on a sample of files that share their names: what it keeps and drops, and its clusters (a file
of ours is in the cluster of the one kept for it, so similar files of one chain may be in several). Brute force takes
every pair of the sample as similar whose sets of 5-grams have a Jaccard similarity of at least the threshold: once over
runs of word characters, once over datatrove's own normalised words, so that neither side is judged by the other's idea
of a word.

Example: python -m tests.bench.bench_dedup --tables /tmp/corpus/tables --output results --work /tmp/dedup \\
    --peers .venv-bench/bin/python
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import xxhash
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components
from scipy.stats import binomtest

from tests.bench.inputs import count_rows, related_rows, spread_rows, tables_of, write_parts
from tests.bench.measuring import Spread, Usage, markdown, peers_python, publish, run_watched

I64 = npt.NDArray[np.int64]
PEER = Path(__file__).parent / "peers" / "datatrove_job.py"
SPEED_GOAL = 20  # the goals
SHINGLE_WORDS = 5
_ROWS_AT_A_TIME = 500


@dataclass(frozen=True)
class Proportion:
    """A share of trials, with its 95% interval (Wilson)."""

    hits: int
    trials: int

    def __str__(self) -> str:
        if not self.trials:
            return "no case"
        test = binomtest(self.hits, self.trials)
        interval = test.proportion_ci(0.95, "wilson")
        return f"{self.hits / self.trials:.4f} ({interval.low:.4f} to {interval.high:.4f}; {self.hits}/{self.trials})"


def main() -> None:
    """Measure both sides."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder of inputs and runs; runs are removed")
    parser.add_argument("--peers", type=peers_python, required=True, help="the Python of the peers' environment")
    parser.add_argument("--documents", type=int, default=20_000, help="documents of the timed runs, about")
    parser.add_argument("--more", type=int, default=None, help="also time ours alone on so many documents")
    parser.add_argument("--agreement-documents", type=int, default=4_000)
    parser.add_argument("--only", choices=("speed", "agreement"), default=None, help="one of the two measurements")
    parser.add_argument("--threshold", type=float, default=0.7)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    tables: list[str] = []
    figures_out: dict[str, Any] = {}
    if given.only != "agreement":
        tables, figures_out = measure_speed(given)
    if given.only != "speed":
        figures_out["agreement"], text = measure_agreement(given)
        tables.append(text)
    command = "python -m tests.bench.bench_dedup " + " ".join(sys.argv[1:])
    publish(given.output, "dedup", command, tables, figures_out)


def measure_speed(given: argparse.Namespace) -> tuple[list[str], dict[str, Any]]:
    """Both sides' time and memory on the same files, and ours on more of them."""
    timed = prepare(given.tables, given.work / "timed", given.documents, 2 * given.cores)
    sides: dict[str, list[Usage]] = {"cert-ray": [], "datatrove": []}
    seconds: dict[str, list[float]] = {"cert-ray": [], "datatrove": []}
    for _ in range(given.runs):  # taking turns, so that what else the machine does meets both
        for side in sides:
            usage, figures = run_side(side, given.peers, timed, given.work / "run", given.cores)
            sides[side].append(usage)
            seconds[side].append(figures["seconds"])
    rows = count_rows(timed)
    figures_out: dict[str, Any] = {"documents": rows, "seconds": seconds, "usage": sides}
    tables = [speed_table(sides, seconds, rows)]
    if given.more:
        more = prepare(given.tables, given.work / "more", given.more, 2 * given.cores)
        usage, figures = run_side("cert-ray", given.peers, more, given.work / "run", given.cores)
        figures_out["more"] = {"documents": count_rows(more), "usage": usage, **figures}
        tables.append(
            f"cert-ray alone on {count_rows(more):,} documents, one run: {figures['seconds']:.1f} s, "
            f"{count_rows(more) / figures['seconds']:,.0f} documents/s, peak {usage.peak_bytes / 1e6:,.0f} MB"
        )
    return tables, figures_out


def prepare(tables: Path, folder: Path, documents: int, parts: int) -> Path:
    """About so many rows, in `parts` files."""
    shutil.rmtree(folder, ignore_errors=True)
    write_parts(spread_rows(tables, min(1.0, documents / count_rows(tables))), folder, parts)
    return folder


def run_side(
    side: str, peers: Path, tables: Path, output: Path, cores: int, clusters: bool = False
) -> tuple[Usage, dict[str, Any]]:
    """One side's whole run in a process of its own; what it wrote stays until the next run."""
    shutil.rmtree(output, ignore_errors=True)
    common = ["--tables", str(tables), "--output", str(output), "--workers", str(cores)]
    if side == "cert-ray":
        command = [sys.executable, "-m", "tests.bench.ours", "dedup", *common]
    else:
        command = [str(peers), str(PEER), "minhash", *common, *(["--clusters"] if clusters else [])]
    usage = run_watched(command, cores=cores)
    return usage, json.loads(usage.output.splitlines()[-1])


def speed_table(sides: dict[str, list[Usage]], seconds: dict[str, list[float]], rows: int) -> str:
    """Rates and memory of both sides."""
    rates = {side: Spread.of([rows / value for value in values]) for side, values in seconds.items()}
    whole = {side: Spread.of([rows / usage.wall_s for usage in usages]) for side, usages in sides.items()}
    times = rates["cert-ray"].median / rates["datatrove"].median

    def row(name: str, of: Any) -> tuple[str, *tuple[str, ...]]:
        return (name, *(str(Spread.of([of(usage) for usage in usages])) for usages in sides.values()))

    return "\n".join(
        [
            markdown(
                [f"near-dedup of {rows:,} documents", *sides],
                [
                    ("documents/s, the job", *map(str, rates.values())),
                    ("documents/s, the process, start-up included", *map(str, whole.values())),
                    row("documents per CPU-second", lambda usage: rows / usage.cpu_s),
                    row("peak of all processes, MB", lambda usage: usage.peak_bytes / 1e6),
                    row("peak of the driver, MB", lambda usage: usage.root_peak_bytes / 1e6),
                    row("peak of the largest other process, MB", lambda usage: usage.worker_peak_bytes / 1e6),
                ],
            ),
            "",
            f"{times:.1f} times datatrove, the job; "
            f"{whole['cert-ray'].median / whole['datatrove'].median:.1f} times with start-up "
            f"({'met' if times >= SPEED_GOAL else 'MISSED'}: {SPEED_GOAL})",
        ]
    )


def measure_agreement(given: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Both sides' decisions about one sample against brute force."""
    sample = given.work / "sample"
    shutil.rmtree(sample, ignore_errors=True)
    table = related_rows(given.tables, given.agreement_documents, given.seed)
    write_parts(table, sample, 4)
    run_side("cert-ray", given.peers, sample, given.work / "run", given.cores)
    found = {"cert-ray": our_clusters(given.work / "run")}
    run_side("datatrove", given.peers, sample, given.work / "run", given.cores, clusters=True)
    found["datatrove"] = their_clusters(given.work / "run", sample)
    shingles = given.work / "shingles"
    run_watched(
        [str(given.peers), str(PEER), "shingles", "--tables", str(sample), "--output", str(shingles)], cores=given.cores
    )
    theirs = pq.read_table(shingles / "shingles.parquet").column("shingles")
    references = {
        "word characters": [word_shingles(text) for text in table.column("content").to_pylist()],
        "datatrove's words": [np.asarray(row, np.uint64) for row in theirs.to_pylist()],
    }
    figures: dict[str, Any] = {"documents": len(table)}
    parts = []
    for reference, sets in references.items():
        edges, judged = similar_pairs(sets, given.threshold), np.array([len(row) > 0 for row in sets])
        measured = {side: agreement(*clusters, edges, judged) for side, clusters in found.items()}
        figures[reference] = {"similar pairs": len(edges)}
        for side, shares in measured.items():
            figures[reference][side] = {name: (share.hits, share.trials) for name, share in shares.items()}
        title = f"{len(table):,} documents, Jaccard of at least {given.threshold}, 5-grams of {reference}"
        rows = [(name, *(measured[side][name] for side in found)) for name in measured["cert-ray"]]
        parts.append(markdown([title, *found], rows))
    return figures, "\n\n".join(parts) + "\n\n95% intervals (Wilson)."


def our_clusters(output: Path) -> tuple[I64, I64]:
    """By row, the number of the cluster, and the row that is kept of it."""
    survivors: I64 = pq.read_table(output / "clusters.parquet").column("survivor").to_numpy().astype(np.int64)
    return survivors, survivors


def their_clusters(output: Path, sample: Path) -> tuple[I64, I64]:
    """By row, datatrove's cluster, or a number of the row's own, and the row that is kept of it."""
    paths = tables_of(sample)
    firsts = np.cumsum([0, *(pq.read_metadata(path).num_rows for path in paths)])
    first = {path.name: int(start) for path, start in zip(paths, firsts[:-1], strict=True)}
    labels, kept = -1 - np.arange(int(firsts[-1])), np.zeros(int(firsts[-1]), bool)
    for part in ("kept", "removed"):
        for path in (output / part).glob("*.parquet"):
            table = pq.read_table(path)
            for name, metadata in zip(
                table.column("id").to_pylist(), table.column("metadata").to_pylist(), strict=True
            ):
                file, _, row = name.rpartition("/")
                number = first[file] + int(row)
                kept[number] = part == "kept"
                cluster = metadata.get("minhash_cluster_id")
                if cluster is not None and cluster >= 0:
                    labels[number] = cluster
    _, cluster_D = np.unique(labels, return_inverse=True)
    survivor_of = np.full(cluster_D.max(initial=-1) + 1, -1)
    survivor_of[cluster_D[kept]] = np.flatnonzero(kept)
    return labels.astype(np.int64), survivor_of[cluster_D]


def word_shingles(text: str) -> npt.NDArray[np.uint64]:
    """Hashes of the 5-grams of word characters."""
    words = re.findall(r"\w+", text)
    grams = {" ".join(words[start : start + SHINGLE_WORDS]) for start in range(len(words) - SHINGLE_WORDS + 1)}
    return np.array(sorted(xxhash.xxh3_64_intdigest(gram.encode()) for gram in grams), np.uint64)


def similar_pairs(sets: Sequence[npt.NDArray[np.uint64]], threshold: float) -> I64:
    """Every pair, smaller first, whose Jaccard similarity is at least `threshold`: all are compared."""
    sizes = np.array([len(row) for row in sets])
    _, column = np.unique(np.concatenate([np.zeros(0, np.uint64), *sets]), return_inverse=True)
    row = np.repeat(np.arange(len(sets)), sizes)
    members = csr_array(
        (np.ones(len(row), np.int32), (row, column)), shape=(len(sets), max(column.max(initial=0) + 1, 1))
    )
    found = []
    for first in range(0, len(sets), _ROWS_AT_A_TIME):
        shared = (members[first : first + _ROWS_AT_A_TIME] @ members.T).tocoo()
        left, right, both = shared.coords[0] + first, shared.coords[1], shared.data
        close = (left < right) & (both >= threshold * (sizes[left] + sizes[right] - both))
        found.append(np.stack([left[close], right[close]], axis=1))
    return np.concatenate([np.zeros((0, 2), np.int64), *found]).astype(np.int64)


def agreement(labels: I64, survivor: I64, edges: I64, judged: npt.NDArray[np.bool_]) -> dict[str, Proportion]:
    """What was decided against the similar pairs; files without a 5-gram are not judged (they resemble nothing).

    Args:
        labels: by row, the cluster. survivor: the row that is kept of it. edges: similar pairs, the smaller row first.
    """
    count = len(labels)
    rows = np.arange(count)
    graph = coo_array((np.ones(len(edges), np.int8), (edges[:, 0], edges[:, 1])), shape=(count, count)).tocsr()
    _, truth = connected_components(graph, directed=False)
    stays = survivor == rows
    like_kept = (graph + graph.T) @ stays.astype(np.int64) > 0  # whether a file that stays resembles it
    dropped = np.flatnonzero(~stays & judged)
    pair = edges[:, 0] * count + edges[:, 1]
    for_it = np.minimum(dropped, survivor[dropped]) * count + np.maximum(dropped, survivor[dropped])
    has_twin = np.isin(rows, edges)
    _, cluster = np.unique(labels, return_inverse=True)
    said_twin = np.bincount(cluster[judged], minlength=cluster.max(initial=0) + 1)[cluster] > 1
    together = int((cluster[edges[:, 0]] == cluster[edges[:, 1]]).sum())
    linked = _pairs(cluster[judged] * count + truth[judged])
    return {
        "files dropped that resemble one that stays, or staying that resemble none": Proportion(
            int((like_kept != stays)[judged].sum()), int(judged.sum())
        ),
        "similar pairs of which one at most stays": Proportion(
            int((~(stays[edges[:, 0]] & stays[edges[:, 1]])).sum()), len(edges)
        ),
        "files dropped that resemble the one kept for them": Proportion(int(np.isin(for_it, pair).sum()), len(dropped)),
        "files rightly said to have a twin or none": Proportion(
            int((has_twin == said_twin)[judged].sum()), int(judged.sum())
        ),
        "similar pairs in one cluster": Proportion(together, len(edges)),
        "pairs in one cluster that are similar": Proportion(together, _pairs(cluster[judged])),
        "the same, or linked by similar ones": Proportion(linked, _pairs(cluster[judged])),
    }


def _pairs(labels: I64) -> int:
    """How many pairs share a label."""
    _, sizes = np.unique(labels, return_counts=True)
    return int((sizes * (sizes - 1) // 2).sum())


if __name__ == "__main__":
    main()
