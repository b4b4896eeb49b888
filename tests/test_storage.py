"""Writes appear whole or not at all, and stop before the disk is full."""

from __future__ import annotations

import errno
import pickle
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from cert_ray import retries, storage
from cert_ray.errors import StorageFullError


def test_a_write_that_would_fill_the_disk_is_refused_and_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = str(tmp_path / "a.parquet")
    table = pa.table({"x": list(range(1000))})
    before = storage.write_parquet(table, target)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=before.size_bytes))
    with pytest.raises(StorageFullError, match=r"a\.parquet.*the disk has 0 MB left"):
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
