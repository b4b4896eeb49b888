"""Which checkpoint counts, which is refused, which goes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cert_ray import storage
from cert_ray.errors import CheckpointError, DamagedCheckpointError, NoWholeCheckpointError
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
    checkpoints.prune(str(tmp_path), 2, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1000000", "step-999999"]


@pytest.mark.parametrize(
    ("keep_newest", "held_out", "removed"),
    [
        (1, None, [10, 20, 30]),
        (2, None, [10, 20]),
        (9, None, []),
        (2, {}, [10, 20]),
        (2, {10: 1.0, 20: 2.0, 40: 3.0}, [20]),
        (1, {10: 2.0, 20: 1.0, 30: 1.0}, [10, 30]),  # the earlier of equals
        (2, {40: 1.0, 10: 2.0}, [10, 20]),  # the best is among the newest
        (1, {15: 0.5, 20: 1.0}, [10, 30]),  # no checkpoint was written where the loss was lowest
    ],
)
def test_the_newest_and_the_best_are_kept(keep_newest, held_out, removed):
    assert checkpoints.to_remove([10, 20, 30, 40], keep_newest, held_out) == removed


def test_removal_cut_short_leaves_one_that_counts_as_absent(tmp_path, monkeypatch):
    for step in (1, 2):
        _write(tmp_path, step)
    removed = []

    def remove_once(url):
        assert not removed, "killed"
        removed.append(url)
        Path(url).unlink()

    monkeypatch.setattr(checkpoints.storage, "remove", remove_once)
    with pytest.raises(AssertionError, match="killed"):
        checkpoints.prune(str(tmp_path), 1, None)
    assert [step for step, _ in checkpoints.complete_checkpoints(str(tmp_path))] == [2]


def test_damaged_ones_are_named_and_the_whole_one_before_them_is_used(tmp_path, caplog):
    for step in (1, 2, 3):
        _write(tmp_path, step)
    (tmp_path / "step-000003" / "engine" / "rank-1.pt").unlink()
    (tmp_path / "step-000002" / "engine" / "rank-0.pt").write_bytes(b"x" * 100)
    found = checkpoints.complete_checkpoints(str(tmp_path))
    step, part, damaged = checkpoints.newest_readable(found, checkpoints.verify)
    assert (step, part.step) == (1, 1)
    checkpoints.remove_damaged(damaged)
    for name in ("step-000003/engine/rank-1.pt is missing", "step-000002/engine/rank-0.pt has 100 bytes"):
        assert name in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


def test_when_every_one_is_damaged_none_is_removed_and_the_start_is_not_taken_in_silence(tmp_path):
    for step in (1, 2):
        (_write(tmp_path, step) / "engine" / "rank-0.pt").unlink()
    with pytest.raises(
        NoWholeCheckpointError, match=r"step-000002.*step-000001.*or from the start where there is none"
    ):
        checkpoints.newest_readable(checkpoints.complete_checkpoints(str(tmp_path)), checkpoints.verify)
    assert len(list(tmp_path.iterdir())) == 2
    assert checkpoints.newest_readable([], checkpoints.verify) is None


def test_another_runs_newest_is_refused_not_skipped(tmp_path):
    _write(tmp_path, 3)
    with pytest.raises(CheckpointError, match="other options or inputs"):
        checkpoints.check_run(str(tmp_path), "theirs")
    found = checkpoints.complete_checkpoints(str(tmp_path))
    with pytest.raises(CheckpointError, match="other options or inputs"):
        checkpoints.newest_readable(found, lambda url: checkpoints.verify(url, "theirs"))
    assert (tmp_path / "step-000003").exists()


def test_whose_checkpoints_they_are_is_asked_of_the_newest_that_says_so(tmp_path):
    checkpoints.check_run(str(tmp_path / "absent"), "mine")
    for step in (1, 2):
        _write(tmp_path, step)
    (tmp_path / "step-000002" / "part-00000.json").write_text("{not json")
    checkpoints.check_run(str(tmp_path), "mine")
    with pytest.raises(CheckpointError, match="step-000001 belongs to a run with other options or inputs"):
        checkpoints.check_run(str(tmp_path), "theirs")


def test_of_a_remote_one_only_the_parts_asked_for_are_copied_and_compared_on_the_way(tmp_path):
    checkpoint, url = _write(tmp_path, 3), f"memory://fetch/{tmp_path.name}/step-000003"
    for file in (path for path in checkpoint.rglob("*") if path.is_file()):
        storage.write_bytes(f"{url}/{file.relative_to(checkpoint).as_posix()}", file.read_bytes())
    first = checkpoints.first_part(url, "mine")
    folder = checkpoints.fetch(url, first, {1}, tmp_path / "copy")
    copied = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    part = json.loads((checkpoint / "part-00001.json").read_text())
    assert copied == {file["name"] for file in part["files"]}
    assert all((folder / name).read_bytes() == (checkpoint / name).read_bytes() for name in copied)
    storage.write_bytes(f"{url}/engine/rank-0.pt", b"other")
    checkpoints.fetch(url, first, {1}, tmp_path / "again")
    for ranks in ({0}, None):
        with pytest.raises(DamagedCheckpointError, match=r"memory:.*engine/rank-0\.pt has 5 bytes"):
            checkpoints.fetch(url, first, ranks, tmp_path / "third")


def test_a_local_one_is_compared_where_it_lies(tmp_path):
    checkpoint = _write(tmp_path, 3)
    first = checkpoints.first_part(str(checkpoint))
    assert checkpoints.fetch(str(checkpoint), first, None, tmp_path / "copy") == checkpoint
    assert not (tmp_path / "copy").exists()
    (checkpoint / "engine" / "rank-1.pt").write_bytes(b"other")
    assert checkpoints.fetch(str(checkpoint), first, {0}, tmp_path / "copy") == checkpoint
    with pytest.raises(DamagedCheckpointError, match="rank-1"):
        checkpoints.fetch(str(checkpoint), first, {0, 1}, tmp_path / "copy")


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
