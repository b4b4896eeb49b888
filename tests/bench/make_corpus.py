"""A synthetic corpus: valid Python with known duplicates, as Parquet with The Stack's columns.

In: a seed, a number of documents, rates. Out, below a folder: `documents/part-00000.parquet`, ... and `truth.parquet`
(row, file, cluster, kind, changed share). Rows are a pure function of the options and their number.

A document is a few blocks of a pool, drawn by a hash of its cluster's number, with one word of its own put in for the
marker that most lines hold: two documents share blocks but few shingles. Sizes are log-normal. A duplicate takes the
cluster of a random earlier row, so clusters grow as in life, some large, most small; a near duplicate has lines of its
own at a block's border, a share of at most `near_change` of its size (or one short line), so its Jaccard similarity to
the original is about 1 / (1 + near_change) or more, to another near duplicate 1 / (1 + 2 near_change).

Example: python -m tests.bench.make_corpus --output /tmp/synthetic --documents 1e6
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]

MARKER = "qZq"  # in no word of the pool
_SHORT_CHANGE_BYTES = 100  # below it a change is one short line at the end
KINDS = ("original", "exact", "near")
SCHEMA = pa.schema(
    [
        ("max_stars_repo_path", pa.string()),
        ("max_stars_repo_name", pa.string()),
        ("max_stars_count", pa.int64()),
        ("max_stars_repo_licenses", pa.list_(pa.string())),
        ("content", pa.string()),
    ]
)


@dataclass(frozen=True)
class CorpusOptions:
    """What is made. The defaults: 60.6M files of 330 GB (the paper) for the size; 5,140 exact copies among 31,529 real
    files (16%) for the first rate; the second, the spread and the change are assumed."""

    documents: int
    seed: int = 0
    mean_bytes: float = 5_445.0
    sigma: float = 1.2  # of the logarithm of the size
    exact_rate: float = 0.16
    near_rate: float = 0.15
    near_change: float = 0.12
    rows_per_file: int = 20_000

    def __post_init__(self) -> None:
        if not (self.exact_rate >= 0 and self.near_rate >= 0 and self.exact_rate + self.near_rate < 1):
            raise SystemExit(f"rates {self.exact_rate} and {self.near_rate}: give two from 0 up, below 1 together")
        if self.documents < 1 or self.rows_per_file < 1 or self.mean_bytes < 1_000 or self.near_change <= 0:
            raise SystemExit("give at least one document, one row per file, 1000 mean bytes, and a change above 0")


@dataclass(frozen=True, slots=True)
class Truth:
    """By row: the number of the cluster's first row, 0 original, 1 exact or 2 near, and the share of lines put in."""

    cluster_D: I64
    kind_D: npt.NDArray[np.int8]
    change_D: npt.NDArray[np.float64]


