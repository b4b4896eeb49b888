"""Log lines say what they are about; a run's story is kept whatever happens, and never ends a run."""

from __future__ import annotations

import errno
import io
import json
import logging
import pickle
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cert_ray import retries, storage
from cert_ray.errors import ConfigError, SupersededError
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
    (folder,) = (run / "logs").iterdir()
    files = sorted(folder.iterdir())
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def test_drivers_of_stores_tell_no_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = configured(monkeypatch, None)
    for client in ("azure.core.pipeline.policies.http_logging_policy", "urllib3.connectionpool", "fsspec"):
        logging.getLogger(client).info("Request URL: ...")  # as azure's does, with 20 lines for each
        logging.getLogger(client).warning("slow")
    assert [line.partition(" ")[2] for line in errors.getvalue().splitlines()] == ["slow"] * 3


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


@pytest.mark.parametrize(
    ("stop", "told"), [(KeyboardInterrupt(), "KeyboardInterrupt"), (SystemExit(15), "SystemExit 15")], ids=repr
)
def test_who_is_stopped_from_outside_says_so(tmp_path: Path, stop: BaseException, told: str) -> None:
    with pytest.raises(type(stop)), logs.story(str(tmp_path), "train"):
        raise stop
    last = story_of(tmp_path)[-1]
    assert (last["event"], last["message"]) == ("stopped", f"train stopped: {told}")


def test_what_is_no_error_raised_on_purpose_is_told_with_its_traceback(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), logs.story(str(tmp_path / "stopped"), "train"):
        raise KeyboardInterrupt
    stopped = story_of(tmp_path / "stopped")[-1]
    assert stopped["message"] == "train stopped: KeyboardInterrupt"
    assert any("raise KeyboardInterrupt" in line for line in stopped["exc_info"])
    with pytest.raises(ConfigError), logs.story(str(tmp_path / "refused"), "train"):
        raise ConfigError("change it")
    assert "exc_info" not in story_of(tmp_path / "refused")[-1]


class Store:
    """Stands before storage's writes: counts them, and raises or waits where told so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.error: Exception | None = None
        self.answers, self.asked, self.sizes = threading.Event(), threading.Semaphore(0), list[int]()
        self.answers.set()
        self._write = storage.write_text_once
        monkeypatch.setattr(storage, "write_text_once", self)

    def __call__(self, url: str, text: str) -> None:
        assert self.answers.wait(60)
        try:
            if self.error is not None:
                raise self.error
            self._write(url, text)
            self.sizes.append(len(text.splitlines()))
        finally:
            self.asked.release()


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setattr(logs, "_FLUSH_EVERY_S", 0.001)
    return Store(monkeypatch)


class StoreError(Exception):
    """As botocore's: no OSError, and none of ours."""


def test_lines_are_there_before_the_end_and_are_written_once(tmp_path: Path, store: Store) -> None:
    with logs.story(str(tmp_path), "train"):
        assert store.asked.acquire(timeout=60)
        LOGGER.info("step 1")
        assert store.asked.acquire(timeout=60)
        assert [line["message"] for line in story_of(tmp_path)] == ["train began", "step 1"]
    assert store.sizes == [1, 1, 1]


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def test_an_error_that_passes_loses_no_line(tmp_path: Path, store: Store, caplog: pytest.LogCaptureFixture) -> None:
    store.error = StoreError("SlowDown")
    with logs.story(str(tmp_path), "train"):
        LOGGER.info("step 1")
        assert store.asked.acquire(timeout=60)
        assert store.asked.acquire(timeout=60)
        store.error = None
    told = [line["message"] for line in story_of(tmp_path) if line["level"] != "WARNING"]
    assert told == ["train began", "step 1", "train finished"]
    assert warnings_of(caplog) == ["the run's story could not be written, trying again: SlowDown"]


