"""The front door, asked with the real `openai` client over loopback: whole answers, streams, errors, and going away."""

from __future__ import annotations

import inspect
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import openai
import pytest
from openai.resources.completions import Completions

from cert_ray.errors import RequestError
from cert_ray.serving.http import create_app
from cert_ray.serving.openai_schema import CompletionRequest
from cert_ray.serving.sampling import Mode
from tests.serving.front_doors import BUSY, ScriptedBackend, listening


class Parameter(NamedTuple):
    """What comes of a parameter: values that are honoured, with what then arrives, and values that are a 400.

    `arrives` says where: a field of `Sampling`, `model`, `prompts`, or None where nothing has to.
    """

    arrives: str | None
    honoured: list[tuple[Any, Any]]
    refused: list[Any]
    beside: tuple[str, ...] = ()  # flags that it wants


# The table of docs/serving.md, whole.
PARAMETERS = {
    "model": Parameter("model", [("numpy", "numpy"), ("cert", "pandas")], [7, None]),
    "prompt": Parameter("prompts", [("a", ["a"]), (["a", "b"], ["a", "b"])], [[1, 2], [[1], [2]], [], None, 5]),
    "n": Parameter("n", [(3, 3), (None, 1)], [0, 201, "2", 1.5]),
    "best_of": Parameter("best_of", [(3, 3), (None, None)], [0, 201, "3"]),
    "temperature": Parameter("temperature", [(0, 0), (1.5, 1.5), (None, 1)], [-0.1, 2.1, "hot"]),
    "top_p": Parameter("top_p", [(0.5, 0.5), (None, 1)], [-0.1, 1.1, "all"]),
    "max_tokens": Parameter("max_tokens", [(7, 7), (None, 16)], [-1, 0, 2049, "7"]),
    "stop": Parameter("stop", [("\n", ("\n",)), (["a", "b"], ("a", "b")), (None, ())], [["x"] * 17, "x" * 257, 5, [5]]),
    "seed": Parameter("seed", [(7, 7), (-1, -1)], [2**63, "7", 0.5]),
    "logprobs": Parameter("logprobs", [(0, 0), (5, 5), (None, None)], [-1, 6, True]),
    "echo": Parameter("echo", [(True, True), (None, False)], ["yes", 1]),
    "suffix": Parameter("suffix", [("\n", "\n"), ("", None), (None, None)], [5, ["x"]]),
    "stream": Parameter(None, [(True, None), (False, None), (None, None)], ["yes", 1]),
    "stream_options": Parameter(
        None, [({"include_usage": True}, None)], [{"include_usage": "yes"}, {"other": 1}, 5], ("stream",)
    ),
    "user": Parameter(None, [("somebody", None), (None, None)], [5]),
    "frequency_penalty": Parameter(None, [(0, None), (None, None)], [0.5, -0.5, "0"]),
    "presence_penalty": Parameter(None, [(0, None), (None, None)], [0.5, -0.5, "0"]),
    "logit_bias": Parameter(None, [({}, None), (None, None)], [{"5": 1}, 5]),
    "stop_token_ids": Parameter("stop_token_ids", [([7, 8], (7, 8)), (None, ())], [[-1], ["7"], list(range(17)), 7]),
    "mode": Parameter("mode", [(mode.value, mode) for mode in Mode], ["guess", 5]),
}


