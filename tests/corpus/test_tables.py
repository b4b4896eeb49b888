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
from cert_ray.errors import ConfigError, MissingColumnsError
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


IN_METADATA = {name: value for name, value in ROW.items() if name != "content"}
STACK_V2 = {
    "content": ROW["content"],
    "path": "src/a.py",
    "repo_name": "someone/something",
    "star_events_count": 12,
    "detected_licenses": ["MIT", "Apache-2.0"],
    "blob_id": "0a1b",
    "license_type": "permissive",
}
# datatrove leaves out what is empty, here `media`; dolma wants `source`, and dates if it has them.
DATATROVE = {"text": ROW["content"], "id": "shard/3", "metadata": {"file_path": "data/0.parquet", **IN_METADATA}}
EXPANDED = {"text": ROW["content"], "id": "shard/3", "file_path": "data/0.parquet", **IN_METADATA}
DOLMA = {"id": "3", "text": ROW["content"], "source": "stack", "added": "2023-01-01", "metadata": IN_METADATA}


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.parquet"])
@pytest.mark.parametrize(
    ("row", "preset"),
    [(ROW, "the-stack"), (STACK_V2, "the-stack"), (DATATROVE, "datatrove"), (EXPANDED, "datatrove"), (DOLMA, "dolma")],
    ids=["the-stack", "the-stack-v2", "datatrove", "datatrove-expanded", "dolma"],
)
def test_what_others_write_is_read_with_and_without_naming_it(
    tmp_path: Path, name: str, row: dict[str, object], preset: str
) -> None:
    url = write(tmp_path / name, [row])
    for columns in ({}, {"columns": "auto"}, {"columns": preset}):
        (record,) = read_all(SourceConfig.from_mapping({"inputs": [url], **columns}, "test"))
        assert as_dict(record) == DOCUMENT


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.parquet"])
def test_a_document_without_metadata_is_called_by_its_id(tmp_path: Path, name: str) -> None:
    url = write(tmp_path / name, [{"id": "the-stack/17.py", "text": "x = 1\n", "source": "stack"}])
    (record,) = read_all(SourceConfig(inputs=(url,)))
    assert as_dict(record) == {
        **DOCUMENT,
        "path": "the-stack/17.py",
        **dict.fromkeys(("repository", "stars", "licence")),
    }


def test_rows_may_differ_in_what_their_metadata_holds(tmp_path: Path) -> None:
    rows: list[object] = [DOLMA, {**DOLMA, "metadata": {"path": "b.py"}}, {**DOLMA, "metadata": None}, {"id": "9"}]
    *records, rejected = read_all(SourceConfig(inputs=(write(tmp_path / "x.jsonl", rows),)))
    assert [as_dict(record)["path"] for record in records] == ["src/a.py", "b.py", "3"]
    assert not isinstance(rejected, RawDocument)
    assert rejected[0] == "9"
    assert rejected[2].detail == "content or text is NoneType, not text"


@pytest.mark.parametrize("name", ["x.jsonl", "x.parquet"])
def test_a_shape_that_is_not_known_is_refused_with_the_columns_found(tmp_path: Path, name: str) -> None:
    url = write(tmp_path / name, [{"body": "x", "metadata": {"language": "py"}}])
    with pytest.raises(MissingColumnsError, match=r"no column content or text, nor .*are body, metadata\.language\."):
        plan_units(SourceConfig(inputs=(url,)))
    columns = {"content": "body", "path": None, "repository": "metadata.name"}
    named = SourceConfig.from_mapping({"inputs": [url], "columns": columns}, "test")
    with pytest.raises(MissingColumnsError, match=r"no column metadata\.name; .*sources\.columns\.repository \(null"):
        plan_units(named)
    with pytest.raises(ConfigError, match=r"columns.*unknown; known are auto, the-stack, datatrove, dolma"):
        SourceConfig.from_mapping({"inputs": [url], "columns": "the-pile"}, "test")
