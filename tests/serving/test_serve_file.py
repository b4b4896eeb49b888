"""The laptop's Serve config file, deployed as `serve deploy` has it done: by the controller, out of the file."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pydantic
import pytest
import yaml

from tests.ray_heads import free_port
from tests.serving.builders import save_model
from tests.serving.processes import replicas, wait_until

with warnings.catch_warnings():
    warnings.simplefilter("ignore", pydantic.warnings.PydanticDeprecatedSince20)
    from ray import serve
    from ray.serve._private.api import serve_start
    from ray.serve.schema import ApplicationStatus, ServeDeploySchema

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

LAPTOP = Path(__file__).parents[2] / "cluster" / "serve-laptop.yaml"
BODY = {"model": "cert", "prompt": "import pandas as pd\ndf =", "n": 2, "max_tokens": 8}


class Laptop:
    """What the file says, with other folders and another port; and the server that runs by it."""

    def __init__(self, folder: Path) -> None:
        self.options: dict[str, Any] = yaml.safe_load(LAPTOP.read_text())
        self.options["http_options"]["port"] = free_port()
        (application,) = self.options["applications"]
        self.arguments: dict[str, Any] = application["args"]
        self.arguments["sketcher"] = save_model(folder / "sketcher", seed=1)
        self.arguments["generator"] = save_model(folder / "generator", seed=2)
        self.url = "http://{host}:{port}".format(**self.options["http_options"])

    def deploy(self) -> None:
        """What the head's dashboard does for `serve deploy`."""
        schema = ServeDeploySchema.model_validate(self.options)
        client = serve_start(http_options=schema.http_options.model_dump(), proxy_location=schema.proxy_location)
        client.deploy_apps(schema)

    def wait(self, status: ApplicationStatus) -> Any:
        """Until `serve status` says so."""
        wait_until(lambda: serve.status().applications["cert-ray"].status == status)
        return serve.status().applications["cert-ray"]

    def ask(self) -> int:
        """The status of one request."""
        return httpx.post(f"{self.url}/v1/completions", json=BODY, timeout=60).status_code

    @contextmanager
    def asked_on_and_on(self) -> Iterator[list[int]]:
        """The statuses of requests, one after the other until the block ends."""
        statuses: list[int] = []
        ended = threading.Event()

        def ask() -> None:
            while not ended.wait(0.02):
                try:
                    statuses.append(self.ask())
                except httpx.HTTPError:
                    statuses.append(0)

        thread = threading.Thread(target=ask)
        thread.start()
        try:
            yield statuses
        finally:
            ended.set()
            thread.join()


@pytest.fixture
def laptop(ray_cluster: None, tmp_path: Path) -> Iterator[Laptop]:
    yield Laptop(tmp_path)
    serve.shutdown()


def test_the_file_is_deployed_updated_and_taken_down_without_a_failed_request(laptop: Laptop) -> None:
    laptop.deploy()
    laptop.wait(ApplicationStatus.RUNNING)
    assert laptop.ask() == 200
    old = replicas("engine") | replicas("front-door")
    assert len(old) == 2
    laptop.arguments["max_queued_requests"] += 1
    with laptop.asked_on_and_on() as statuses:
        laptop.deploy()
        wait_until(lambda: not old & (replicas("engine") | replicas("front-door")))
        laptop.wait(ApplicationStatus.RUNNING)
        seen = len(statuses)
        wait_until(lambda: len(statuses) > seen + 3)
    assert set(statuses) == {200}
    assert len(replicas("engine") | replicas("front-door")) == 2
    long = {**BODY, "n": 100, "max_tokens": 40, "stream": True}
    with httpx.stream("POST", f"{laptop.url}/v1/completions", json=long, timeout=60) as response:
        lines = response.iter_lines()
        begun = next(lines)
        serve.delete("cert-ray", _blocking=False)
        rest = [line for line in lines if line]
    assert begun.startswith("data: ")
    assert rest[-1] == "data: [DONE]"
    wait_until(lambda: not replicas("engine") | replicas("front-door"))
