"""Units on Ray Data: what a storage says in passing is tried again, what stays comes back as itself."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from cert_ray import storage
from cert_ray.manifests import ShardReport
from cert_ray.shards.on_ray import run_units
from cert_ray.shards.units import Work, WorkUnit
from tests.ray_marks import RAY_DATA

pytestmark = RAY_DATA


def failing(folder: Path, number: int, times: int) -> Work:
    """Work that fails `times` times with error `number`, and then keeps one row."""

    def work(unit: WorkUnit) -> ShardReport:
        before = len(list(folder.glob("failure-*")))
        if before < times:
            (folder / f"failure-{before}").touch()
            raise OSError(number, "the storage said so")
        written = storage.write_text(str(folder / "run" / "shard.txt"), unit.name)
        assert written.size_bytes
        return ShardReport(shard=unit.name, unit_digest="", files=(), rows_read=1, rows_kept=1)

    return work


def run(folder: Path, work: Work) -> list[ShardReport]:
    units = [WorkUnit(name="shard-00000", payload={"n": 0})]
    return run_units(units, work, folder=str(folder / "run"), config_digest="c", stage="documents", verb="preprocess")


def test_a_passing_error_of_storage_is_tried_again(tmp_path: Path) -> None:
    (report,) = run(tmp_path, failing(tmp_path, errno.EIO, times=1))
    assert report.rows_kept == 1


def test_a_full_disk_ends_the_run_at_once_with_its_own_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="the storage said so") as raised:
        run(tmp_path, failing(tmp_path, errno.ENOSPC, times=9))
    assert raised.value.errno == errno.ENOSPC
    assert len(list(tmp_path.glob("failure-*"))) == 1
