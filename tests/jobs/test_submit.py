"""Preprocessing through the real Jobs API with authentication on: done, done twice, refused without the token."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.dataset.builders import write_corpus

ROOT = Path(__file__).resolve().parents[2]
RAY = str(Path(sys.executable).parent / "ray")
# A head, its agent and three submitted jobs start one after another: minutes where other work shares the machine.
pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def head() -> Iterator[tuple[str, dict[str, str]]]:
    """A head of its own, as an operator starts one: token first, loopback only. Yields its address and environment."""
    with tempfile.TemporaryDirectory(prefix="cr") as folder:
        token = Path(folder) / "token"
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "OMP_NUM_THREADS": "1",
        }
        token.write_text(os.urandom(32).hex())
        token.chmod(0o600)
        dashboard, gcs = free_port(), free_port()
        options = ["--head", "--block", "--num-cpus=2", f"--port={gcs}", f"--dashboard-port={dashboard}"]
        options += ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--temp-dir={folder}/r"]
        # The suite's own Ray has the default port: with two on it, this head's agent would never come up.
        options += [f"--dashboard-agent-listen-port={free_port()}"]
        options += ["--object-store-memory=200000000", "--disable-usage-stats"]
        log = (Path(folder) / "head.log").open("wb")
        process = subprocess.Popen(
            [RAY, "start", *options], env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            _wait_for(dashboard, process, Path(folder) / "head.log")
            yield f"http://127.0.0.1:{dashboard}", environment
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(20)
            log.close()


def _wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(240):
        assert process.poll() is None, log.read_text()
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.5)
    pytest.fail(f"no head after two minutes: {log.read_text()}")


def submit(address: str, environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [RAY, "job", "submit", "--address", address, "--", sys.executable, *arguments]
    for _ in range(60):  # the head answers before its agent, which runs the jobs, is up
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
        if "No available agent" not in done.stderr:
            break
        time.sleep(1)
    return done


def test_submitted_preprocessing_finishes_is_idempotent_and_wants_the_token(
    head: tuple[str, dict[str, str]], tmp_path: Path
) -> None:
    address, environment = head
    write_corpus(tmp_path / "corpus", files=4)
    recipe = {
        "run": str(tmp_path / "run"),
        "libraries": ["numpy"],
        "preprocess": {"sources": {"inputs": [str(tmp_path / "corpus")]}},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    job = (str(ROOT / "jobs" / "preprocess.py"), str(tmp_path / "recipe.yaml"))
    first = submit(address, environment, *job)
    assert first.returncode == 0, first.stdout + first.stderr
    outcome = json.loads(re.findall(r'^\{"outcome".*\}$', first.stdout, re.MULTILINE)[-1])
    assert outcome["outcome"] == "finished"
    assert outcome["result"]["rows_read"] == 7
    manifest = tmp_path / "run" / "dataset" / "manifest.json"
    written = manifest.read_bytes()
    shard = tmp_path / "run" / "dataset" / "shard-00000.parquet"
    changed = shard.stat().st_mtime_ns
    assert submit(address, environment, *job).returncode == 0
    assert manifest.read_bytes() == written
    assert shard.stat().st_mtime_ns == changed
    refused = submit(
        address, {**environment, "RAY_AUTH_TOKEN_PATH": str(tmp_path / "wrong"), "RAY_AUTH_TOKEN": "0" * 64}, *job
    )
    assert refused.returncode != 0
    assert re.search("401|403|[Uu]nauthori[sz]ed|[Ff]orbidden|[Tt]oken", refused.stdout + refused.stderr)
