"""Faults while requests run, small, on the suite's Ray: the `openai` client with its default retries sees no error.

`tests/chaos/serving.py` kills more, nodes and controllers, too, and updates.
"""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Iterator
from contextlib import suppress

import httpx
import openai
import pydantic
import pytest

from cert_ray.serving.deployment import ServerConfig
from tests.chaos.serving_load import Clients
from tests.serving.processes import replicas, wait_until

with warnings.catch_warnings():
    warnings.simplefilter("ignore", pydantic.warnings.PydanticDeprecatedSince20)
    from cert_ray.serving.on_ray import ServedApp, start_server
    from tests.serving.paced import PacedEngines

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ServerConfig:
    folder = tmp_path_factory.mktemp("paced")
    models = {}
    for token_s, library in (("0.02", "pandas"), ("0.021", "numpy"), ("0.022", "polars")):
        (folder / token_s).mkdir()
        models[f"cert-{library}"] = {"model": str(folder / token_s), "library": library}
    options = {"models": models, "models_per_engine": 2, "replicas": 2, "num_cpus": 0.1, "health_check_period_s": 1}
    return ServerConfig.from_mapping({**options, "max_ongoing_requests": 2, "request_timeout_s": 30}, "test")


@pytest.fixture(scope="module")
def served(ray_cluster: None, config: ServerConfig) -> Iterator[ServedApp]:
    with start_server(config, PacedEngines) as app:
        yield app


@pytest.fixture
def clients(served: ServedApp) -> Iterator[Clients]:
    clients = Clients(served.base_url, 4)
    clients.start()
    yield clients
    clients.stop()


def test_a_dead_engine_costs_no_request_and_is_replaced(clients: Clients) -> None:
    wait_until(lambda: len(clients.outcomes) > 5)
    before = replicas("engine")
    assert len(before) == 2
    victim = min(before)
    os.kill(victim, signal.SIGKILL)
    wait_until(lambda: len(replicas("engine") - {victim}) == 2)
    seen = len(clients.outcomes)
    wait_until(lambda: len(clients.outcomes) > seen + 5)
    outcomes = clients.stop()
    assert [outcome.error for outcome in outcomes if outcome.error] == []


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_place(served: ServedApp, stream: bool) -> None:
    """Two engines of two places: four long requests fill them, and are given up; four short ones find room."""
    url = f"{served.base_url}/v1/completions"
    long = {"model": "cert", "prompt": "x", "max_tokens": 1_400, "stream": stream}  # 28 s
    for _ in range(4):
        with suppress(httpx.ReadTimeout), httpx.stream("POST", url, json=long, timeout=0.5) as response:
            next(response.iter_raw())  # the sketch is there at once; a whole answer is not
    short = {"model": "cert", "prompt": "x", "max_tokens": 2}
    for _ in range(4):
        assert httpx.post(url, json=short, timeout=20).status_code == 200


def test_engines_answer_for_more_models_than_they_hold(served: ServedApp) -> None:
    with openai.OpenAI(base_url=f"{served.base_url}/v1", api_key="unused", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["cert", "cert-pandas", "cert-numpy", "cert-polars"]
        for _ in range(2):
            for library, token_s in (("polars", 0.022), ("pandas", 0.02), ("numpy", 0.021)):
                prompt = f"import {library} as x\ny ="
                for asked in ("cert", f"cert-{library}"):
                    answer = client.completions.create(model=asked, prompt=prompt, max_tokens=2)
                    trace = (answer.model_extra or {})["cert"]
                    assert trace["model"] == f"cert-{library}"
                    assert trace["timings_s"] == {"generate": 2 * token_s}
