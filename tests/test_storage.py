"""Writes appear whole or not at all, and stop before the disk is full."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import pyarrow as pa
import pytest

from cert_ray import storage
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
