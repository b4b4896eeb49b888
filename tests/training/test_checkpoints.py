"""Which checkpoint counts, which is refused, which goes."""

from __future__ import annotations

from pathlib import Path

import pytest

from cert_ray.errors import CheckpointError
from cert_ray.training import checkpoints


def _write(folder: Path, step: int, complete: bool = True, world_size: int = 2) -> Path:
    target = folder / checkpoints.name_of_step(step)
    for rank in range(world_size):
        part = folder / f"local-{rank}"
        (part / "engine").mkdir(parents=True)
        (part / "engine" / f"rank-{rank}.pt").write_bytes(bytes([step % 256, rank]) * 50)
        checkpoints.seal_part(part, step=step, rank=rank, world_size=world_size, zero_stage=1, run_digest="mine")
        for file in [path for path in part.rglob("*") if path.is_file()]:
            arrived = target / file.relative_to(part)
            arrived.parent.mkdir(parents=True, exist_ok=True)
            file.rename(arrived)
        (part / "engine").rmdir()
        part.rmdir()
    if complete:
        checkpoints.mark_complete(str(target), world_size)
    return target


def test_an_absent_or_empty_folder_has_none(tmp_path):
    assert checkpoints.newest(str(tmp_path / "absent")) is None
    assert checkpoints.newest(str(tmp_path)) is None
    checkpoints.remove_incomplete(str(tmp_path / "absent"))


def test_the_newest_is_the_one_of_the_highest_step_that_was_finished(tmp_path):
    for step in (5, 999_999, 1_000_000):
        _write(tmp_path, step)
    _write(tmp_path, 2_000_000, complete=False)
    assert checkpoints.newest(str(tmp_path)) == (1_000_000, str(tmp_path / "step-1000000"))
    checkpoints.remove_incomplete(str(tmp_path))
    checkpoints.keep_newest(str(tmp_path), 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1000000", "step-999999"]


def test_a_whole_checkpoint_verifies(tmp_path):
    part = checkpoints.verify(str(_write(tmp_path, 3)), "mine")
    assert (part.step, part.rank, part.world_size) == (3, 0, 2)


@pytest.mark.parametrize("name", ["engine/rank-1.pt", "part-00001.json", "part-00000.json"])
def test_a_missing_file_is_named(tmp_path, name):
    checkpoint = _write(tmp_path, 3)
    (checkpoint / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing. Delete .*step-000003"):
        checkpoints.verify(str(checkpoint))


@pytest.mark.parametrize(("name", "payload"), [("engine/rank-1.pt", b"x" * 100), ("part-00001.json", b"{not json")])
def test_a_damaged_file_is_named(tmp_path, name, payload):
    checkpoint = _write(tmp_path, 3)
    (checkpoint / name).write_bytes(payload)
    with pytest.raises(CheckpointError, match=f"damaged checkpoint: .*{name}"):
        checkpoints.verify(str(checkpoint))
    checkpoints.verify(str(checkpoint), only_rank=0)  # rank 0's part is whole


def test_another_runs_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="other options or inputs"):
        checkpoints.verify(str(_write(tmp_path, 3)), "theirs")
