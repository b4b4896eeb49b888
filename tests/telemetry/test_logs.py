"""Log lines say what they are about; a run's story is kept whatever happens, and never ends a run."""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cert_ray.errors import ConfigError
from cert_ray.telemetry import logs

LOGGER = logging.getLogger("cert_ray.tests.logs")


def configured(monkeypatch: pytest.MonkeyPatch, form: str | None) -> io.StringIO:
    """Logging as a new process configures it, and what it writes to stderr."""
    errors = io.StringIO()
    monkeypatch.setattr(sys, "stderr", errors)
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # here, since pytest adds its own when a test begins
    logs.configure(form)
    return errors


@pytest.fixture(autouse=True)
def levels() -> Iterator[None]:
    """Levels are as before when a test has ended."""
    loggers = [logging.getLogger(name) for name in (None, "cert_ray", *logs._NOISY)]
    before = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, before, strict=True):
        logger.setLevel(level)


def story_of(run: Path) -> list[dict[str, Any]]:
    (file,) = (run / "logs").iterdir()
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_json_lines_have_run_stage_and_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = configured(monkeypatch, "json")
    with logs.scope(run="/runs/a"), logs.scope(stage="documents"):
        LOGGER.debug("shard done", extra={"shard": "shard-00003", "rows_read": 7})
    LOGGER.info("elsewhere")
    first, second = map(json.loads, errors.getvalue().splitlines())
    assert {name: first[name] for name in ("run", "stage", "shard", "rows_read", "message", "level")} == {
        "run": "/runs/a",
        "stage": "documents",
        "shard": "shard-00003",
        "rows_read": 7,
        "message": "shard done",
        "level": "DEBUG",
    }
    assert "run" not in second
    assert first["time"] < second["time"]


def test_text_has_no_line_for_each_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = configured(monkeypatch, None)
    LOGGER.debug("shard done", extra={"shard": "shard-00003"})
    LOGGER.info("documents: read 7")
    assert errors.getvalue().split(" ", 1)[1] == "documents: read 7\n"


def test_the_form_comes_from_the_environment_and_has_two_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(logs.FORM_VARIABLE, "json")
    assert logs.chosen_form() == logs.Form.JSON
    assert logs.chosen_form("text") == logs.Form.TEXT
    monkeypatch.setenv(logs.FORM_VARIABLE, "yaml")
    with pytest.raises(ConfigError, match="'yaml'; known are text, json"):
        logs.configure()


def test_a_story_tells_how_the_block_began_and_ended(tmp_path: Path) -> None:
    with logs.story(str(tmp_path), "preprocess"), logs.scope(stage="dedup"):
        LOGGER.debug("shard done", extra={"shard": "shard-00000"})
    began, told, ended = story_of(tmp_path)
    assert (began["event"], ended["event"]) == ("began", "finished")
    assert began["versions"]["python"]
    assert (told["verb"], told["stage"], told["shard"]) == ("preprocess", "dedup", "shard-00000")
    assert {line["run"] for line in (began, told, ended)} == {str(tmp_path)}


def test_a_failure_is_told_and_goes_on_to_the_caller(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="disk is full"), logs.story(str(tmp_path), "pack"):
        raise OSError("disk is full")
    assert story_of(tmp_path)[-1]["message"] == "pack failed: disk is full"


def test_lines_are_there_before_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_FLUSH_EVERY_S", 0.0)
    with logs.story(str(tmp_path), "train"):
        LOGGER.info("step 1")
        assert [line["message"] for line in story_of(tmp_path)] == ["train began", "step 1"]


def test_a_story_that_cannot_be_kept_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "run").write_text("a file where the folder should be")
    with logs.story(str(tmp_path / "run"), "train"):
        LOGGER.info("step 1")
    assert [record.levelname for record in caplog.records if "not kept" in record.message] == ["WARNING"]


def test_scopes_end_with_their_blocks_and_can_be_inherited() -> None:
    with logs.scope(run="a"):
        with logs.scope(stage="b"):
            assert logs.inherited() == {"run": "a", "stage": "b"}
        assert logs.inherited() == {"run": "a"}
    assert logs.inherited() == {}
