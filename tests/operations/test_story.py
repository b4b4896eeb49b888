"""What several jobs kept reads in order of time; a job that was killed is open, and its last line may be cut."""

from __future__ import annotations

import json
from pathlib import Path

from cert_ray.operations.story import attempts, last_job, read_story, render_line


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


def began(second: int, verb: str) -> dict[str, object]:
    versions = {"cert-ray": "0.1.0", "python": "3.11.7"}
    return {
        "time": f"2026-01-01T00:00:{second:02}.0",
        "message": f"{verb} began",
        "event": "began",
        "versions": versions,
    }


def ended(second: int, event: str, message: str) -> dict[str, object]:
    return {"time": f"2026-01-01T00:00:{second:02}.0", "message": message, "event": event, "seconds": 12.34}


def test_the_last_job_is_told_by_where_it_ran_and_how_it_ended(tmp_path: Path) -> None:
    assert last_job(str(tmp_path)) is None
    keep(tmp_path, "20260101T000001-pack-8", began(1, "pack"), ended(2, "failed", "pack failed: the disk is full"))
    place = "on h, cert-ray 0.1.0, python 3.11.7, began 2026-01-01 00:00:01 UTC"
    assert last_job(str(tmp_path)) == f"pack {place}, failed after 12.3 s: the disk is full"
    keep(tmp_path, "20260101T000003-train-7", began(3, "train"), ended(9, "finished", "train finished"))
    told = last_job(str(tmp_path))
    assert told is not None
    assert told.endswith("began 2026-01-01 00:00:03 UTC, finished after 12.3 s")
    keep(tmp_path, "20260101T000010-train-9", began(10, "train"), ended(19, "stopped", "train stopped: SystemExit 143"))
    told = last_job(str(tmp_path))
    assert told is not None
    assert told.endswith("began 2026-01-01 00:00:10 UTC, stopped after 12.3 s: SystemExit 143")


def test_a_job_without_an_end_is_told_by_its_newest_line_and_its_workers_are_no_jobs(tmp_path: Path) -> None:
    keep(tmp_path, "20260101T000001-train-7", began(1, "train"))
    keep(
        tmp_path,
        "20260101T000002-train-base-9",
        began(2, "train-base"),
        {"time": "2026-01-01T00:00:30", "message": "step 40"},
    )
    told = last_job(str(tmp_path))
    assert told is not None
    assert told.startswith("train on h, ")
    assert told.endswith(", still running or killed, last line at 00:00:30: step 40")
