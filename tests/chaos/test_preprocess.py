"""Preprocessing under five kills, as CI runs it: nothing lost, nothing twice, equal bytes. `make chaos` does more."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos import events
from tests.chaos.events import Event
from tests.chaos.run import KINDS, ROOT, ChaosError, compare, tree

KILLS = 5


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)  # 70 s on two quiet cores
def test_kills_leave_no_trace_in_the_output(tmp_path: Path) -> None:
    """In a process of its own: a cluster of several nodes, beside the one Ray of the suite."""
    output = tmp_path / "chaos"
    command = [sys.executable, "-m", "tests.chaos.run", "--kills", str(KILLS), "--output", str(output)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout[-2_000:] + ended.stderr[-6_000:]
    kills = [json.loads(line) for line in (output / "kills.jsonl").read_text().splitlines()]
    assert [kill["number"] for kill in kills] == list(range(1, KILLS + 1))
    assert {kill["kind"] for kill in kills} == set(KINDS)
    assert all(kill["interrupted"] for kill in kills)
    assert len((output / "summary.md").read_text().splitlines()) > KILLS


def test_any_difference_between_two_trees_is_told(tmp_path: Path) -> None:
    for name in ("left", "right"):
        (tmp_path / name / "dataset" / "card").mkdir(parents=True)
        (tmp_path / name / "dataset" / "shard-00000.parquet").write_text("rows")
        (tmp_path / name / "dataset" / "card" / "sizes.png").write_text(name)  # pictures may differ
    expected = tree(tmp_path / "left")
    compare(1, expected, tree(tmp_path / "right"))
    (tmp_path / "right" / ".shard-00001.parquet.x.partial").write_text("half")
    with pytest.raises(ChaosError, match=r"run 1: 1 files .*\.partial"):
        compare(1, expected, tree(tmp_path / "right"))
    (tmp_path / "right" / "dataset" / "shard-00000.parquet").write_text("rowz")
    with pytest.raises(ChaosError, match="2 files"):
        compare(1, expected, tree(tmp_path / "right"))


def test_log_says_what_a_stopped_process_was_doing(tmp_path: Path) -> None:
    file = tmp_path / "events"
    file.write_text("1.0 7 begin outer\n2.0 8 begin other\n3.0 7 begin inner\n4.0 8 end other\n5.0 9 beg")
    log = events.read(file)
    assert log[-1] == Event(4.0, 8, begins=False, task="other")
    assert events.running(log) == {7: ["outer", "inner"]}
