"""Completions for evaluation: from models at hand, and from a server that is at times busy, odd or gone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from cert_ray.errors import ConfigError, InputError, RequestError, SchemaVersionError, TokenizerMismatchError
from cert_ray.serving.answering import ModelConfig
from cert_ray.serving.completers import (
    CompleterConfig,
    EndpointCompleter,
    EndpointConfig,
    complete_with_models,
)
from tests.serving.builders import save_model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return save_model(tmp_path_factory.mktemp("a"), seed=1), save_model(tmp_path_factory.mktemp("b"), seed=2)


@pytest.mark.parametrize("cascade", [False, True])
def test_models_at_hand_complete_every_prompt(folders: tuple[str, str], cascade: bool) -> None:
    models = ModelConfig(sketcher=folders[0], generator=folders[1]) if cascade else ModelConfig(model=folders[0])
    complete = complete_with_models(models, CompleterConfig(max_tokens=8, temperature=1.0, seed=1))
    prompts = ["x =", "def f(df):\n    return "]
    completions = complete(prompts, 3)
    assert [len(texts) for texts in completions] == [3, 3]
    assert complete(prompts[1:], 3) == completions[1:]
    assert not any(stop in text for texts in completions for text in texts for stop in CompleterConfig().stop)


@pytest.mark.parametrize("given", [{}, {"model": "a", "sketcher": "b"}, {"sketcher": "b"}, {"generator": "c"}])
def test_half_a_cascade_is_refused(given: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="give either model, or sketcher and generator"):
        ModelConfig.from_mapping(given, "test")


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="absent"):
        complete_with_models(ModelConfig(model=str(tmp_path / "absent")))


def test_a_plain_model_is_no_stage_of_a_cascade(folders: tuple[str, str], tmp_path: Path) -> None:
    shutil.copytree(folders[0], tmp_path / "plain")
    tokenizer = tmp_path / "plain" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace("<|segmentation|>", "<|something|>"))
    with pytest.raises(TokenizerMismatchError, match=r"plain: its tokenizer lacks <\|segmentation\|>"):
        complete_with_models(ModelConfig(sketcher=str(tmp_path / "plain"), generator=folders[1]))
    complete_with_models(ModelConfig(model=str(tmp_path / "plain")))


def test_a_model_of_another_schema_version_is_refused(folders: tuple[str, str], tmp_path: Path) -> None:
    shutil.copytree(folders[0], tmp_path / "old")
    (tmp_path / "old" / "manifest.json").write_text('{"schema_version": 0, "stage": "model"}')
    with pytest.raises(SchemaVersionError, match="schema_version 0"):
        complete_with_models(ModelConfig(model=str(tmp_path / "old")))


class Server:
    """Answers requests from a list; the last entry answers all further ones."""

    def __init__(self, *answers: Callable[[httpx.Request], httpx.Response] | httpx.Response) -> None:
        self._answers = list(answers)
        self.bodies: list[dict[str, Any]] = []
        self.urls: list[str] = []
        self.waits_s: list[float] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.urls.append(str(request.url))
        if request.content:
            self.bodies.append(json.loads(request.content))
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        return answer if isinstance(answer, httpx.Response) else answer(request)

    def complete(self, prompts: list[str], n: int, **options: Any) -> list[list[str]]:
        endpoint = EndpointConfig(**{"url": "http://server:1/v1", "model": "m", "attempts": 3, **options})
        transport = httpx.MockTransport(self)
        with EndpointCompleter(endpoint, transport=transport, sleep=self.waits_s.append) as completer:
            return completer(prompts, n)


def numbered(request: httpx.Request) -> httpx.Response:
    body = json.loads(request.content)
    choices = [{"index": index, "text": f" {body['seed'] + index}\n# more"} for index in range(body["n"])]
    return httpx.Response(200, json={"choices": choices[::-1]})


def test_samples_come_in_order_cut_and_in_several_requests() -> None:
    server = Server(numbered)
    assert server.complete(["a", "b"], 5, max_n=2) == [[" 0", " 1", " 2", " 3", " 4"]] * 2
    assert [body["n"] for body in server.bodies] == [2, 2, 1] * 2
    assert len({body["seed"] for body in server.bodies[:3]}) == 3
    assert max(len(body["stop"]) for body in server.bodies) <= 4


@pytest.mark.parametrize("url", ["http://server:1", "http://server:1/", "http://server:1/v1", "http://server:1/v1/"])
def test_the_url_may_end_in_v1(url: str) -> None:
    server = Server(numbered)
    server.complete(["a"], 1, url=url)
    assert server.urls == ["http://server:1/v1/completions"]


def test_without_a_name_the_first_model_is_asked() -> None:
    server = Server(httpx.Response(200, json={"data": [{"id": "listed"}]}), numbered)
    server.complete(["a", "b"], 1, model=None)
    assert [body["model"] for body in server.bodies] == ["listed", "listed"]


def test_a_busy_server_is_asked_again_after_the_time_it_names() -> None:
    busy = httpx.Response(503, headers={"Retry-After": "7"}, json={})
    limited = httpx.Response(429, headers={"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, json={})
    server = Server(busy, limited, numbered)
    assert server.complete(["a"], 1) == [[" 0"]]
    assert server.waits_s == [7.0, 2.0]


def test_a_server_that_stays_busy_is_given_up() -> None:
    server = Server(httpx.Response(429, headers={"Retry-After": "3600"}, json={"error": {"message": "too many"}}))
    with pytest.raises(RequestError, match="too many"):
        server.complete(["a"], 1)
    assert server.waits_s == [30.0, 30.0]


def test_a_server_that_cannot_be_reached_is_named() -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused", request=request)

    with pytest.raises(InputError, match=r"http://server:1/v1: cannot be reached"):
        Server(refuse).complete(["a"], 1)


@pytest.mark.parametrize(
    "answer",
    [
        httpx.Response(200, text="<html>"),
        httpx.Response(200, json=[]),
        httpx.Response(200, json={"choices": []}),
        httpx.Response(200, json={"choices": [{"text": "no index"}]}),
        httpx.Response(404, text="nothing here"),
    ],
)
def test_an_answer_that_is_no_completion_is_an_input_error(answer: httpx.Response) -> None:
    with pytest.raises(InputError, match="http://server:1/v1"):
        Server(answer).complete(["a"], 1)


def test_a_refusal_says_what_the_server_said() -> None:
    refusal = httpx.Response(400, json={"error": {"message": "window is 64 tokens"}})
    with pytest.raises(RequestError, match="window is 64 tokens") as refused:
        Server(refusal).complete(["a"], 1)
    assert refused.value.status == 400


@pytest.mark.parametrize("status", [401, 403])
def test_a_server_that_wants_a_key_says_where_it_is_read(status: int) -> None:
    refusal = httpx.Response(status, json={"error": {"message": "no key."}})
    with pytest.raises(RequestError, match=r"no key\. Name the environment variable.*--api-key-env NAME") as refused:
        Server(refusal).complete(["a"], 1)
    assert refused.value.status == status