def test_the_table_of_parameters_is_whole() -> None:
    """A new parameter of the client, of the schema or of the documentation has to be decided on."""
    of_the_client = inspect.signature(Completions.create).parameters.keys()
    others = {"self", "extra_headers", "extra_query", "extra_body", "timeout"}  # the client's own
    assert of_the_client - others == PARAMETERS.keys() - {"stop_token_ids", "mode"}
    assert CompletionRequest.model_fields.keys() == PARAMETERS.keys()
    text = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    table = text[text.index("| parameter |") : text.index("```python")]
    rows = [line.split("|")[1] for line in table.splitlines()[2:] if line.startswith("|")]
    assert sorted(name.strip(" `") for row in rows for name in row.split(",")) == sorted(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_every_parameter_is_honoured_or_refused(name: str, client: openai.OpenAI, backend: ScriptedBackend) -> None:
    parameter = PARAMETERS[name]

    def ask(value: Any) -> Any:
        body = {"model": "pandas", "prompt": "x", **dict.fromkeys(parameter.beside, True), name: value}
        return client.post("/completions", body=body, cast_to=object)

    for value, expected in parameter.honoured:
        ask(value)
        model, prompts, sampling = backend.asked[-1]
        if parameter.arrives is not None:
            given = {"model": model, "prompts": prompts, **sampling.model_dump()}[parameter.arrives]
            assert given == expected, f"{name}={value!r}"
    asked = len(backend.asked)
    for value in parameter.refused:
        with pytest.raises(openai.BadRequestError) as refused:
            ask(value)
        assert refused.value.param == name, f"{name}={value!r}"
        assert refused.value.type == "invalid_request_error"
    assert len(backend.asked) == asked


@pytest.fixture(scope="module")
def backend() -> ScriptedBackend:
    return ScriptedBackend(served={"pandas": "pandas", "numpy": "numpy"})


@pytest.fixture(scope="module")
def url(backend: ScriptedBackend) -> Iterator[str]:
    with listening(create_app(backend, any_library="cert")) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def test_every_option_of_the_client_is_understood(client: openai.OpenAI) -> None:
    completion = client.completions.create(
        model="pandas",
        prompt=["a", "b"],
        n=2,
        best_of=3,
        echo=True,
        logprobs=2,
        max_tokens=5,
        seed=7,
        stop=["\n"],
        temperature=0.5,
        top_p=0.9,
        user="somebody",
        frequency_penalty=0,
        presence_penalty=0,
        logit_bias={},
        extra_body={"stop_token_ids": [3], "mode": "cascade"},
    )
    assert [choice.text for choice in completion.choices] == ["a = 0", "a = 1", "b = 0", "b = 1"]
    logprobs = completion.choices[3].logprobs
    assert logprobs is not None
    assert logprobs.tokens == ["b", " =", " 1"]
    assert logprobs.text_offset == [0, 1, 3]
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 12  # two prompts, three samples of two tokens
    assert completion.usage.prompt_tokens_details is not None
    assert completion.usage.prompt_tokens_details.cached_tokens == 2


def test_models_are_listed_with_the_name_that_stands_for_all(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["cert", "pandas", "numpy"]
    assert client.models.retrieve("numpy").id == "numpy"
    assert client.models.retrieve("cert").id == "cert"


def test_a_stream_is_read_as_the_answer_that_it_is(client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model="numpy", prompt="x", n=2, seed=3, echo=True, stream=True, stream_options={"include_usage": True}
    )
    texts: dict[int, str] = {}
    reasons: dict[int, str | None] = {}
    chunks = list(stream)
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            reasons[choice.index] = choice.finish_reason
    assert texts == {0: "x = 0", 1: "x = 1"}
    assert reasons == {0: "stop", 1: "stop"}
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 7
    sketch = (chunks[0].model_extra or {})["cert"]
    assert chunks[0].choices[0].text == ""
    assert [(candidate["text"], candidate["votes"]) for candidate in sketch["vote"]["candidates"]] == [
        ("x = number", 3),
        ("x = df", 1),
    ]
    assert sketch["vote"]["candidates"][0]["placeholders"] == [{"start": 4, "end": 10, "kind": "number"}]
    assert (chunks[-1].model_extra or {})["cert"]["timings_s"] == {"sketch": 0.1, "generate": 0.2}


def test_log_probabilities_are_streamed_whole(client: openai.OpenAI) -> None:
    stream = client.completions.create(model="numpy", prompt="x", n=2, logprobs=1, echo=True, stream=True)
    choices = [choice for chunk in stream for choice in chunk.choices if choice.text]
    assert [(choice.index, choice.text) for choice in choices] == [(0, "x = 0"), (1, "x = 1")]
    assert all(choice.logprobs is not None and choice.logprobs.text_offset == [0, 1, 3] for choice in choices)


def test_the_model_follows_from_the_imports() -> None:
    backend = ScriptedBackend(served={"pandas": "pandas", "numpy": "numpy"})
    with (
        listening(create_app(backend, any_library="cert")) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client,
    ):
        answer = client.completions.create(model="cert", prompt="import numpy as np\nx =")
        assert answer.model == "cert"
        assert (answer.model_extra or {})["cert"]["model"] == "numpy"
        client.completions.create(model="pandas", prompt="import numpy as np\nx =")
    assert [model for model, _, _ in backend.asked] == ["numpy", "pandas"]


@pytest.mark.parametrize("stream", [False, True])
def test_refusals_are_the_clients_exceptions_before_the_first_event(stream: bool) -> None:
    with (
        listening(create_app(ScriptedBackend(BUSY))) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client,
    ):
        with pytest.raises(openai.InternalServerError) as refused:
            client.completions.create(model="org/cert", prompt="x", stream=stream)
        assert refused.value.response.headers["Retry-After"] == "7"
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="gpt-4", prompt="x", stream=stream)


@pytest.mark.parametrize(
    ("fault", "message", "code"),
    [
        (RequestError(503, "The engine is restarting: try again.", None, "unavailable"), "try again", "unavailable"),
        (ZeroDivisionError("a secret"), "The server failed; its log says why.", "failed"),
    ],
)
def test_what_fails_behind_the_first_event_is_the_clients_exception(fault: Exception, message: str, code: str) -> None:
    """Not a connection that breaks, which says nothing, nor a stream that ends as if it were whole."""
    with (
        listening(create_app(ScriptedBackend(fault=fault))) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client,
    ):
        chunks = client.completions.create(model="org/cert", prompt="x", stream=True)
        assert next(chunks).choices[0].text == ""
        with pytest.raises(openai.APIError, match=message) as failed:
            next(chunks)
        assert (type(failed.value), failed.value.code, failed.value.type) == (openai.APIError, code, "server_error")
        assert "secret" not in str(failed.value)


@pytest.mark.parametrize("stream", [False, True])
def test_going_away_ends_the_work(stream: bool) -> None:
    backend = ScriptedBackend(hold=True)
    with listening(create_app(backend)) as url:
        request = httpx.Request(
            "POST", f"{url}/v1/completions", json={"model": "org/cert", "prompt": "x", "stream": stream}
        )
        head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
        with socket.create_connection((request.url.host, request.url.port or 80)) as client:
            client.sendall(f"POST {request.url.path} HTTP/1.1\r\n{head}\r\n".encode() + request.content)
            assert backend.begun.wait(10)
            assert not backend.ended.is_set()
        assert backend.ended.wait(10)
        assert backend.running == 0


def test_the_sketch_comes_while_the_answer_is_still_being_drawn() -> None:
    backend = ScriptedBackend(hold=True)
    body = {"model": "org/cert", "prompt": "x", "stream": True}
    with (
        listening(create_app(backend)) as url,
        httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=10) as response,
    ):
        assert response.headers["Content-Type"].startswith("text/event-stream")
        lines = response.iter_lines()
        first = json.loads(next(lines).removeprefix("data: "))
        assert first["cert"]["sketch"] == "x = number"
        assert not backend.ended.is_set()
        backend.release.set()
        assert [line for line in lines if line][-1] == "data: [DONE]"
