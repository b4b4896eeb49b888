"""Completions for evaluation: from models at hand, and from a server that is at times busy, odd or gone."""

from __future__ import annotations

import json
import shutil
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from cert_ray.errors import ConfigError, InputError, RequestError, SchemaVersionError, TokenizerMismatchError
from cert_ray.retrieval.retriever import Retriever
from cert_ray.serving.answering import ModelConfig
from cert_ray.serving.completers import (
    CompleterConfig,
    EndpointCompleter,
    EndpointConfig,
    complete_with_models,
    with_documentation,
)
from tests.retrieval.builders import ASKS_FOR_SORTING, DOCS
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


@pytest.mark.parametrize("url", ["localhost:8000", "127.0.0.1:8000/v1", "ftp://127.0.0.1:8000/v1"])
def test_an_address_without_http_is_refused_at_once_with_what_to_write(url: str) -> None:
    with pytest.raises(ConfigError, match=f"Write http://{url.removeprefix('ftp://')}"):
        EndpointConfig.from_mapping({"url": url}, "endpoint")


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


def test_a_request_that_cannot_be_sent_is_tried_once_and_its_headers_are_not_quoted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.LocalProtocolError("Illegal header value b'Bearer sk-hush\\n'", request=request)

    server = Server(refuse)
    with pytest.raises(InputError, match="cannot be sent") as refused:
        server.complete(["a"], 1)
    assert (len(server.urls), server.waits_s) == (1, [])
    assert "hush" not in caplog.text + "".join(traceback.format_exception(refused.value))


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


def too_long_unless(short: str, refusal: dict[str, Any]) -> Callable[[httpx.Request], httpx.Response]:
    def answer(request: httpx.Request) -> httpx.Response:
        fits = json.loads(request.content)["prompt"] == short
        return numbered(request) if fits else httpx.Response(400, json={"error": refusal})

    return answer


@pytest.mark.parametrize(
    "refusal",
    [
        {"message": "window is 64 tokens", "code": "context_length_exceeded"},
        {"message": "This model's maximum context length is 64 tokens. However, you requested 90 tokens", "code": 400},
        {"message": "the request exceeds the available context size", "code": 400},
    ],
)
def test_documentation_for_which_an_endpoint_has_no_room_is_left_out(refusal: dict[str, Any]) -> None:
    server = Server(too_long_unless(ASKS_FOR_SORTING, refusal))
    documented = with_documentation(server.complete, Retriever(DOCS))
    assert documented([ASKS_FOR_SORTING], 2) == [[" 0", " 1"]]
    header = Retriever(DOCS).header(ASKS_FOR_SORTING)
    assert [body["prompt"] for body in server.bodies] == [header + ASKS_FOR_SORTING, ASKS_FOR_SORTING]


def test_a_prompt_that_is_too_long_alone_and_other_refusals_end_it() -> None:
    for code, requests in (("context_length_exceeded", 2), ("invalid_prompt", 1)):
        server = Server(too_long_unless("", {"message": "no", "code": code}))
        documented = with_documentation(server.complete, Retriever(DOCS))
        with pytest.raises(RequestError, match="no"):
            documented([ASKS_FOR_SORTING], 1)
        assert len(server.bodies) == requests


def test_a_server_is_asked_for_a_mode_only_where_one_is_wanted() -> None:
    asked: list[dict[str, Any]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(json.loads(request.content))
        return httpx.Response(200, json={"choices": [{"index": 0, "text": "x"}]})

    for mode in (None, "constrained"):
        config = CompleterConfig.from_mapping({"mode": mode}, "test")
        with EndpointCompleter(
            EndpointConfig(url="http://x", model="m"), config, transport=httpx.MockTransport(answer)
        ) as complete:
            complete(["x"], 1)
    assert "mode" not in asked[0]
    assert asked[1]["mode"] == "constrained"
