"""Preprocessing through the real Jobs API with authentication on: cancelled, done, done twice, refused without a token;
and so is whoever asks for the cluster's health.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from tests.dataset.builders import write_corpus
from tests.ray_heads import ROOT, Head, started_head, submit

# A head, its agent and three submitted jobs start one after another: minutes where other work shares the machine.
pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A head of its own, with two CPUs."""
    with started_head() as head:
        yield head


def header(name: str) -> list[str]:
    """The command that a job's header says to run, as words; what is optional left out."""
    text = ast.get_docstring(ast.parse((ROOT / "jobs" / f"{name}.py").read_text()))
    assert text is not None
    (command,) = re.findall(r"RAY_\S+ ray job submit [^\[]+", text.replace("\\\n", " "))
    return shlex.split(command)


def submitted_as_written(head: Head, name: str, recipe: str) -> subprocess.CompletedProcess[str]:
    """The command of a job's header, run from the checkout; only head, recipe and Python are this test's."""
    mode, *command = header(name)
    for written, here in (
        ("http://127.0.0.1:8265", head.dashboard),
        ("jobs/numpy.yaml", recipe),
        ("python", sys.executable),
    ):
        command[command.index(written)] = here
    variables = {**head.environment, **dict([mode.split("=")])}
    path = f"{Path(sys.executable).parent}:{variables['PATH']}"
    return subprocess.run(
        command, env={**variables, "PATH": path}, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False
    )


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "jobs").glob("*.py")))
def test_a_jobs_header_says_how_it_is_submitted(name: str) -> None:
    mode, *command = header(name)
    assert mode == "RAY_AUTH_MODE=token"
    assert command[command.index("--") + 1 :] == ["python", f"jobs/{name}.py", "jobs/numpy.yaml"]
    assert (ROOT / command[command.index("--runtime-env") + 1]).is_file()


def waited_for(condition: Callable[[], bool], what: str) -> None:
    for _ in range(4_800):
        if condition():
            return
        time.sleep(0.05)
    pytest.fail(f"in vain: {what}")


def cancelled_in_the_middle(head: Head, job: tuple[str, ...], begun: Path) -> tuple[str, str]:
    """The last status and the log of `job`, submitted and stopped by the API once `begun` has a file."""
    token = Path(head.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
    with httpx.Client(base_url=head.dashboard, headers={"Authorization": f"Bearer {token}"}, timeout=60) as api:
        asked = {"entrypoint": shlex.join([sys.executable, *job]), "submission_id": "cancelled"}
        waited_for(lambda: api.post("/api/jobs/", json=asked).status_code == 200, "an agent that takes jobs")
        waited_for(lambda: any(begun.glob("*.json")), f"a first unit in {begun}")
        api.post("/api/jobs/cancelled/stop").raise_for_status()

        def status() -> str:
            return str(api.get("/api/jobs/cancelled").json()["status"])

        waited_for(lambda: status() in {"STOPPED", "SUCCEEDED", "FAILED"}, "an end of the job")
        return status(), str(api.get("/api/jobs/cancelled/logs").json()["logs"])


def _outcomes(log: str) -> list[str]:
    return re.findall(r'^\{"outcome".*\}$', log, re.MULTILINE)


def test_submitted_preprocessing_is_cancelled_goes_on_is_idempotent_and_wants_the_token(
    head: Head, tmp_path: Path
) -> None:
    write_corpus(tmp_path / "corpus", files=4)
    recipe = {
        "run": str(tmp_path / "run"),
        "libraries": ["numpy"],
        "preprocess": {"sources": {"inputs": [str(tmp_path / "corpus")], "unit_bytes": 6_000}},  # two files each
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    job = (str(ROOT / "jobs" / "preprocess.py"), str(tmp_path / "recipe.yaml"))
    documents = tmp_path / "run" / "documents"
    status, log = cancelled_in_the_middle(head, job, documents / "reports")
    assert status == "STOPPED"
    # The last line of standard output; on standard error, which the log has too, Ray Data's statistics may fail later.
    assert json.loads(_outcomes(log)[-1]) == {"outcome": "stopped", "run": recipe["run"]}
    assert "SIGTERM received" not in log, "Ray's stack of the process"
    assert not (tmp_path / "run" / "dataset" / "manifest.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in documents.glob("reports/*.json")}
    assert kept
    first = submit(head, *job)
    assert first.returncode == 0, first.stdout + first.stderr
    outcome = json.loads(_outcomes(first.stdout)[-1])
    assert outcome["outcome"] == "finished"
    assert outcome["result"]["rows_read"] == 7
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "what the cancelled job finished is made again"
    manifest = tmp_path / "run" / "dataset" / "manifest.json"
    written = manifest.read_bytes()
    shard = tmp_path / "run" / "dataset" / "shard-00000.parquet"
    changed = shard.stat().st_mtime_ns
    again = submitted_as_written(head, "preprocess", job[1])
    assert again.returncode == 0, again.stdout + again.stderr
    assert manifest.read_bytes() == written
    assert shard.stat().st_mtime_ns == changed
    refused = submit(head, *job, RAY_AUTH_TOKEN_PATH=str(tmp_path / "wrong"), RAY_AUTH_TOKEN="0" * 64)
    assert refused.returncode != 0
    assert re.search("401|403|[Uu]nauthori[sz]ed|[Ff]orbidden|[Tt]oken", refused.stdout + refused.stderr)


def test_doctor_with_another_token_fails_with_one_line_of_ours(head: Head) -> None:
    command = [sys.executable, "-c", "from cert_ray.cli import main; main()", "doctor", "--cluster", head.gcs]
    variables = {key: value for key, value in head.environment.items() if key != "RAY_AUTH_TOKEN_PATH"}
    done = subprocess.run(
        command, env={**variables, "RAY_AUTH_TOKEN": "0" * 64}, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 1
    (told,) = (line for line in done.stderr.splitlines() if line.startswith("cert-ray: "))
    assert f"the Ray cluster at {head.gcs}: it does not accept this process' token" in told
    assert "Traceback" not in done.stderr
