"""Seeded samples of a corpus of Parquet tables: the same files for both sides of a benchmark."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

_GROUP_ROWS = 500  # some megabytes of source: a table's smallest unit of work
_BLOCK_ROWS = 100  # rows that `spread_rows` takes or leaves together


def tables_of(folder: Path) -> list[Path]:
    """The Parquet files of a folder, in order.

    Raises:
        SystemExit: when there are none.
    """
    found = sorted(folder.glob("*.parquet"))
    if not found:
        raise SystemExit(f"{folder}: no Parquet file. Make some with tests.bench.make_corpus or tabulate_corpus.")
    return found


def sample_texts(folder: Path, documents: int, seed: int) -> list[str]:
    """Texts of documents drawn without replacement, all of them if there are fewer."""
    paths = tables_of(folder)
    rows = np.cumsum([0, *(pq.read_metadata(path).num_rows for path in paths)])
    drawn = np.random.default_rng(seed).permutation(int(rows[-1]))[:documents]
    wanted = defaultdict(list)
    for row in sorted(drawn.tolist()):
        part = int(np.searchsorted(rows, row, side="right")) - 1
        wanted[part].append(row - int(rows[part]))
    texts = []
    for part, numbers in wanted.items():
        texts += pq.read_table(paths[part], columns=["content"]).column("content").take(pa.array(numbers)).to_pylist()
    return texts


def spread_rows(folder: Path, share: float) -> pa.Table:
    """About `share` of all rows, in runs of neighbours evenly spread: neighbours are often near duplicates."""
    taken, first = [], 0
    for path in tables_of(folder):
        table = pq.read_table(path)
        block = (first + np.arange(len(table))) // _BLOCK_ROWS
        taken.append(table.filter(pa.array(np.floor((block + 1) * share) > np.floor(block * share))))
        first += len(table)
    return pa.concat_tables(taken)


def count_rows(folder: Path) -> int:
    """Rows of all tables of a folder."""
    return sum(pq.read_metadata(path).num_rows for path in tables_of(folder))


def count_bytes(folder: Path) -> int:
    """UTF-8 bytes of the text of all tables of a folder."""
    columns = (pq.read_table(path, columns=["content"]).column("content") for path in tables_of(folder))
    return sum(pc.sum(pc.binary_length(column), min_count=0).as_py() for column in columns)


def related_rows(folder: Path, documents: int, seed: int) -> pa.Table:
    """Rows in groups that share a file name, in seeded order: more near duplicates than rows drawn one by one."""
    table = pa.concat_tables([pq.read_table(path) for path in tables_of(folder)])
    groups = defaultdict(list)
    for row, path in enumerate(table.column("max_stars_repo_path").to_pylist()):
        name = path.rpartition("/")[2]
        groups[name].append(row)
    names = sorted(name for name, rows in groups.items() if len(rows) > 1) or sorted(groups)
    draw = np.random.default_rng(seed)
    chosen: list[int] = []
    for index in draw.permutation(len(names)):
        rows = groups[names[index]]
        chosen += draw.permutation(rows)[:50].tolist()  # no name alone may fill the sample
        if len(chosen) >= documents:
            break
    return table.take(pa.array(sorted(chosen[:documents])))


def write_parts(table: pa.Table, folder: Path, parts: int) -> None:
    """`table` in a few files."""
    folder.mkdir(parents=True, exist_ok=True)
    borders = np.linspace(0, len(table), parts + 1).astype(int)
    for part, (first, last) in enumerate(pairwise(borders.tolist())):
        pq.write_table(
            table.slice(first, last - first), folder / f"part-{part:05d}.parquet", row_group_size=_GROUP_ROWS
        )
