"""What several jobs kept reads in order of time; a job that was killed is open, and its last line may be cut."""

from __future__ import annotations

import json
from pathlib import Path

from cert_ray.operations.story import attempts, read_story, render_line


def keep(run: Path, name: str, *lines: dict[str, object], part: int = 0) -> Path:
    file = run / "logs" / name / f"part-{part:05d}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps({"verb": name.split("-")[1], "host": "h", **line}) + "\n" for line in lines))
    return file


def test_lines_of_several_jobs_stand_in_order_of_time(tmp_path: Path) -> None:
    keep(
        tmp_path, "1-train-7",
        {"time": "2026-01-01T00:00:01.000", "level": "DEBUG", "message": "train began", "event": "began"},
        {"time": "2026-01-01T00:00:04.000", "level": "DEBUG", "message": "train finished", "event": "finished",
         "seconds": 3},
    )  # fmt: skip
    killed = keep(
        tmp_path, "2-pack-8",
        {"time": "2026-01-01T00:00:02.000", "level": "DEBUG", "message": "pack began", "event": "began"},
        {"time": "2026-01-01T00:00:03.000", "level": "INFO", "message": "half", "stage": "tokens", "shard": "s-1"},
    )  # fmt: skip
    killed.write_text(killed.read_text() + '{"time": "2026-01-01T00:00:09", "mess')
    lines = read_story(str(tmp_path))
    assert [line.message for line in lines] == ["train began", "pack began", "half", "train finished"]
    assert [(one.verb, one.outcome, one.seconds) for one in attempts(lines)] == [
        ("train", "finished", 3),
        ("pack", "open", None),
    ]
    assert render_line(lines[2]) == "2026-01-01 00:00:03.0 I [pack tokens s-1] half"


def test_the_parts_of_a_job_are_one_attempt_in_their_order(tmp_path: Path) -> None:
    same = {"time": "2026-01-01T00:00:01.000", "level": "INFO"}  # the clock of a line may stand still
    for part in (10, 2, 0):
        keep(tmp_path, "1-train-7", {**same, "message": f"in {part}"}, part=part)
    lines = read_story(str(tmp_path))
    assert [line.message for line in lines] == ["in 0", "in 2", "in 10"]
    (one,) = attempts(lines)
    assert one.log == "1-train-7"


def test_a_run_without_logs_has_no_story(tmp_path: Path) -> None:
    assert read_story(str(tmp_path / "nothing")) == []
    assert attempts([]) == []
