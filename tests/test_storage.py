"""Writes appear whole or not at all, and stop before the disk is full."""

from __future__ import annotations

import errno
import pickle
import shutil
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pyarrow.fs
import pytest

from cert_ray import retries, storage
from cert_ray.errors import ConfigError, StorageFullError


def test_a_write_that_would_fill_the_disk_is_refused_and_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = str(tmp_path / "a.parquet")
    table = pa.table({"x": list(range(1000))})
    before = storage.write_parquet(table, target)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=before.size_bytes))
    with pytest.raises(StorageFullError, match=r"a\.parquet.*the disk has only 0 MB left"):
        storage.write_parquet(pa.table({"x": list(range(2000))}), target)
    assert storage.checksum(target) == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]


def test_the_error_survives_pickling() -> None:
    error = StorageFullError("/data/x", 3_000_000_000, 1_000_000)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert "3,000 MB" in str(error)


def test_an_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        storage.write_text(str(tmp_path / "a.txt"), "text")
    assert list(tmp_path.iterdir()) == []


def damaged(kind: str, path: Path) -> str:
    """A Parquet file of two row groups, whose footer or second group was overwritten."""
    storage.write_parquet(pa.table({"x": np.random.default_rng(1).permutation(8_000)}), str(path))
    content = bytearray(path.read_bytes())
    spoilt = slice(-60, -20) if kind == "footer" else slice(len(content) * 6 // 10, len(content) * 8 // 10)
    content[spoilt] = b"\xff" * len(content[spoilt])
    path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize("kind", ["footer", "rows"])
@pytest.mark.parametrize("whole", [True, False])
def test_damage_of_a_local_file_is_not_waited_for(
    kind: str, whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(retries, "_wait", waits.append)
    url = damaged(kind, tmp_path / "a.parquet")

    @retries.tried_again
    def by_groups() -> None:
        with storage.open_parquet(url) as table:
            for group in range(table.num_row_groups):
                table.read_row_group(group, use_threads=False)

    with pytest.raises(pa.ArrowException):
        storage.read_parquet(url) if whole else by_groups()
    assert waits == []


def test_an_error_of_the_disk_stays_one_where_a_parquet_file_is_open(tmp_path: Path) -> None:
    storage.write_parquet(pa.table({"x": [1]}), str(tmp_path / "a.parquet"))
    with pytest.raises(OSError, match="the disk said so"), storage.open_parquet(str(tmp_path / "a.parquet")):
        raise OSError(errno.EIO, "the disk said so")
    with pytest.raises(FileNotFoundError), storage.open_parquet(str(tmp_path / "b.parquet")):
        pass


def write_texts(path: Path, rows: int) -> pa.Table:
    """Two row groups of texts, of two kilobytes each, that hardly compress; with a column of lists."""
    generator = np.random.default_rng(rows)
    texts = [generator.bytes(1_000).hex() for _ in range(rows)]
    table = pa.table({"row": range(rows), "text": texts, "list": [[{"at": row}] * (row % 3) for row in range(rows)]})
    storage.write_parquet(table, str(path))
    return table


@hypothesis.settings(deadline=None, max_examples=25)
@hypothesis.given(rows=st.sets(st.integers(0, 4_300)), columns=st.permutations(["row", "list"]))
def test_some_rows_are_those_of_the_whole_table(
    rows: set[int], columns: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "texts.parquet"
    if not path.exists():
        write_texts(path, 4_200)
    whole = storage.read_parquet(str(path), use_threads=False).select(columns)
    wanted = sorted(rows)
    found = storage.read_rows(str(path), wanted, columns)
    assert found.to_pylist() == whole.take(pa.array([row for row in wanted if row < 4_200], pa.int64())).to_pylist()
    assert found.schema.equals(whole.schema)


# It lives as long as the process: Arrow's threads give memory back to it a moment after a read has returned, and the
# process crashed, one time in six, where the pool had gone with the test.
COUNTING_POOL = pa.proxy_memory_pool(pa.default_memory_pool())


def test_some_rows_take_no_memory_for_the_others(tmp_path: Path) -> None:
    write_texts(tmp_path / "texts.parquet", 4_096)
    before = pa.default_memory_pool()
    pa.set_memory_pool(COUNTING_POOL)
    try:
        storage.read_rows(str(tmp_path / "texts.parquet"), [5, 4_000], ["text"])
        few_bytes = COUNTING_POOL.max_memory()
        storage.read_parquet(str(tmp_path / "texts.parquet"), ["text"])
        all_bytes = COUNTING_POOL.max_memory()
    finally:
        pa.set_memory_pool(before)
    assert all_bytes > 8_000_000 > 3_000_000 > few_bytes


@pytest.mark.parametrize(
    ("url", "package"),
    [("az://c/run", "adlfs"), ("abfs://c@a.dfs.core.windows.net/run", "adlfs"), ("s3://b/run", r"'cert-ray\[s3\]'")],
)
def test_a_missing_driver_is_told_by_its_package(monkeypatch, url, package):
    def without_driver(_, **_options):
        raise ImportError("Install something")

    monkeypatch.setattr("fsspec.core.url_to_fs", without_driver)
    with pytest.raises(ConfigError, match=f"On every node: pip install {package}"):
        storage.resolve(url)


def test_a_driver_that_knows_no_account_is_not_called_missing(monkeypatch):
    def without_account(_, **_options):
        raise ValueError("unable to connect to account")  # as adlfs does

    monkeypatch.setattr("fsspec.core.url_to_fs", without_account)
    with pytest.raises(ConfigError, match=r"unable to connect to account\. Its account goes into the environment"):
        storage.resolve("az://c/run")
    monkeypatch.undo()
    with pytest.raises(ConfigError, match=r"not known.*Install its fsspec driver"):
        storage.resolve("nowhere://c/run")


def test_arrow_opens_what_is_not_local_through_fsspec():
    path, filesystem = storage.for_arrow("memory://arrow/run")
    with filesystem.open_output_stream(f"{path}/part") as stream:
        stream.write(b"one")
    assert storage.read_bytes("memory://arrow/run/part") == b"one"
    storage.remove("memory://arrow")
    assert storage.for_arrow("/a/run") == ("/a/run", None)
    path, filesystem = storage.for_arrow("s3://bucket/run")
    assert path == "bucket/run"
    assert isinstance(filesystem, pyarrow.fs.PyFileSystem)


@pytest.mark.parametrize("kind", ["local", "memory"])
def test_a_file_is_copied_in_blocks_with_the_checksum_of_the_whole(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(storage, "_CHECKSUM_BLOCK_BYTES", 10)
    (tmp_path / "source").write_bytes(bytes(range(25)))
    url = str(tmp_path / "there" / "copy") if kind == "local" else f"memory://copied/{tmp_path.name}"
    written = storage.copy_from_local(tmp_path / "source", url)
    assert storage.read_bytes(url) == bytes(range(25))
    assert written == storage.checksum(url)
    assert written == storage.write_bytes(url, bytes(range(25)))
