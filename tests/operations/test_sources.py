"""Whom completions are asked of, as the command line names it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from cert_ray.errors import ConfigError
from cert_ray.evaluation.benchmarks import Answer
from cert_ray.evaluation.run import EvaluateConfig, run_evaluation
from cert_ray.operations import sources
from cert_ray.operations.sources import Source, complete_at
from cert_ray.retrieval.library_docs import write_docs
from cert_ray.retrieval.retriever import Retriever
from cert_ray.serving.completers import EndpointCompleter, EndpointConfig
from tests.evaluation.builders import in_this_process
from tests.retrieval.builders import DOCS
from tests.serving.builders import save_model


class Server:
    """An OpenAI-compatible server that keeps what it was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.requests: list[httpx.Request] = []

        def connect(endpoint: EndpointConfig, config: Any) -> EndpointCompleter:
            return EndpointCompleter(endpoint, config, transport=httpx.MockTransport(self))

        monkeypatch.setattr(sources, "complete_with_endpoint", connect)

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        n = json.loads(request.content)["n"]
        return httpx.Response(200, json={"choices": [{"index": place, "text": " 1"} for place in range(n)]})

    @property
    def prompts(self) -> list[str]:
        return [json.loads(request.content)["prompt"] for request in self.requests]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    return Server(monkeypatch)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "give either --model"),
        ({"endpoint": "http://x", "model": "y"}, "or --endpoint"),
        ({"sketcher": "s"}, "--sketcher and --generator"),
        ({"model": "m", "endpoint_model": "e"}, "--endpoint-model goes with --endpoint"),
        ({"model": "m", "api_key_env": "E"}, "--api-key-env goes with --endpoint"),
        ({"endpoint": "http://x", "mask": "<mask>"}, "--mask goes with --model"),
    ],
)
def test_what_does_not_go_together_is_refused(given: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Source.from_mapping(given, "test")


def test_the_key_is_read_from_the_environment_and_sent_and_never_written(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SERVERS_KEY", "sk-hush-hush")
    source = Source(endpoint="http://far:1", endpoint_model="m", api_key_env="SERVERS_KEY")
    problem = {"task_id": "T/0", "prompt": "x =", "entry_point": "none", "test": "def check(): assert x == 1"}
    (tmp_path / "p.jsonl").write_text(json.dumps(problem))
    config = EvaluateConfig(problems=str(tmp_path / "p.jsonl"), output=str(tmp_path / "out"), source=source.recorded)
    run_evaluation(config, complete_at(source, {})(0.2), in_this_process)
    assert [request.headers["Authorization"] for request in server.requests] == ["Bearer sk-hush-hush"]
    assert "plain http" in caplog.text
    written = "".join(path.read_text() for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert "SERVERS_KEY" in written
    assert "hush" not in written + caplog.text + repr(source)


def test_a_key_that_is_not_in_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SERVERS_KEY", raising=False)
    with pytest.raises(ConfigError, match="--api-key-env SERVERS_KEY: no such variable"):
        complete_at(Source(endpoint="http://x", api_key_env="SERVERS_KEY"), {})


def test_retrieval_sees_the_prompt_alone_and_the_program_is_without_it(server: Server, tmp_path: Path) -> None:
    write_docs(str(tmp_path / "docs.jsonl"), DOCS)
    prompt = "import monkey\n# sort rows by a column\nx ="
    for folder, gold in (("a", " sort by a column"), ("b", " remove missing values")):
        problem = {"task_id": "T/0", "prompt": prompt, "entry_point": "none", "canonical_solution": gold}
        (tmp_path / f"{folder}.jsonl").write_text(json.dumps(problem | {"test": "def check(): pass"}))
        source = Source(endpoint="http://x", endpoint_model="m", retrieve=str(tmp_path / "docs.jsonl"))
        options = {"problems": str(tmp_path / f"{folder}.jsonl"), "output": str(tmp_path / folder)}
        config = EvaluateConfig(**options, source=source.recorded)
        run_evaluation(config, complete_at(source, {})(0.2), in_this_process)
    assert server.prompts == [Retriever(DOCS).header(prompt) + prompt] * 2  # whatever the answer says
    assert "order_by" in server.prompts[0]
    assert "# Documentation" not in (tmp_path / "a" / "results.jsonl").read_text()


def test_models_are_loaded_once_for_all_temperatures(tmp_path: Path) -> None:
    folder = Path(save_model(tmp_path / "m", "llama"))
    at = complete_at(Source(model=str(folder)), {"max_tokens": 2})
    first = at(1.0)(["x ="], 2)
    assert all(isinstance(answer, Answer) for answer in first[0])
    for file in folder.iterdir():
        file.unlink()
    assert at(1.0)(["x ="], 2) == first
    assert len(at(0.0)(["x ="], 1)[0]) == 1


def test_a_model_that_is_nowhere_is_named() -> None:
    with pytest.raises(ConfigError, match=r"'\./absent' is not a folder"):
        complete_at(Source(model="./absent"), {})


def test_a_mask_is_for_models_with_an_encoder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--mask"):
        complete_at(Source(model=save_model(tmp_path / "m"), mask="<mask>"), {})
