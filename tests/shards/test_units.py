"""What was done is told from what was not: by content, by the input's version, and by the run that is at work."""

from __future__ import annotations

import functools
import socket
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cert_ray import manifests, storage
from cert_ray.config import Config
from cert_ray.errors import ConfigError, ShardCorruptError, SupersededError
from cert_ray.manifests import ShardReport
from cert_ray.shards import units
from cert_ray.shards.units import WorkUnit, write_table


class _Nothing(Config):
    pass


def writes(folder: Path, text: str) -> units.Work:
    """Work whose shard holds `text`."""

    def work(unit: WorkUnit) -> ShardReport:
        file = write_table(str(folder), f"{unit.name}.parquet", pa.table({"text": [text]}))
        return ShardReport(shard=unit.name, unit_digest="", files=(file,), rows_read=1, rows_kept=1)

    return work


def perform(given: WorkUnit, folder: Path, text: str) -> ShardReport:
    """One unit, by a run of its own."""
    with units.attempt(str(folder), "stage", "verb", "options") as begun:
        return units.perform(given, writes(folder, text), begun)


def run(planned: list[WorkUnit], folder: Path, text: str) -> None:
    with units.attempt(str(folder), "stage", "verb", "options") as begun:
        units.run_in_process(planned, writes(folder, text), begun)


def unit(version: str = "", weight: int = 0) -> WorkUnit:
    return WorkUnit(name="shard-00000", payload={"file": "a.py", "size": 3}, version=version, weight=weight)


def test_a_report_counts_until_the_input_has_another_version(tmp_path: Path) -> None:
    folder = str(tmp_path)
    report = perform(unit("monday"), tmp_path, "one")
    assert units.finished_report(unit("monday"), folder, "options", "verb") == report
    assert units.finished_report(unit("tuesday"), folder, "options", "verb") is None
    assert units.finished_report(unit(), folder, "options", "verb") == report  # a storage that tells no versions


def test_what_cannot_be_read_is_called_damaged_where_it_is(tmp_path: Path) -> None:
    perform(unit(), tmp_path, "one")
    path = tmp_path / "shard-00000.parquet"

    def read(error: Exception) -> None:
        with units.damage_named(str(tmp_path), "shard-00000", "verb"):
            raise error

    errors: list[Exception] = [
        pa.ArrowInvalid("no footer"),
        OSError("Corrupt snappy"),
        UnicodeDecodeError("utf-8", b"", 0, 1, ""),
    ]
    for error in errors:
        with pytest.raises(type(error)):  # storage, or a fault of ours: the shard is as its report says
            read(error)
    path.write_bytes(path.read_bytes()[:-9])
    for error in errors:
        with pytest.raises(
            ShardCorruptError, match=r"shard-00000\.parquet: the manifest says .* `cert-ray verb` again"
        ):
            read(error)
    path.unlink()
    with pytest.raises(ShardCorruptError, match="found no file"):
        read(FileNotFoundError(2, "gone"))
    for report in ("{", None):
        url = Path(units.report_url(str(tmp_path), "shard-00000"))
        url.write_text(report) if report else url.unlink()
        with pytest.raises(FileNotFoundError):  # nothing tells what was there
            read(FileNotFoundError(2, "gone"))


def test_a_run_that_a_later_one_took_over_does_not_call_shards_damaged(tmp_path: Path) -> None:
    folder = str(tmp_path)
    with units.attempt(folder, "stage", "verb", "options") as earlier:
        units.perform(unit(), writes(tmp_path, "one"), earlier)
        with units.attempt(folder, "stage", "verb", "other options"):
            (tmp_path / "shard-00000.parquet").unlink()
        with pytest.raises(SupersededError), units.damage_named(folder, "shard-00000", "verb"):
            raise FileNotFoundError(2, "gone")


def finished(folder: Path, text: str) -> manifests.Manifest:
    """A stage of one shard, made by a run of its own."""
    with units.attempt(str(folder), "stage", "verb", "options") as begun:
        report = units.perform(unit(), writes(folder, text), begun)
        manifest = manifests.summarize("stage", _Nothing(), "inputs", [report])
        manifests.write_manifest(str(folder), manifest)
    return manifest