def main() -> None:
    """Make a corpus."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--documents", type=float, default=1e6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mean-bytes", type=float, default=CorpusOptions.mean_bytes)
    parser.add_argument("--exact-rate", type=float, default=CorpusOptions.exact_rate)
    parser.add_argument("--near-rate", type=float, default=CorpusOptions.near_rate)
    parser.add_argument("--near-change", type=float, default=CorpusOptions.near_change)
    parser.add_argument("--workers", type=int, default=2, help="processes; the corpus does not depend on them")
    given = vars(parser.parse_args())
    output, workers, given["documents"] = given.pop("output"), given.pop("workers"), int(given["documents"])
    started = time.perf_counter()
    size_bytes = make_corpus(CorpusOptions(**given), output, workers)
    took_s = time.perf_counter() - started
    print(f"{given['documents']:,} documents, {size_bytes / 1e6:,.0f} MB of Python in {output}: {took_s:.1f} s")
    print(f"{given['documents'] / took_s:,.0f} documents/s")


def make_corpus(options: CorpusOptions, output: Path, workers: int = 2) -> int:
    """Write the corpus; returns the bytes of its Python."""
    folder = output / "documents"
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("part-*.parquet"):
        stale.unlink()
    parts = range(-(-options.documents // options.rows_per_file))
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        written = [pool.submit(_write_parts, options, folder, parts[start::workers]) for start in range(workers)]
        size_bytes = sum(future.result() for future in written)
    truth = ground_truth(options)
    columns = {
        "row": np.arange(options.documents),
        "file": np.arange(options.documents) // options.rows_per_file,
        "cluster": truth.cluster_D,
        "kind": pa.DictionaryArray.from_arrays(truth.kind_D, list(KINDS)),
        "change": truth.change_D,
    }
    pq.write_table(pa.table(columns), output / "truth.parquet")
    return size_bytes


def _write_parts(options: CorpusOptions, folder: Path, parts: range) -> int:
    """Write some of the files; returns the bytes of their Python."""
    truth, writer = ground_truth(options), Writer(options)
    size_bytes = 0
    for part in parts:
        first = part * options.rows_per_file
        table = writer.rows(np.arange(first, min(first + options.rows_per_file, options.documents)), truth)
        size_bytes += pc.sum(pc.binary_length(table.column("content"))).as_py()
        pq.write_table(table, folder / f"part-{part:05d}.parquet", compression="snappy", row_group_size=2_000)
    return size_bytes


def ground_truth(options: CorpusOptions) -> Truth:
    """Which rows are copies of which."""
    rows = np.arange(options.documents)
    draw = _uniform(rows, options.seed, 1)
    kind = np.where(draw < options.exact_rate, 1, np.where(draw < options.exact_rate + options.near_rate, 2, 0))
    kind[0] = 0
    # A copy points to an earlier row; following the pointers ends at an original.
    cluster = np.where(kind == 0, rows, (_uniform(rows, options.seed, 2) * rows).astype(np.int64))
    while np.any((after := cluster[cluster]) != cluster):
        cluster = after
    share = np.where(kind == 2, options.near_change * (0.1 + 0.9 * _uniform(rows, options.seed, 3)), 0.0)
    return Truth(cluster.astype(np.int64), kind.astype(np.int8), share)


class Writer:
    """Rows by number: the pool of blocks, and how documents are put together from it."""

    def __init__(self, options: CorpusOptions) -> None:
        self._options = options
        pool = Pool(options.seed)
        self._imports, self._blocks, self._lines = pool.imports(512), pool.blocks(4_096), pool.lines(4_096)
        # The marker grows or shrinks to the document's own word.
        self._mean_block = float(np.mean([_grown(block) for block in self._blocks]))
        self._mean_head = float(np.mean([_grown(block) for block in self._imports]))

    def rows(self, rows: I64, truth: Truth) -> pa.Table:
        """The table of the given rows."""
        seed = self._options.seed
        clusters, kinds, changes = truth.cluster_D[rows], truth.kind_D[rows], truth.change_D[rows]
        contents = list(self._contents(rows, clusters, kinds, changes))
        stars = np.where(_uniform(rows, seed, 4) < 0.5, 0, np.exp(8 * _uniform(rows, seed, 5) ** 2)).astype(
            np.int64
        )  # half of all repositories have none, assumed
        licences = pa.array([["mit"], ["apache-2.0"], ["bsd-3-clause"], ["gpl-3.0"], []], SCHEMA.field(3).type)
        return pa.table(
            {
                "max_stars_repo_path": [f"src/part{row % 97}/module_{row}.py" for row in rows.tolist()],
                "max_stars_repo_name": [f"owner{row % 7919}/project{row % 49999}" for row in rows.tolist()],
                "max_stars_count": stars,
                "max_stars_repo_licenses": licences.take(pa.array(_hash(rows, seed, 6) % np.uint64(5))),
                "content": contents,
            },
            schema=SCHEMA,
        )

    def _contents(
        self, rows: I64, clusters: I64, kinds: npt.NDArray[np.int8], changes: npt.NDArray[np.float64]
    ) -> Iterator[str]:
        seed, blocks = self._options.seed, self._blocks
        counts = self._block_counts(clusters)
        # One hash per block of each document: the cluster's number and the block's place decide.
        starts = np.concatenate([[0], np.cumsum(counts)])
        place = np.arange(starts[-1]) - np.repeat(starts[:-1], counts)
        drawn = _hash(np.repeat(clusters, counts) * 4_096 + place, seed, 7) % np.uint64(len(blocks))
        chosen, borders = drawn.tolist(), starts.tolist()
        heads = (_hash(clusters, seed, 8) % np.uint64(len(self._imports))).tolist()
        words = _hash(clusters, seed, 9).tolist()
        for index, (kind, change) in enumerate(zip(kinds.tolist(), changes.tolist(), strict=True)):
            picked = chosen[borders[index] : borders[index + 1]]
            parts = [self._imports[heads[index]], *map(blocks.__getitem__, picked)]
            if kind == 2:
                self._insert(parts, int(rows[index]), change)
            yield "".join(parts).replace(MARKER, _word(words[index]))

    def _block_counts(self, clusters: I64) -> I64:
        """Blocks per document, so that sizes are log-normal with the mean asked for."""
        options = self._options
        first, second = _uniform(clusters, options.seed, 10), _uniform(clusters, options.seed, 11)
        normal = np.sqrt(-2 * np.log1p(-first)) * np.cos(2 * np.pi * second)  # Box and Muller
        size = np.exp(np.log(options.mean_bytes) - options.sigma**2 / 2 + options.sigma * normal)
        return np.clip(np.rint((size - self._mean_head) / self._mean_block), 1, 400_000 // self._mean_block).astype(
            np.int64
        )

    def _insert(self, parts: list[str], row: int, change: float) -> None:
        """Lines of the row's own between two blocks, about `change` of the size."""
        draw = random.Random(self._options.seed << 32 ^ row)
        left, own, lines = change * sum(map(len, parts)), _word(draw.getrandbits(64)), []
        if left < _SHORT_CHANGE_BYTES:  # in the middle it would also break the shingles across it
            parts.append(f"{own} = {row}\n")
            return
        while not lines or left > 0:
            line = draw.choice(self._lines).replace(MARKER, own)
            left -= len(line)
            if lines and left < 0:
                break
            lines.append(line)
        parts.insert(draw.randint(1, len(parts)), "".join(lines) + "\n\n")


