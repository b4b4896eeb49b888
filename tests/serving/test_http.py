"""The front door: OpenAI's answers, and OpenAI's errors for everything that can be wrong with a request."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import httpx
import pytest

from cert_ray.errors import RequestError
from cert_ray.serving.cascade import CascadeAnswer, Route
from cert_ray.serving.engines import Completion
from cert_ray.serving.http import create_app
from cert_ray.serving.openai_schema import RequestLimits
from cert_ray.serving.sampling import Sampling


class EchoBackend:
    """A `Backend` that repeats the prompt, or refuses."""

    model_name = "org/cert"

    def __init__(self, refusal: RequestError | None = None) -> None:
        self._refusal = refusal

    async def complete(self, prompts: Sequence[str], sampling: Sampling) -> list[CascadeAnswer]:
        if self._refusal is not None:
            raise self._refusal
        choice = [(Completion((1,), prompt, "stop", -0.5),) * sampling.n for prompt in prompts]
        return [CascadeAnswer(choices, Route.GENERATOR, "x = number", 1, 1.0, 3, {"sketch": 0.1}) for choices in choice]


def send(method: str, path: str, backend: EchoBackend | None = None, **options: Any) -> httpx.Response:
    app_options = {name: options.pop(name) for name in ("limits", "api_keys") if name in options}
    app = create_app(backend or EchoBackend(), **app_options)

    async def request() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://cert") as client:
            return await client.request(method, path, **options)

    return asyncio.run(request())


def complete(backend: EchoBackend | None = None, **fields: Any) -> httpx.Response:
    return send("POST", "/v1/completions", backend, json={"model": "org/cert", "prompt": "x =", **fields})


def error_of(response: httpx.Response) -> dict[str, Any]:
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return dict(body["error"])


def test_a_completion_has_openais_fields_and_certs() -> None:
    response = complete(n=2, seed=3)
    assert response.status_code == 200
    body = response.json()
    assert {"id", "object", "created", "model", "choices", "usage", "cert"} == set(body)
    assert body["choices"][1] == {"index": 1, "text": "x =", "logprobs": None, "finish_reason": "stop"}
    assert body["cert"] == {
        "route": "generator",
        "sketch": "x = number",
        "sketch_votes": 1,
        "vote_share": 1.0,
        "seed": 3,
        "timings_s": {"sketch": 0.1},
        "others": [],
    }


def test_models_are_listed_and_found() -> None:
    listed = send("GET", "/v1/models").json()
    assert [entry["id"] for entry in listed["data"]] == ["org/cert"]
    assert send("GET", "/v1/models/org/cert").json() == listed["data"][0]
    assert error_of(send("GET", "/v1/models/other"))["code"] == "model_not_found"
    assert send("GET", "/health").json() == {"status": "ok"}


@pytest.mark.parametrize(
    ("fields", "status", "param", "code"),
    [
        ({"model": "gpt-4"}, 404, "model", "model_not_found"),
        ({"prompt": [1, 2]}, 400, "prompt", "invalid_value"),
        ({"prompt": "\ud800"}, 400, "prompt", "invalid_value"),
        ({"n": 0}, 400, "n", "invalid_value"),
        ({"n": 10_000}, 400, "n", "limit_exceeded"),
        ({"temperature": "hot"}, 400, "temperature", "invalid_value"),
        ({"stream": True}, 400, "stream", "unsupported_field"),
        ({"promt": "x"}, 400, "promt", "unsupported_field"),
    ],
)
def test_a_bad_field_is_named(fields: dict[str, Any], status: int, param: str, code: str) -> None:
    body = json.dumps({"model": "org/cert", "prompt": "x =", **fields})
    response = send("POST", "/v1/completions", content=body, headers={"Content-Type": "application/json"})
    error = error_of(response)
    assert (response.status_code, error["param"], error["code"]) == (status, param, code)


@pytest.mark.parametrize("body", ["", "{", "[]", "3", '{"model": NaN}', "[" * 100_000, '{"a": "\\x"}', "\xff"])
def test_a_body_that_is_no_request_is_a_400(body: str) -> None:
    content = body.encode("latin-1")
    response = send("POST", "/v1/completions", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert error_of(response)["type"] == "invalid_request_error"


def test_a_required_field_is_asked_for() -> None:
    response = send("POST", "/v1/completions", json={"model": "org/cert"})
    assert response.status_code == 400
    assert error_of(response)["message"] == "prompt: required, but not given."


def test_unknown_paths_and_methods_are_errors_of_the_same_shape() -> None:
    assert send("POST", "/v1/chat/completions", json={}).status_code == 404
    assert error_of(send("GET", "/nowhere"))["type"] == "not_found_error"
    response = send("GET", "/v1/completions")
    assert response.status_code == 405
    error_of(response)


def test_an_oversized_body_is_refused_by_header_and_by_bytes() -> None:
    limits = RequestLimits(max_body_bytes=100)
    assert send("POST", "/v1/completions", limits=limits, content=b"x" * 101).status_code == 413

    async def chunks():  # type: ignore[no-untyped-def]
        for _ in range(30):
            yield b"0123456789"

    response = send("POST", "/v1/completions", limits=limits, content=chunks())
    assert response.status_code == 413
    assert error_of(response)["code"] == "body_too_large"
    assert send("GET", "/v1/models", limits=limits).status_code == 200


@pytest.mark.parametrize("status", [400, 503, 504])
def test_a_refusal_of_the_backend_is_passed_on(status: int) -> None:
    response = complete(EchoBackend(RequestError(status, "no", "prompt", "because")))
    assert response.status_code == status
    assert error_of(response)["message"] == "no"
    assert ("Retry-After" in response.headers) == (status == 503)


def test_the_application_starts_and_stops_behind_its_middleware() -> None:
    """Servers send a `lifespan` scope, which has no path and no headers."""
    incoming = iter([{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}])
    sent: list[str] = []

    async def receive() -> Any:
        return next(incoming)

    async def note(message: Any) -> None:
        sent.append(message["type"])

    asyncio.run(create_app(EchoBackend(), api_keys=["key"])({"type": "lifespan", "state": {}}, receive, note))
    assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


def test_keys_are_asked_for_everywhere_but_for_health() -> None:
    keys = ["first-key", "second-key"]
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer "}, {"Authorization": "Basic x"}):
        for path in ("/v1/models", "/v1/models/health", "/openapi.json"):
            response = send("GET", path, api_keys=keys, headers=headers)
            assert response.status_code == 401
            assert error_of(response)["code"] == "invalid_api_key"
    assert send("GET", "/health", api_keys=keys).status_code == 200
    for key in keys:
        assert send("GET", "/v1/models", api_keys=keys, headers={"Authorization": f"Bearer {key}"}).status_code == 200
