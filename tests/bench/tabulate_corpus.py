"""Archives or folders of Python files as Parquet tables with The Stack's columns, for peers that read no archives.

In: what `cert-ray preprocess` takes as inputs. Out: `part-00000.parquet`, ... of about `part_bytes` of text each. Files
that are no text, or larger than 1 MB, are left out, and counted; nothing else is cleaned away.

Example: python -m tests.bench.tabulate_corpus --output /tmp/corpus/tables /tmp/corpus/sdists
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from cert_ray.corpus.cleaning import decode
from cert_ray.corpus.inputs import RawDocument, SourceConfig
from cert_ray.corpus.sources import plan_units, read_unit
from cert_ray.schemas import Dropped
from tests.bench.make_corpus import SCHEMA


def main() -> None:
    """Write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", help="archives, folders of archives, or folders of files")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--part-bytes", type=float, default=64e6)
    given = parser.parse_args()
    print(tabulate(given.inputs, given.output, int(given.part_bytes)))


def tabulate(inputs: list[str], output: Path, part_bytes: int) -> str:
    """Write the tables; says what is in them."""
    config = SourceConfig(inputs=tuple(inputs))
    output.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, object]] = []
    size = part = kept = left_out = total = 0

    def write() -> None:
        path = output / f"part-{part:05d}.parquet"
        pq.write_table(pa.Table.from_pylist(rows, SCHEMA), path, compression="snappy", row_group_size=2_000)

    for unit in plan_units(config):
        for record in read_unit(unit, config):
            text = decode(record.payload) if isinstance(record, RawDocument) else None
            if not isinstance(record, RawDocument) or text is None or isinstance(text, Dropped):
                left_out += 1
                continue
            rows.append(
                {
                    "max_stars_repo_path": record.path,
                    "max_stars_repo_name": record.repository,
                    "content": text,
                }
            )
            size += len(text)
            if size >= part_bytes:
                write()
                kept, total, part, rows, size = kept + len(rows), total + size, part + 1, [], 0
    if rows:
        write()
    kept, total = kept + len(rows), total + size
    return f"{kept} files, {total / 1e6:.0f} MB of text in {output}; {left_out} left out"


if __name__ == "__main__":
    main()
