"""Tells Ray that this node will be taken away, so that nothing new starts here and training writes a checkpoint.

In: only the time that is left, or what a cloud's metadata server says about this machine. Out: a node drained by
`ray drain-node`. Where notices come from: AWS, "Spot Instance interruption notices" (two minutes before); Google Cloud,
"Preemption process of Spot VMs" (30 s before). Kubernetes gives notice by stopping the pod.
"""

from __future__ import annotations

import datetime
import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Literal
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import psutil

from cert_ray.errors import ClusterError

_log = logging.getLogger(__name__)

Cloud = Literal["aws", "gcp"]

_SERVERS: dict[Cloud, str] = {"aws": "http://169.254.169.254", "gcp": "http://metadata.google.internal"}
_POLL_S: dict[Cloud, float] = {"aws": 5.0, "gcp": 1.0}  # AWS advises its value; Google gives only 30 s
_ANSWERS_S = 5.0  # assumed: the server is on the machine's own host
_GCP_LEAVES_S = 30.0
_RAY_ANSWERS_S = 20.0  # assumed; if the head goes first, nobody answers


def wait_for_notice(cloud: Cloud, server: str | None = None) -> float:
    """Wait until `cloud` says that this machine will be taken away; returns the seconds left. May wait for ever."""
    ask: Callable[[str], float | None] = {"aws": _asked_aws, "gcp": _asked_gcp}[cloud]
    server = server or _SERVERS[cloud]
    told = False
    while True:
        try:
            left = ask(server)
        except (OSError, ValueError, KeyError) as error:  # urllib's and json's errors are among these
            if not told:
                _log.warning("%s: %s: %s; asking again", server, type(error).__name__, error)
            told, left = True, None
        if left is not None:
            return left
        time.sleep(_POLL_S[cloud])


def drain(node_id: str, address: str, within_s: float) -> None:
    """Tell the cluster whose GCS is at `address` that a node, this one, will be gone in `within_s` seconds.

    Returns when that time is over, or when Ray has ended here, as it does once nothing runs.

    Raises:
        ClusterError: when Ray does not answer there, or refuses.
    """
    # The `ray` command's module, since the command on the path may belong to another environment.
    command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", address, "--node-id", node_id]
    command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "this machine will be taken away"]
    command += ["--deadline-remaining-seconds", str(max(0, round(within_s)))]
    began_s = time.monotonic()
    raylets = [process for process in psutil.process_iter(["name"]) if process.info["name"] == "raylet"]
    cure = "Run it on a node of the cluster, with the cluster's token, while Ray runs there and on the head."
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_RAY_ANSWERS_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise ClusterError(address, f"no answer within {_RAY_ANSWERS_S:.0f} s", cure) from error
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise ClusterError(address, lines[-1] if lines else f"`ray drain-node`: {done.returncode}", cure)
    _log.info("this node is drained; it will be gone in %.0f s", within_s)
    psutil.wait_procs(raylets, timeout=max(0.0, within_s - (time.monotonic() - began_s)))


def _asked_aws(server: str) -> float | None:
    """Seconds until the time that the notice names, if there is one. IMDSv2: every request needs a token."""
    token = _get(f"{server}/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"}, "PUT")
    try:
        answer = _get(f"{server}/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token})
    except HTTPError as error:
        if error.code == 404:  # no notice
            return None
        raise
    at = datetime.datetime.fromisoformat(json.loads(answer)["time"])
    return (at - datetime.datetime.now(datetime.UTC)).total_seconds()


def _asked_gcp(server: str) -> float | None:
    answer = _get(f"{server}/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"})
    return _GCP_LEAVES_S if answer.strip() == "TRUE" else None


def _get(url: str, headers: dict[str, str], method: str = "GET") -> str:
    with urlopen(Request(url, headers=headers, method=method), timeout=_ANSWERS_S) as answer:
        text: str = answer.read().decode()
        return text
