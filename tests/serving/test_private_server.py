"""The server as `cert-ray serve` starts it, on a Ray of its own, where Serve's processes speak gRPC.

The other tests of the served application run on the suite's Ray, where they ask each other by actor calls, as on a
cluster that nobody set up otherwise.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import httpx
import openai
import psutil
import pytest

from cert_ray.serving.sampling import Sampling
from tests.chaos.serving_load import Clients
from tests.serving.paced import paced_tokens

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, psutil.Process]]:
    """Its URL and its process."""
    command = [sys.executable, "-m", "tests.serving.private_server", str(tmp_path_factory.mktemp("paced"))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        url = next((line.strip() for line in process.stdout if line.startswith("http")), "")
        assert url
        yield url, psutil.Process(process.pid)
        process.stdin.close()


def engines(process: psutil.Process) -> set[int]:
    found = set()
    for child in process.children(recursive=True):
        with suppress(psutil.Error):
            if "ServeReplica:cert-ray:engine" in " ".join(child.cmdline()):
                found.add(child.pid)
    return found


def wait_until(condition: Callable[[], bool]) -> None:
    """Until `condition`, watched by the test's own time-out."""
    while not condition():
        time.sleep(0.1)


def test_an_answer_longer_than_grpc_passes_by_itself_is_whole(server: tuple[str, psutil.Process]) -> None:
    options = {"prompt": "x", "n": 400, "max_tokens": 1_500, "seed": 3}
    with openai.OpenAI(base_url=f"{server[0]}/v1", api_key="unused", max_retries=0) as client:
        choices = client.completions.create(model="fast", **options).choices
    sampling = Sampling(n=400, max_tokens=1_500, seed=3)
    texts = {index: "".join(paced_tokens("x", sampling, index)) for index in range(400)}
    assert sum(map(len, texts.values())) > 4 << 20
    assert {choice.index: choice.text for choice in choices} == texts


def test_a_dead_engine_costs_no_request_and_is_replaced(server: tuple[str, psutil.Process]) -> None:
    url, process = server
    clients = Clients(url, 4)
    clients.start()
    try:
        wait_until(lambda: len(clients.outcomes) > 20)
        victim = min(engines(process))
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: len(engines(process) - {victim}) == 2)
        seen = len(clients.outcomes)
        wait_until(lambda: len(clients.outcomes) > seen + 20)
    finally:
        outcomes = clients.stop()
    assert [outcome.error for outcome in outcomes if outcome.error] == []


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_place(server: tuple[str, psutil.Process], stream: bool) -> None:
    """Two engines of two places: four long requests fill them, and are given up; four short ones find room."""
    url = f"{server[0]}/v1/completions"
    long = {"model": "slow", "prompt": "x", "max_tokens": 2_000, "stream": stream}  # 40 s
    for _ in range(4):
        with suppress(httpx.ReadTimeout), httpx.stream("POST", url, json=long, timeout=0.5) as response:
            next(response.iter_raw())  # the sketch is there at once; a whole answer is not
    for _ in range(4):
        assert httpx.post(url, json={"model": "slow", "prompt": "x", "max_tokens": 2}, timeout=20).status_code == 200