class Pool:
    """Blocks of code from a small grammar; every line of a block but the shortest holds the marker."""

    _NOUNS = ("value", "row", "index", "score", "batch", "item", "path", "token", "weight", "node", "field", "limit")
    _VERBS = (
        "load",
        "merge",
        "parse",
        "scale",
        "count",
        "filter",
        "write",
        "update",
        "check",
        "build",
        "sort",
        "split",
    )
    _LIBRARIES = ("os", "re", "json", "math", "logging", "collections", "itertools", "numpy", "pandas", "requests")

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def imports(self, count: int) -> list[str]:
        """Import blocks."""
        made = []
        for _ in range(count):
            names = sorted(self._random.sample(self._LIBRARIES, self._random.randint(1, 5)))
            made.append(
                "".join(f"import {name}\n" for name in names) + f"\nfrom {MARKER}.core import {MARKER}_base\n\n\n"
            )
        return made

    def lines(self, count: int) -> list[str]:
        """Top-level lines that a near duplicate puts in."""
        return [f"{self._name()} = {self._expression(1)}\n" for _ in range(count)]

    def blocks(self, count: int) -> list[str]:
        """Functions, classes and top-level tables; each ends with blank lines."""
        makers = (self._function, self._function, self._class, self._table)
        return [self._random.choice(makers)() + "\n\n" for _ in range(count)]

    def _name(self) -> str:
        return f"{self._random.choice(self._NOUNS)}_{MARKER}"

    def _literal(self) -> str:
        draw = self._random
        return draw.choice(
            (
                str(draw.randint(0, 9_999)),
                f"{draw.random():.3f}",
                f'"{draw.choice(self._NOUNS)} {draw.randint(0, 99)} {MARKER}"',
                f"f'{{self_{MARKER}}} {draw.choice(self._NOUNS)}'",
                "None",
                f"b'{draw.choice(self._NOUNS)}'",
            )
        )

    def _expression(self, depth: int) -> str:
        draw = self._random
        if depth == 0:
            return draw.choice((self._name(), self._literal()))
        left, right = self._expression(depth - 1), self._expression(depth - 1)
        verb = f"{draw.choice(self._VERBS)}_{MARKER}"
        return draw.choice(
            (
                f"{verb}({left}, {right})",
                f"{left} + {right}",
                f"[{left}, {right}]",
                f"{verb}({left}, key={right})",
                f"{self._name()}.{draw.choice(self._VERBS)}({left})",
                f"{{{draw.choice(self._NOUNS)!r}: {left}}}",
            )
        )

    def _body(self, indent: str) -> list[str]:
        draw, lines = self._random, []
        for _ in range(draw.randint(2, 7)):
            name = self._name()
            lines += draw.choice(
                (
                    [f"{indent}{name} = {self._expression(1)}"],
                    [f"{indent}# {draw.choice(self._VERBS)} every {draw.choice(self._NOUNS)} of {MARKER}",
                     f"{indent}{name} = {self._expression(2)}"],
                    [f"{indent}for {name} in {self._expression(1)}:", f"{indent}    {self._expression(1)}"],
                    [f"{indent}if {name} is not None and {self._expression(0)}:",
                     f"{indent}    return {self._expression(1)}"],
                    [f"{indent}try:", f"{indent}    {name} = {self._expression(1)}",
                     f"{indent}except ValueError:", f"{indent}    return {self._literal()}"],
                )
            )  # fmt: skip
        return [*lines, f"{indent}return {self._expression(1)}"]

    def _function(self, indent: str = "", first: str = "") -> str:
        draw = self._random
        arguments = ", ".join(filter(None, [first, self._name(), f"{draw.choice(self._NOUNS)}={draw.randint(0, 99)}"]))
        inner = indent + "    "
        lines = [f"{indent}def {draw.choice(self._VERBS)}_{draw.choice(self._NOUNS)}_{MARKER}({arguments}):"]
        if draw.random() < 0.4:
            lines.append(f'{inner}"""{draw.choice(self._VERBS).title()} the {draw.choice(self._NOUNS)} of {MARKER}."""')
        return (
            "\n".join([*lines, f"{inner}self_{MARKER} = {self._literal_without_fields()}", *self._body(inner)]) + "\n"
        )

    def _literal_without_fields(self) -> str:
        return str(self._random.randint(0, 9_999))

    def _class(self) -> str:
        methods = "\n".join(self._function("    ", "self") for _ in range(self._random.randint(1, 3)))
        return f"class {self._random.choice(self._NOUNS).title()}{MARKER}:\n{methods}"

    def _table(self) -> str:
        rows = [
            f"    {self._literal_without_fields()}: {self._expression(0)}," for _ in range(self._random.randint(3, 9))
        ]
        return "\n".join([f"{self._random.choice(self._NOUNS).upper()}_{MARKER} = {{", *rows, "}\n"])


def _grown(block: str) -> int:
    return len(block.replace(MARKER, _word(0)))


def _word(bits: int) -> str:
    """Six letters from the low bits of a hash: 244 million words."""
    letters = []
    for _ in range(6):
        bits, letter = divmod(bits, 25)
        letters.append(chr(97 + letter))
    return "".join(letters)


def _hash(keys: I64, seed: int, stream: int) -> U64:
    """SplitMix64 of each key: the draws of a row depend on nothing but its number."""
    with np.errstate(over="ignore"):
        bits = keys.astype(np.uint64) + np.uint64(((seed << 8 | stream) + 1) * 0x9E3779B97F4A7C15 % (1 << 64))
        for shift, multiplier in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            bits = (bits ^ (bits >> np.uint64(shift))) * np.uint64(multiplier)
        return bits ^ (bits >> np.uint64(31))


def _uniform(keys: I64, seed: int, stream: int) -> npt.NDArray[np.float64]:
    return (_hash(keys, seed, stream) >> np.uint64(11)) * 2.0**-53


if __name__ == "__main__":
    main()
