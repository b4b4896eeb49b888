"""A cloud's notice is heard, and the node it means is drained."""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import psutil
import pytest
import ray
from typer.testing import CliRunner

from cert_ray.cli.app import app
from cert_ray.errors import ClusterError
from cert_ray.operations import leaving, on_ray


class _Metadata(BaseHTTPRequestHandler):
    """Both clouds' servers: no notice for the first two questions, and none without what each asks for."""

    server: _Server

    def do_PUT(self) -> None:
        asked = self.path == "/latest/api/token" and "X-aws-ec2-metadata-token-ttl-seconds" in self.headers
        self._answer(200 if asked else 400, "a-token")

    def do_GET(self) -> None:
        self.server.asked += 1
        if self.path == "/latest/meta-data/spot/instance-action":
            if self.headers["X-aws-ec2-metadata-token"] != "a-token":
                self._answer(401, "")
            elif self.server.asked < 3:
                self._answer(404, "")
            else:
                at = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=120)
                self._answer(200, json.dumps({"action": "terminate", "time": f"{at:%Y-%m-%dT%H:%M:%SZ}"}))
        elif self.path == "/computeMetadata/v1/instance/preempted" and self.headers["Metadata-Flavor"] == "Google":
            self._answer(200, "FALSE" if self.server.asked < 3 else "TRUE")
        else:
            self._answer(403, "")

    def _answer(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: object) -> None: ...


class _Server(ThreadingHTTPServer):
    asked = 0


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Server]:
    monkeypatch.setattr(leaving, "_POLL_S", {"aws": 0.01, "gcp": 0.01})
    with _Server(("127.0.0.1", 0), _Metadata) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def _url(server: _Server) -> str:
    return f"http://127.0.0.1:{server.server_port}"


def test_a_notice_of_aws_is_waited_for_and_says_when(server: _Server) -> None:
    assert 100 < leaving.wait_for_notice("aws", _url(server)) <= 120
    assert server.asked == 3


def test_a_notice_of_google_is_waited_for(server: _Server) -> None:
    assert leaving.wait_for_notice("gcp", _url(server)) == 30
    assert server.asked == 3


def test_a_server_that_does_not_answer_is_told_once_and_asked_again(
    server: _Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ask, refusals = leaving._asked_gcp, [OSError("no route"), ValueError("no JSON"), OSError("no route")]

    def asked(url: str) -> float | None:
        if refusals:
            raise refusals.pop(0)
        return ask(url)

    monkeypatch.setattr(leaving, "_asked_gcp", asked)
    assert leaving.wait_for_notice("gcp", _url(server)) == 30
    assert [record.getMessage() for record in caplog.records] == [f"{_url(server)}: OSError: no route; asking again"]


def test_the_command_drains_its_node_by_rays_own(server: _Server, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    waited: list[tuple[list[str], float]] = []
    processes = [SimpleNamespace(info={"name": name}) for name in ("raylet", "gcs_server")]

    def run(command: list[str], **_: object) -> SimpleNamespace:
        commands.append(command)
        return SimpleNamespace(returncode=0, stdout="", stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(on_ray, "node_here", lambda: ("ab12", "10.0.0.1:6379"))
    monkeypatch.setattr(psutil, "process_iter", lambda _: processes)
    monkeypatch.setattr(
        psutil, "wait_procs", lambda found, timeout: waited.append(([one.info["name"] for one in found], timeout))
    )
    result = CliRunner().invoke(app, ["drain", "--within-s", "25"])
    assert result.exit_code == 0
    assert commands[0][:4] == [sys.executable, "-m", "ray.scripts.scripts", "drain-node"]
    options = dict(zip(commands[0][4::2], commands[0][5::2], strict=True))
    assert options["--node-id"] == "ab12"
    assert options["--address"] == "10.0.0.1:6379"
    assert options["--deadline-remaining-seconds"] == "25"
    assert waited[0][0] == ["raylet"], "it stays until Ray has ended here"
    assert 24 < waited[0][1] <= 25


@pytest.mark.parametrize("own", ["head", "other"])
def test_a_head_is_never_drained(own: str, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [
        {"NodeID": "head", "Resources": {"CPU": 2.0, "node:__internal_head__": 1.0}},
        {"NodeID": "other", "Resources": {"CPU": 2.0}},
    ]
    context = SimpleNamespace(get_node_id=lambda: own, gcs_address="10.0.0.1:6379")
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    if own == "other":
        assert on_ray.node_here() == ("other", "10.0.0.1:6379")
        return
    with pytest.raises(ClusterError, match="this node is its head"):
        on_ray.node_here()


def test_without_a_ray_to_drain_it_says_where_to_run_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(command: list[str], **_: object) -> None:
        raise subprocess.TimeoutExpired(command, 20)

    done = SimpleNamespace(returncode=1, stdout="", stderr="Traceback\nConnectionError: no Ray here\n")
    for run, problem in ((silent, "no answer within 20 s"), (lambda *_, **__: done, "ConnectionError: no Ray here")):
        monkeypatch.setattr(subprocess, "run", run)
        with pytest.raises(ClusterError, match=f"{problem}. Run it on a node"):
            leaving.drain("ab12", "10.0.0.1:6379", 10)


def test_rays_command_has_the_options_that_are_given() -> None:
    """It is hidden from `ray --help`, and may change."""
    from ray.scripts.scripts import cli

    options = {name for parameter in cli.commands["drain-node"].params for name in parameter.opts}
    assert {"--address", "--node-id", "--reason", "--reason-message", "--deadline-remaining-seconds"} <= options
    reason = next(parameter for parameter in cli.commands["drain-node"].params if parameter.name == "reason")
    assert "DRAIN_NODE_REASON_PREEMPTION" in reason.type.choices
