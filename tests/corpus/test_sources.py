"""Inputs are cut the same way every time, read in order, and refused by name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from cert_ray import storage
from cert_ray.corpus.inputs import RawDocument, Record
from cert_ray.corpus.sources import SourceConfig, plan_units, read_unit
from cert_ray.errors import ConfigError, InputError
from tests.corpus.hostile import tar_bytes


def read_all(config: SourceConfig) -> list[Record]:
    return [record for unit in plan_units(config) for record in read_unit(unit, config)]


def paths(config: SourceConfig) -> list[str]:
    return [record.path if isinstance(record, RawDocument) else record[0] for record in read_all(config)]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("b.py", "a/z.py", "a/y.py", "a/data.csv", "a-b.py"):
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_text(f"# {name}\n" * 10)
    return tmp_path / "tree"


@pytest.fixture
def memory() -> Iterator[str]:
    filesystem = fsspec.filesystem("memory")
    filesystem.makedirs("/corpus", exist_ok=True)
    yield "memory://corpus"
    filesystem.rm("/corpus", recursive=True)


def test_folder_is_read_in_the_order_of_its_paths(tree: Path) -> None:
    assert paths(SourceConfig(inputs=(str(tree),))) == ["a-b.py", "a/y.py", "a/z.py", "b.py"]


def test_units_group_files_by_bytes_and_lose_none(tree: Path) -> None:
    whole = SourceConfig(inputs=(str(tree),))
    small = SourceConfig(inputs=(str(tree),), unit_bytes=1)
    assert [unit.name for unit in plan_units(small)] == [f"shard-{index:05d}" for index in range(4)]
    assert read_all(small) == read_all(whole)
    assert [unit.rows for unit in plan_units(whole)] == [4]


def test_rows_do_not_depend_on_where_the_input_lies(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree.parent)
    here = read_all(SourceConfig(inputs=("tree",)))
    (tree.parent / "elsewhere").mkdir()
    tree.rename(tree.parent / "elsewhere" / "tree")
    monkeypatch.chdir(tree.parent / "elsewhere")
    assert read_all(SourceConfig(inputs=("tree",))) == here


def test_include_and_exclude_choose_by_name_and_by_path(tree: Path) -> None:
    assert paths(SourceConfig(inputs=(str(tree),), exclude=("a/*",))) == ["a-b.py", "b.py"]
    assert paths(SourceConfig(inputs=(str(tree),), include=("*.csv", "b*"))) == ["a/data.csv", "b.py"]


def test_limit_counts_files_over_all_inputs(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(tar_bytes([("t/1.py", "a"), ("t/readme", "b"), ("t/2.py", "c"), ("t/3.py", "d")]))
    inputs = (str(tmp_path / "x.tar"), str(tree))
    assert paths(SourceConfig(inputs=inputs, limit=2)) == ["t/1.py", "t/2.py"]
    assert paths(SourceConfig(inputs=inputs, limit=4)) == ["t/1.py", "t/2.py", "t/3.py", "a-b.py"]


def test_max_input_bytes_stops_before_the_file_that_is_too_much(tree: Path) -> None:
    sizes = [(tree / name).stat().st_size for name in ("a-b.py", "a/y.py")]
    assert paths(SourceConfig(inputs=(str(tree),), max_input_bytes=sum(sizes))) == ["a-b.py", "a/y.py"]
    assert paths(SourceConfig(inputs=(str(tree),), max_input_bytes=sum(sizes) - 1)) == ["a-b.py"]


def test_max_input_bytes_bounds_what_an_archive_gives(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(tar_bytes([(f"{index}.py", "x" * 100) for index in range(9)]))
    assert len(paths(SourceConfig(inputs=(str(tmp_path / "x.tar"),), max_input_bytes=350))) == 3


def test_archives_in_a_source_tree_stay_closed_but_a_store_of_archives_is_opened(tree: Path, tmp_path: Path) -> None:
    (tree / "testdata.tar").write_bytes(tar_bytes([("inside.py", "x")]))
    assert "inside.py" not in paths(SourceConfig(inputs=(str(tree),)))
    assert "inside.py" in paths(SourceConfig(inputs=(str(tree),), open_containers=True))
    (tmp_path / "store").mkdir()
    (tree / "testdata.tar").rename(tmp_path / "store" / "one.tar")
    (record,) = read_all(SourceConfig(inputs=(str(tmp_path / "store"),)))
    assert isinstance(record, RawDocument)
    assert (record.path, record.source) == ("inside.py", str(tmp_path / "store" / "one.tar"))


def test_glob_and_single_file_are_inputs(tree: Path) -> None:
    assert paths(SourceConfig(inputs=(f"{tree}/a/*.py",))) == ["y.py", "z.py"]
    assert paths(SourceConfig(inputs=(str(tree / "b.py"), str(tree / "b.py")))) == ["b.py"]


def test_remote_folder_reads_as_a_local_one(memory: str, tree: Path) -> None:
    local = SourceConfig(inputs=(str(tree),))
    fsspec.filesystem("memory").put(f"{tree}/", "/corpus/", recursive=True)
    with fsspec.open(f"{memory}/deep/big.py", "wb") as stream:
        stream.write(b"x" * 2_000_000)
    remote = SourceConfig(inputs=(memory,))
    assert [(r.path, r.payload) for r in read_all(remote) if isinstance(r, RawDocument)] == [
        (r.path, r.payload) for r in read_all(local) if isinstance(r, RawDocument)
    ]
    assert next(r for r in read_all(remote) if not isinstance(r, RawDocument))[0] == "deep/big.py"


def test_remote_archive_is_streamed(memory: str) -> None:
    with fsspec.open(f"{memory}/x.tar", "wb") as stream:
        stream.write(tar_bytes([("inside.py", "x")]))
    assert paths(SourceConfig(inputs=(f"{memory}/x.tar",))) == ["inside.py"]


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("missing", "nothing there"),
        ("missing*.tar", "nothing matches"),
        ("tree/a/data.csv", r"Supported are .*\.tar\.zst.*\.parquet"),
        ("empty", "holds no file to read"),
        ("fifo.tar", "not a regular file"),
    ],
)
def test_unusable_input_is_named_with_the_cure(tree: Path, name: str, problem: str) -> None:
    (tree.parent / "empty").mkdir()
    os.mkfifo(tree.parent / "fifo.tar")
    with pytest.raises(InputError, match=problem) as caught:
        plan_units(SourceConfig(inputs=(str(tree.parent / name),)))
    assert name in str(caught.value)


def test_no_input_at_all_is_refused() -> None:
    with pytest.raises(ConfigError, match="inputs"):
        SourceConfig.from_mapping({"inputs": []}, "recipe")


def test_file_names_that_are_not_utf8_are_read(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.py")).write_text("x")
    (tmp_path / "naïve.py").write_text("x")
    assert paths(SourceConfig(inputs=(str(tmp_path),))) == ["caf\ufffd.py", "naïve.py"]


def test_a_file_rewritten_with_the_same_size_has_another_version_and_nothing_else(tree: Path) -> None:
    config = SourceConfig(inputs=(str(tree),))
    (before,) = plan_units(config)
    text = (tree / "b.py").read_text()
    (tree / "b.py").write_text(text[::-1])
    os.utime(tree / "b.py", ns=(0, 12_345))  # whatever the clock's resolution
    (after,) = plan_units(config)
    assert after.version != before.version
    assert after.model_dump() == before.model_dump()
    assert after.unit_digest("") == before.unit_digest("")


def test_an_object_rewritten_with_the_same_size_has_another_version(memory: str) -> None:
    filesystem = fsspec.filesystem("memory")
    filesystem.pipe_file("/corpus/a.py", b"x = 1\n")
    config = SourceConfig(inputs=(memory,))
    (before,) = plan_units(config)
    found = filesystem.find("/corpus", detail=True)
    for tag in ("ETag", "etag", "generation"):
        entry = {**found["/corpus/a.py"], tag: "0f"}
        assert storage._version(entry) != storage._version({**entry, tag: "10"})
    assert before.model_dump() == plan_units(config)[0].model_dump()


def test_units_are_a_share_of_the_inputs_within_bounds() -> None:
    config = SourceConfig(inputs=("x",))
    assert config.unit_bytes_of(0) == config.unit_bytes_of(55_000_000) == 1 << 20
    assert config.unit_bytes_of(64 << 23) == 8 << 20
    assert config.unit_bytes_of((64 << 23) + 1_000) == 8 << 20  # a little more changes nothing
    assert config.unit_bytes_of(330 * 10**9) == 32 << 20
    assert SourceConfig(inputs=("x",), unit_bytes=7).unit_bytes_of(330 * 10**9) == 7


def test_a_small_input_is_cut_into_units_for_many_cores(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"{number:02d}.py").write_bytes(b"#" * 500_000)
    units = plan_units(SourceConfig(inputs=(str(tmp_path),)))
    assert len(units) == 20
    assert sum(unit.rows for unit in units) == 40
    assert {unit.weight for unit in units} == {1_000_000}