def test_a_stage_ends_as_superseded_only_where_what_it_was_made_from_is_gone(tmp_path: Path) -> None:
    folder = str(tmp_path)
    manifest = finished(tmp_path, "one")
    with units.made_from(folder, manifest, "verb"):
        finished(tmp_path, "one")  # the same, by another run
    with pytest.raises(ZeroDivisionError), units.made_from(folder, manifest, "verb"):
        raise ZeroDivisionError
    for change in (functools.partial(finished, tmp_path, "other"), (tmp_path / "manifest.json").unlink):
        change()
        with pytest.raises(SupersededError, match="another run") as told, units.made_from(folder, manifest, "verb"):
            raise ZeroDivisionError
        assert isinstance(told.value.__cause__, ZeroDivisionError)
        with pytest.raises(SupersededError), units.made_from(folder, manifest, "verb"):
            pass


def test_a_shard_was_the_one_it_was_called_unless_a_later_run_is_or_was_there(tmp_path: Path) -> None:
    folder = str(tmp_path)
    identity = finished(tmp_path, "one").files[0].identity
    check = functools.partial(units.check_source, folder, "shard-00000", identity)
    check()
    with units.attempt(folder, "stage", "verb", "options"), pytest.raises(SupersededError):
        check()
    finished(tmp_path, "one")
    check()
    finished(tmp_path, "another")
    with pytest.raises(SupersededError):
        check()
    Path(units.report_url(folder, "shard-00000")).unlink()
    with pytest.raises(SupersededError):
        check()


