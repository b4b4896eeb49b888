"""A job's last line tells its outcome, and its exit status what kind: also of an error that nobody expected."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from cert_ray.errors import ConfigError, NotFinishedError
from cert_ray.operations import job


@pytest.fixture
def submitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe on the command line, and no Ray."""

    @contextlib.contextmanager
    def session() -> Iterator[None]:
        yield

    recipe = {"run": str(tmp_path / "run"), "libraries": ["numpy"], "preprocess": {"sources": {"inputs": ["corpus"]}}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.setattr(sys, "argv", ["jobs/pack.py", str(tmp_path / "recipe.yaml")])
    monkeypatch.setattr(job, "ray_session", session)
    return tmp_path / "run"


def raising(error: BaseException) -> Callable[[object], None]:
    def stage(recipe: object) -> None:
        raise error

    return stage


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    told: dict[str, object] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return told


@pytest.mark.parametrize(
    ("error", "status"), [(ConfigError("change it"), 2), (NotFinishedError("/run", "preprocess"), 1)]
)
def test_an_error_raised_on_purpose_is_the_outcome(
    submitted: Path, capsys: pytest.CaptureFixture[str], error: Exception, status: int
) -> None:
    with pytest.raises(SystemExit) as stopped:
        job.run_job(raising(error))
    assert stopped.value.code == status
    assert last_line(capsys) == {"outcome": "failed", "error": str(error)}


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), SystemExit(143)])
def test_a_stop_is_the_outcome_and_goes_on_as_it_is(
    submitted: Path, capsys: pytest.CaptureFixture[str], stop: BaseException
) -> None:
    with pytest.raises(type(stop)) as raised:
        job.run_job(raising(stop))
    assert raised.value is stop
    assert last_line(capsys) == {"outcome": "stopped", "run": str(submitted)}


def test_any_other_error_is_the_outcome_too_and_keeps_its_traceback(
    submitted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(OSError, match="gone"):
        job.run_job(raising(OSError(5, "gone")))
    assert last_line(capsys) == {"outcome": "failed", "error": "OSError: [Errno 5] gone"}


def test_scores_are_told_and_the_story_is_kept(submitted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job.run_job(lambda recipe: {"problems": {"pass@1": 0.25}})
    assert last_line(capsys) == {
        "outcome": "finished",
        "run": str(submitted),
        "result": {"problems": {"pass@1": 0.25}},
    }
    (story,) = (submitted / "logs").iterdir()
    assert "-pack-" in story.name


@pytest.mark.parametrize("run", ["runs/mine", "./mine"])
def test_a_submitted_jobs_run_is_not_below_the_copy_of_the_checkout(
    submitted: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], run: str
) -> None:
    monkeypatch.chdir(submitted.parent)
    monkeypatch.setattr(sys, "argv", [*sys.argv, f"run={run}"])
    job.run_job(lambda recipe: {})  # by hand, on one machine
    capsys.readouterr()
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(SystemExit) as stopped:
        job.run_job(lambda recipe: {})
    assert stopped.value.code == 2
    assert f"run: '{run}' would be in the job's own folder" in str(last_line(capsys)["error"])


@pytest.mark.parametrize("run", ["{folder}", "~/run", "file://{folder}"])
def test_a_submitted_jobs_run_may_be_a_whole_path_or_a_url(
    submitted: Path, monkeypatch: pytest.MonkeyPatch, run: str
) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    monkeypatch.setenv("HOME", str(submitted.parent))
    monkeypatch.setattr(sys, "argv", [*sys.argv, f"run={run.format(folder=submitted)}"])
    job.run_job(lambda recipe: {})
    assert (submitted / "logs").is_dir()
