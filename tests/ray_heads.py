"""A head of a Ray cluster of its own, as an operator starts one: the token first, on loopback, by `ray start --head`.

In: how many CPUs, and further options of `ray start`. Out: its addresses, and the environment in which drivers and
`ray job submit` find it. It goes when the block ends; no other Ray on the machine is touched.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
RAY = str(Path(sys.executable).parent / "ray")
_STARTS_S = 120  # minutes where other work shares the machine


@dataclass(frozen=True, slots=True)
class Head:
    """A running head: where it is, and how to talk to it."""

    gcs: str
    dashboard: str
    metrics_port: int
    folder: Path  # Ray's temporary folder
    environment: Mapping[str, str]  # of drivers

    @property
    def discovery(self) -> Path:
        """The file in which Ray lists what Prometheus shall scrape."""
        return self.folder / "prom_metrics_service_discovery.json"


def free_port() -> int:
    """A port of loopback that nobody listens at now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def started_head(
    cpus: int = 2,
    options: Sequence[str] = (),
    variables: Mapping[str, str] | None = None,
    gcs: int | None = None,
) -> Iterator[Head]:
    """A head with `cpus` logical CPUs, that ends with the block.

    Args:
        options: more of `ray start`'s.
        gcs: the port of its GCS; None takes a free one.
        variables: more of the environment, of the head and of drivers.

    Raises:
        RuntimeError: with its log, when it does not start.
    """
    with tempfile.TemporaryDirectory(prefix="cr", ignore_cleanup_errors=True) as name:  # short: Ray puts sockets there
        folder = Path(name)
        environment = _environment(folder, variables or {})
        gcs, dashboard, metrics = gcs or free_port(), free_port(), free_port()
        command = [RAY, "start", "--head", "--block", f"--num-cpus={cpus}", f"--port={gcs}"]
        command += ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
        # The suite's own Ray has the default port: with two on it, this head's agent would never come up.
        command += [f"--dashboard-agent-listen-port={free_port()}", f"--metrics-export-port={metrics}"]
        command += [f"--temp-dir={folder}/r", "--disable-usage-stats", "--object-store-memory=200000000", *options]
        log = folder / "head.log"
        with log.open("wb") as stream:
            process = subprocess.Popen(
                command, env=environment, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
            )
        try:
            _wait_for(dashboard, process, log)
            yield Head(f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}", metrics, folder / "r", environment)
        finally:
            stop(process)


def _environment(folder: Path, variables: Mapping[str, str]) -> dict[str, str]:
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_TRAIN_V2_ENABLED": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        **variables,
    }


def _wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(2 * _STARTS_S):
        if process.poll() is not None:
            break
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.5)
    raise RuntimeError(f"no head after {_STARTS_S} s, or it ended: {log.read_text()}")


def stop(process: subprocess.Popen[bytes], patience_s: float = 20) -> None:
    """End `process`, which leads a session of its own, with everything that it started."""
    started = _descendants(process.pid)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(patience_s)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(patience_s)
    for other in started:  # what made sessions of its own
        with suppress(psutil.NoSuchProcess):
            other.kill()


def _descendants(pid: int) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).children(recursive=True)
    return []


def submit(head: Head, *arguments: str, timeout_s: float = 240, **variables: str) -> subprocess.CompletedProcess[str]:
    """`ray job submit` of this Python with `arguments`, waited for; `variables` replace some of its environment."""
    command = [RAY, "job", "submit", "--address", head.dashboard, "--", sys.executable, *arguments]
    environment = {**head.environment, **variables}
    for _ in range(60):  # the head answers before its agent, which runs the jobs, is up
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False)
        if "No available agent" not in done.stderr:
            break
        time.sleep(1)
    return done