def test_a_run_that_ends_while_a_shard_is_checked_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is over when its token is looked for, and its report tells of it."""
    folder, own_token = str(tmp_path), units._token
    identity = finished(tmp_path, "one").files[0].identity

    def overtaken(asked: str) -> str | None:
        monkeypatch.undo()
        finished(tmp_path, "another")
        return own_token(asked)

    monkeypatch.setattr(units, "_token", overtaken)
    with pytest.raises(SupersededError):
        units.check_source(folder, "shard-00000", identity)


def test_versions_and_weights_show_in_no_digest_and_no_report(tmp_path: Path) -> None:
    reports = [
        perform(given, tmp_path / name, "one")
        for name, given in (("a", unit("monday", 1)), ("b", unit("tuesday", 2)), ("c", unit()))
    ]
    assert reports[0] == reports[1] == reports[2]
    assert units.inputs_digest([unit("monday", 1)]) == units.inputs_digest([unit()])


def test_no_manifest_stands_over_a_shard_whose_input_was_rewritten(tmp_path: Path) -> None:
    folder = str(tmp_path)
    report = perform(unit("monday"), tmp_path, "one")
    manifest = manifests.summarize("stage", _Nothing(), "inputs", [report])
    manifests.write_manifest(folder, manifest)
    units.withdraw_manifest([unit("monday")], folder, "options", "stage", "verb")
    assert manifests.is_finished(folder)
    units.withdraw_manifest([unit("tuesday")], folder, "options", "stage", "verb")
    assert not manifests.is_finished(folder)


def files_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_earlier_run_overwrites_nothing(tmp_path: Path) -> None:
    folder = str(tmp_path)
    with units.attempt(folder, "stage", "verb", "options") as earlier:
        old = units.perform(unit(), writes(tmp_path, "earlier"), earlier)
        with units.attempt(folder, "stage", "verb", "other options") as later:
            report = units.perform(unit(), writes(tmp_path, "later"), later)
            before = files_of(tmp_path)
            # A task, and then the driver, of the run that began earlier.
            with pytest.raises(SupersededError, match="a folder of its own"):
                units.perform(unit(), writes(tmp_path, "earlier"), earlier)
            assert files_of(tmp_path) == before
            manifests.write_manifest(folder, manifests.summarize("stage", _Nothing(), "inputs", [report]))
        # Nor once that run is through, and its token gone.
        before = files_of(tmp_path)
        with pytest.raises(SupersededError):
            units.perform(unit(), writes(tmp_path, "earlier"), earlier)
        with pytest.raises(SupersededError):
            manifests.write_manifest(folder, manifests.summarize("stage", _Nothing(), "inputs", [old]))
        with pytest.raises(SupersededError):
            storage.write_text(str(tmp_path / "card.html"), "of the earlier run")
    assert files_of(tmp_path) == before
    manifests.check_file(folder, report.files[0], "verb")


def test_a_node_that_does_not_see_the_runs_folder_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with units.attempt(str(folder), "stage", "verb", "options") as begun:
        folder.rename(tmp_path / "on the disk of another node")
        with pytest.raises(ConfigError, match=rf"{folder}: this run began there, and {socket.gethostname()} does not"):
            units.perform(unit(), writes(folder, "one"), begun)
    assert not [path for path in folder.rglob("*") if path.is_file()]


def test_a_finished_stage_keeps_no_token(tmp_path: Path) -> None:
    folder = str(tmp_path)
    with units.attempt(folder, "stage", "verb", "options") as begun:
        report = units.perform(unit(), writes(tmp_path, "one"), begun)
        manifests.write_manifest(folder, manifests.summarize("stage", _Nothing(), "inputs", [report]))
    names = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert names == {"shard-00000.parquet", "reports/shard-00000.json", "manifest.json"}


def test_a_guard_that_raises_leaves_no_file_behind(tmp_path: Path) -> None:
    def refuse() -> None:
        raise SupersededError("here")

    with storage.commits_guarded(refuse), pytest.raises(SupersededError):
        storage.write_text(str(tmp_path / "file"), "text")
    assert list(tmp_path.iterdir()) == []
    storage.write_text(str(tmp_path / "file"), "text")  # the guard ends with its block


def test_what_units_of_an_earlier_plan_left_is_removed(tmp_path: Path) -> None:
    planned = [WorkUnit(name=f"shard-{n:05}", payload={"n": n}, version="monday") for n in range(3)]
    run(planned, tmp_path, "one")
    before = {path.name for path in tmp_path.rglob("*") if path.is_file() and "shard-00000" in path.name}
    run(planned[:1], tmp_path, "two")
    left = {path.name for path in tmp_path.rglob("*") if path.is_file() and "shard-" in path.name}
    assert left == before
    assert pq.read_table(tmp_path / "shard-00000.parquet").column("text").to_pylist() == ["one"], "was finished"


def weighed(weights: list[int]) -> list[WorkUnit]:
    return [WorkUnit(name=units.shard_name(i), payload={}, weight=weight) for i, weight in enumerate(weights)]


@hypothesis.given(st.lists(st.integers(0, 2 * units.BATCH_WEIGHT), max_size=60), st.integers(0, 9))
def test_batches_hold_every_unit_once_and_none_that_is_heavy_shares_one(weights: list[int], workers: int) -> None:
    given = weighed(weights)
    batches = units.batches(given, workers)
    assert sorted(unit.name for batch in batches for unit in batch) == [unit.name for unit in given]
    for batch in batches:
        assert len(batch) == 1 or 0 < sum(unit.weight for unit in batch) <= units.BATCH_WEIGHT
        assert len(batch) == 1 or all(unit.weight for unit in batch)


def test_batches_take_half_of_a_workers_share_of_what_is_left_or_what_is_worth_handing_over() -> None:
    batches = units.batches(weighed([1_000_000] * 64), workers=2)
    assert [len(batch) for batch in batches] == [16, 12, 9, 6, 5, 4, 4, 4, 4]
    small = units.batches(weighed([100] * 64), workers=2)
    assert [len(batch) for batch in small] == [16, 12, 9, 6, 5, 4, 4, 4, 4], "a little work is shared out as well"
    assert [len(batch) for batch in units.batches(weighed([1_000_000] * 64), workers=64)] == [1] * 64


def test_a_shard_without_documents_shares_a_task_and_one_of_unknown_size_is_alone() -> None:
    counts: list[dict[str, int]] = [{"content_bytes": 0}, {"content_bytes": 160_000}, {"content_bytes": 17}, {}]
    reports = [ShardReport(shard="s", unit_digest="", files=(), rows_read=0, rows_kept=0, counts=c) for c in counts]
    weights = [units.weight_after_cleaning(report, 16) for report in reports]
    assert weights == [1, 10_000, 2, 0]
    batches = units.batches(weighed(weights), workers=1)
    assert [[unit.weight for unit in batch] for batch in batches] == [[0], [10_000, 2, 1]]


def test_heavy_units_begin_first_and_unknown_ones_are_alone() -> None:
    batches = units.batches(weighed([5, 0, 90_000_000, 9_000_000, 0, 7]), workers=1)
    assert [[unit.weight for unit in batch] for batch in batches] == [[90_000_000], [0], [0], [9_000_000], [7, 5]]