@pytest.mark.parametrize("error", [OSError("gone"), StoreError("AccessDenied")])
def test_a_story_that_cannot_be_kept_is_a_warning_and_hides_no_outcome(
    tmp_path: Path, store: Store, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    store.error = error
    with pytest.raises(ConfigError, match=r"^change it$"), logs.story(str(tmp_path), "train"):
        raise ConfigError("change it")
    refused, lacks = warnings_of(caplog)
    assert refused == f"the run's story could not be written, trying again: {error}"
    assert re.search(r"is missing [23] lines$", lacks)  # began, failed, and the warning where it came before the end


def test_a_storage_that_refuses_every_write_is_told_once_and_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Through `storage` itself: what it tells of trying again would go into the story, and be told again."""
    refused = threading.Semaphore(0)

    def refuse(*_: object, **__: object) -> None:
        refused.release()
        raise OSError(errno.EIO, "the storage said so")

    waits: list[float] = []
    monkeypatch.setattr(retries, "_wait", waits.append)
    monkeypatch.setattr(storage.tempfile, "mkstemp", refuse)
    monkeypatch.setattr(logs, "_FLUSH_EVERY_S", 0.001)
    with logs.story(str(tmp_path), "train"):
        for _ in range(7):
            assert refused.acquire(timeout=60)
    assert waits == []
    told, lacks = warnings_of(caplog)
    assert told.startswith("the run's story could not be written, trying again: [Errno 5]")
    assert lacks.endswith("is missing 3 lines")  # began, the first warning, finished


def test_a_store_that_hangs_ends_no_run_and_holds_no_line_up(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logs, "_CLOSE_S", 0.01)
    monkeypatch.setattr(logs, "_WAITING_LINES", 3)
    store.answers.clear()
    with logs.story(str(tmp_path), "train"):
        for step in range(7):
            LOGGER.info("step %d", step)
    assert len(warnings_of(caplog)) == 1
    assert warnings_of(caplog)[0].endswith("is missing 9 lines")
    store.answers.set()
    assert store.asked.acquire(timeout=60)  # the thread has ended when the next test begins


def test_a_run_that_was_superseded_tells_its_end(tmp_path: Path) -> None:
    def refuse() -> None:
        raise SupersededError("/run/dedup")

    with (
        pytest.raises(SupersededError),
        logs.story(str(tmp_path), "preprocess"),
        storage.commits_guarded(refuse),
        logs.story(str(tmp_path / "inner"), "dedup"),
    ):
        storage.check_commit()
    assert story_of(tmp_path / "inner")[-1]["event"] == "failed"
    assert "another run has begun" in story_of(tmp_path)[-1]["message"]


def test_a_line_that_cannot_be_made_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging.getLogger("cert_ray"), "propagate", False)  # pytest's own handler raises
    with logs.story(str(tmp_path), "train"):
        LOGGER.info("%d steps", "no number")
    assert [line["message"] for line in story_of(tmp_path)] == ["train began", "train finished"]
    assert "no number" in capsys.readouterr().err


def test_scopes_end_with_their_blocks_and_can_be_inherited() -> None:
    with logs.scope(run="a"):
        with logs.scope(stage="b"):
            assert logs.inherited().fields == {"run": "a", "stage": "b"}
        assert logs.inherited().fields == {"run": "a"}
    assert logs.inherited().fields == {}


@pytest.mark.parametrize("form", logs.Form)
def test_a_worker_logs_in_the_form_and_the_scope_of_its_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: logs.Form
) -> None:
    configured(monkeypatch, form)
    with logs.scope(run=str(tmp_path), verb="evaluate"):
        given = pickle.loads(pickle.dumps(logs.inherited()))
    errors = configured(monkeypatch, None)  # as Ray Train's: a root with handlers of another form
    with logs.taken_over(given, kept_as="evaluate-worker"):
        LOGGER.info("pass@1 0.25")
    (line,) = (line for line in errors.getvalue().splitlines() if "pass@1" in line)
    if form == logs.Form.JSON:
        assert json.loads(line)["verb"] == "evaluate-worker"
    else:
        assert line.endswith(" pass@1 0.25")
    assert [line["message"] for line in story_of(tmp_path)][1] == "pass@1 0.25"
    assert logging.getLogger("cert_ray").propagate


def test_a_worker_without_a_run_keeps_no_story(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with logs.taken_over(logs.inherited(), kept_as="evaluate-worker"):
        LOGGER.info("pass@1 0.25")
    assert list(tmp_path.iterdir()) == []


def test_a_librarys_files_keep_what_its_terminal_leaves_out(tmp_path: Path) -> None:
    library = logging.getLogger("cert-ray-tests.library")
    library.setLevel(logging.DEBUG)
    library.propagate = False
    shown, file = io.StringIO(), logging.FileHandler(tmp_path / "all.log")
    library.handlers = [logging.StreamHandler(shown), file]
    with logs.warnings_alone(library.name, but="bars are off"):
        library.info("a plan")
        library.warning("bars are off, as you said")
        library.warning("a disk is slow")
        library.error("a disk is gone")
    library.info("afterwards")
    file.close()
    assert shown.getvalue().splitlines() == ["a disk is slow", "a disk is gone", "afterwards"]
    kept = ["a plan", "bars are off, as you said", "a disk is slow", "a disk is gone", "afterwards"]
    assert (tmp_path / "all.log").read_text().splitlines() == kept
