"""Rows of JSONL and Parquet become documents, with column names of the user's choice."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from cert_ray.corpus.inputs import RawDocument
from cert_ray.corpus.sources import SourceConfig, plan_units
from cert_ray.errors import MissingColumnsError
from cert_ray.schemas import DropReason
from tests.corpus.test_sources import read_all

ROW = {
    "content": "x = 1\n",
    "max_stars_repo_path": "src/a.py",
    "max_stars_repo_name": "someone/something",
    "max_stars_count": 12,
    "max_stars_repo_licenses": ["MIT", "Apache-2.0"],
}
DOCUMENT = {
    "path": "src/a.py",
    "payload": "x = 1\n",
    "repository": "someone/something",
    "stars": 12,
    "licence": "MIT, Apache-2.0",
}


def as_dict(record: object) -> dict[str, object]:
    assert isinstance(record, RawDocument)
    return {name: getattr(record, name) for name in DOCUMENT}


def write(path: Path, rows: list[object]) -> str:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    else:
        lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
        compress = {".gz": gzip.compress, ".zst": zstandard.compress}.get(path.suffix, bytes)
        path.write_bytes(compress(lines))
    return str(path)


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.jsonl.zst", "x.parquet"])
def test_the_stack_column_names_are_the_default(tmp_path: Path, name: str) -> None:
    url = write(tmp_path / name, [ROW, {**ROW, "max_stars_count": None}])
    first, second = read_all(SourceConfig(inputs=(url,)))
    assert as_dict(first) == DOCUMENT
    assert as_dict(second) == {**DOCUMENT, "stars": None}
    assert isinstance(first, RawDocument)
    assert first.source == url


@pytest.mark.parametrize("name", ["x.jsonl", "x.parquet"])
def test_columns_can_be_mapped_or_said_to_be_absent(tmp_path: Path, name: str) -> None:
    url = write(tmp_path / name, [{"text": "x = 1\n", "score": 3.0}])
    columns = {"content": "text", "path": None, "stars": "score"}
    config = SourceConfig.from_mapping({"inputs": [url], "columns": columns}, "test")
    (record,) = read_all(config)
    assert as_dict(record)["stars"] == 3
    assert as_dict(record)["path"] in ("line 1", "row 0")


@pytest.mark.parametrize("name", ["x.jsonl", "x.parquet"])
def test_optional_column_that_was_asked_for_must_exist(tmp_path: Path, name: str) -> None:
    url = write(tmp_path / name, [{"content": "x", "max_stars_repo_path": "a.py"}])
    assert len(read_all(SourceConfig(inputs=(url,)))) == 1
    with pytest.raises(
        MissingColumnsError, match=r"stars_typo.*columns are content, max_stars_repo_path.*columns\.stars"
    ):
        plan_units(SourceConfig.from_mapping({"inputs": [url], "columns": {"stars": "stars_typo"}}, "test"))


def test_parquet_is_cut_at_row_groups_and_limited(tmp_path: Path) -> None:
    rows: list[object] = [{**ROW, "max_stars_repo_path": f"{index}.py"} for index in range(7)]
    url = write(tmp_path / "x.parquet", rows)
    config = SourceConfig(inputs=(url,), unit_bytes=1)
    assert [unit.rows for unit in plan_units(config)] == [2, 2, 2, 1]
    assert [as_dict(record)["path"] for record in read_all(config)] == [f"{index}.py" for index in range(7)]
    for limit in (1, 2, 5):
        limited = SourceConfig(inputs=(url,), unit_bytes=1, limit=limit)
        assert [as_dict(record)["path"] for record in read_all(limited)] == [f"{index}.py" for index in range(limit)]


def test_parquet_text_that_is_not_utf8_stays_bytes(tmp_path: Path) -> None:
    texts = pa.array([b"caf\xe9", b"fine"]).view(pa.binary()).cast(pa.string(), safe=False)
    table = pa.table({"content": texts, "max_stars_repo_path": ["a.py", "b.py"]})
    pq.write_table(table, tmp_path / "x.parquet")
    records = read_all(SourceConfig(inputs=(str(tmp_path / "x.parquet"),)))
    assert [as_dict(record)["payload"] for record in records] == [b"caf\xe9", b"fine"]


def test_line_longer_than_any_record_is_skipped_without_being_held(tmp_path: Path) -> None:
    url = write(tmp_path / "x.jsonl", [ROW, {**ROW, "content": "x" * 200_000}, ROW])
    records = read_all(SourceConfig(inputs=(url,), max_file_bytes=1_000))
    assert [record[2].reason for record in records if not isinstance(record, RawDocument)] == [DropReason.TOO_LARGE]
    assert len(records) == 3


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.jsonl.zst"])
def test_truncated_jsonl_gives_the_lines_before_the_damage(tmp_path: Path, name: str) -> None:
    rows: list[object] = [{**ROW, "content": f"{index**9}" * 50} for index in range(200)]
    path = Path(write(tmp_path / name, rows))
    path.write_bytes(path.read_bytes()[:-9])
    *before, last = read_all(SourceConfig(inputs=(str(path),)))
    assert len(before) > 100
    assert all(isinstance(record, RawDocument) for record in before)
    assert not isinstance(last, RawDocument)
    assert last[2].reason is DropReason.DAMAGED_ARCHIVE


def test_damaged_parquet_is_one_drop(tmp_path: Path) -> None:
    path = Path(write(tmp_path / "x.parquet", [ROW] * 4))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    (record,) = read_all(SourceConfig(inputs=(str(path),)))
    assert not isinstance(record, RawDocument)
    assert record[2].reason is DropReason.DAMAGED_ARCHIVE
