"""Units on Ray Data: what a storage says in passing is tried again, what stays comes back as itself."""

from __future__ import annotations

import errno
import logging
from pathlib import Path

import pytest
import ray

from cert_ray import storage
from cert_ray.errors import ConfigError, StorageFullError
from cert_ray.manifests import ShardReport
from cert_ray.shards.on_ray import run_units
from cert_ray.shards.units import Work, WorkUnit, attempt, shard_name
from tests.ray_marks import RAY_DATA

pytestmark = RAY_DATA


def raising(error: Exception) -> Work:
    """Work that always fails."""

    def work(unit: WorkUnit) -> ShardReport:
        raise error

    return work


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


def run(folder: Path, work: Work, units: int = 1) -> list[ShardReport]:
    """So many units, in one task."""
    planned = [WorkUnit(name=shard_name(n), payload={"n": n}, weight=1) for n in range(units)]
    with attempt(str(folder / "run"), "documents", "preprocess", "c") as begun:
        return run_units(planned, work, begun, workers=1)


def test_a_passing_error_of_storage_is_tried_again(tmp_path: Path) -> None:
    (report,) = run(tmp_path, failing(tmp_path, errno.EIO, times=1))
    assert report.rows_kept == 1


def test_a_full_disk_is_not_tried_again(tmp_path: Path) -> None:
    with pytest.raises(ray.exceptions.RayTaskError, match="the storage said so"):
        run(tmp_path, failing(tmp_path, errno.ENOSPC, times=9))
    assert len(list(tmp_path.glob("failure-*"))) == 1


def test_an_error_raised_on_purpose_comes_back_as_itself(tmp_path: Path) -> None:
    with pytest.raises(StorageFullError) as raised:
        run(tmp_path, raising(StorageFullError("/data/x", 3_000_000, 1_000_000)))
    assert (raised.value.uri, raised.value.free_bytes) == ("/data/x", 1_000_000)


def test_rays_lines_do_not_stand_between_ours(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Ray Data's handler writes to the terminal, whatever pytest does with logging."""
    consoles = [one for one in logging.getLogger("ray.data").handlers if type(one).__name__ == "PlainRayHandler"]
    assert consoles, "Ray Data logs another way now: see `logs.warnings_alone`"
    run(tmp_path, failing(tmp_path, errno.EIO, times=0))
    told = capfd.readouterr()
    assert (told.out, told.err) == ("", "")
    log = Path(ray._private.worker._global_node.get_session_dir_path(), "logs", "ray-data", "ray-data.log").read_text()
    assert "Execution plan of Dataset" in log
    assert "Progress bars disabled" in log


def test_a_folder_in_this_process_own_memory_is_refused() -> None:
    begun = attempt("memory://run", "documents", "preprocess", "digest")
    with begun as run, pytest.raises(ConfigError, match="own memory"):
        run_units([], raising(ValueError()), run)
