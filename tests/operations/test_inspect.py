"""What `cert-ray inspect` shows, at a terminal and elsewhere, and how little of the dataset it reads."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import rich.console

from cert_ray import storage
from cert_ray.dataset.on_ray import preprocess
from cert_ray.dataset.options import PreprocessConfig
from cert_ray.errors import InputError, NotFinishedError
from cert_ray.operations.inspect import (
    DroppedFile,
    document_of,
    drops_of,
    open_run,
    rows_of,
    show_document,
    show_drops,
    show_rows,
)
from tests.dataset.builders import write_corpus
from tests.ray_marks import RAY_DATA

pytestmark = RAY_DATA


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Path:
    folder = tmp_path_factory.mktemp("inspect")
    write_corpus(folder / "corpus")
    options = {"sources": {"inputs": [str(folder / "corpus")], "unit_bytes": 20_000}, "dedup_quality": None}
    preprocess(PreprocessConfig.model_validate(options), str(folder / "run"))
    return folder / "run"


def shown(show: Any, *arguments: Any, terminal: bool = False) -> str:
    console = rich.console.Console(
        file=io.StringIO(), force_terminal=terminal, color_system="standard" if terminal else None, width=160
    )
    show(console, *arguments)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def ids(run: Path, folder: str) -> dict[str, str]:
    tables = [pq.read_table(path) for path in sorted((run / folder).glob("shard-*.parquet"))]
    return {row["path"]: row["doc_id"] for table in tables for row in table.select(["path", "doc_id"]).to_pylist()}


def test_rows_are_lines_with_tabs_or_a_table(run: Path) -> None:
    opened = open_run(str(run))
    rows = rows_of(opened, 5)
    plain = [line.split("\t") for line in shown(show_rows, opened, rows).splitlines()]
    assert [len(line) for line in plain] == [8] * 6
    assert plain[1][0] == rows[0]["doc_id"]
    assert "\x1b[" not in shown(show_rows, opened, rows)
    at_terminal = shown(show_rows, opened, rows, terminal=True)
    assert "\x1b[" in at_terminal
    assert "5 of 12 files kept, of 15 read" in at_terminal


def test_a_duplicate_tells_which_file_was_kept(run: Path) -> None:
    opened = open_run(str(run / "dataset"))
    kept = ids(run, "dataset")
    (near,) = drops_of(opened, "near_duplicate", 10)
    (exact,) = drops_of(opened, "exact_duplicate", 10)
    cluster = {"file_00.py", "copy.py", "nearly.py"}
    (survivor,) = cluster & set(kept)
    assert {near.path, exact.path, survivor} == cluster
    for drop in (near, exact):
        assert drop.survivor == f"{kept[survivor]} {survivor}"
        assert document_of(opened, ids(run, "documents")[drop.path]) == drop
        assert f"{drop.path}\t{drop.source}\t{drop.survivor}" in shown(show_drops, opened, [drop])


def test_a_file_that_cleaning_dropped_shows_its_detail(run: Path) -> None:
    opened = open_run(str(run))
    (drop,) = drops_of(opened, "not_python_3", 10)
    assert (drop.path, drop.survivor) == ("broken.py", None)
    assert drop.detail
    assert drop.detail in shown(show_drops, opened, [drop], terminal=True)


def test_a_document_stands_beside_its_sketch_and_what_was_replaced_is_marked(run: Path) -> None:
    opened = open_run(str(run))
    document = document_of(opened, ids(run, "dataset")["file_03.py"])
    assert not isinstance(document, DroppedFile)
    plain = shown(show_document, opened, document)
    assert f"--- content\n{document['content']}" in plain
    assert f"--- sketch\n{document['sketch']}" in plain
    at_terminal = shown(show_document, opened, document, terminal=True)
    line = next(line for line in at_terminal.splitlines() if "def " in line and "function_3" in line)
    assert "\x1b[30;103mfunction_3\x1b[0m" in line
    assert "\x1b[30;103mfunc\x1b[0m" in line
    assert "\x1b[30;106mnumber\x1b[0m" in line


def test_one_document_costs_one_shard(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_run(str(run))
    read: list[str] = []
    real_open, real_read = storage.open_read, storage.read_parquet

    def open_read(url: str) -> Any:
        read.append(url)
        return real_open(url)

    def read_parquet(url: str, columns: list[str] | None = None) -> Any:
        read.append(url)
        return real_read(url, columns)

    monkeypatch.setattr(storage, "open_read", open_read)
    monkeypatch.setattr(storage, "read_parquet", read_parquet)
    doc_id = ids(run, "dataset")["file_09.py"]
    document_of(opened, doc_id)
    assert {storage.name_of(url) for url in read} == {f"{doc_id.rpartition('-')[0]}.parquet"}
    read.clear()
    rows_of(opened, 1)
    assert len(read) == 1


def test_what_is_not_there_is_named(run: Path, tmp_path: Path) -> None:
    opened = open_run(str(run))
    with pytest.raises(InputError, match=r"no file was dropped as binary.*near_duplicate \(1\)"):
        drops_of(opened, "binary", 1)
    with pytest.raises(InputError, match=r"none of its shards holds shard-99999-0000001.*shard-00000-0000000"):
        document_of(opened, "shard-99999-0000001")
    with pytest.raises(InputError, match=r"holds no document shard-00000-9999999"):
        document_of(opened, "shard-00000-9999999")
    with pytest.raises(InputError, match="neither a run's folder nor a dataset"):
        open_run(str(tmp_path / "absent"))
    (tmp_path / "documents").mkdir()  # a run that was cut short
    with pytest.raises(NotFinishedError):
        open_run(str(tmp_path))
    shutil.copytree(run / "dataset", tmp_path / "published")
    alone = open_run(str(tmp_path / "published"))
    assert [drop.survivor for drop in drops_of(alone, "near_duplicate", 1)] == [None]
    with pytest.raises(InputError, match="`documents`, whose folder is not beside it"):
        drops_of(alone, "not_python_3", 1)
