"""The front door: OpenAI's answers, and OpenAI's errors for everything that can be wrong with a request."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import httpx
import pytest

from cert_ray.errors import RequestError
from cert_ray.serving.admission import Admission
from cert_ray.serving.answering import Answerer
from cert_ray.serving.answers import CascadeAnswer, Route
from cert_ray.serving.api_keys import KeyRing, read_key_file
from cert_ray.serving.backends import LocalBackend, Served
from cert_ray.serving.deployment import FrontDoorConfig
from cert_ray.serving.http import create_app
from cert_ray.serving.openai_responses import ResponseWriter
from cert_ray.serving.openai_schema import RequestLimits
from cert_ray.serving.sampling import Mode, Sampling
from tests.serving.builders import ScriptedEngine, small_tokenizer
from tests.serving.front_doors import ScriptedBackend


def send(method: str, path: str, backend: ScriptedBackend | None = None, **options: Any) -> httpx.Response:
    names = ("config", "keys", "admission", "observe")
    app_options = {name: options.pop(name) for name in names if name in options}
    app = create_app(backend or ScriptedBackend(), **app_options)

    async def request() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://cert") as client:
            return await client.request(method, path, **options)

    return asyncio.run(request())


def complete(
    backend: ScriptedBackend | None = None, app: dict[str, Any] | None = None, **fields: Any
) -> httpx.Response:
    body = {"model": "org/cert", "prompt": "x =", **fields}
    return send("POST", "/v1/completions", backend, json=body, **(app or {}))


def keys_of(tmp_path: Any, text: str) -> KeyRing:
    (tmp_path / "keys").write_text(text)
    return read_key_file(str(tmp_path / "keys"))


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
    assert body["choices"][1] == {"index": 1, "text": " = 1", "logprobs": None, "finish_reason": "stop"}
    cert = body["cert"]
    assert (cert["route"], cert["sketch"], cert["sketch_votes"], cert["vote_share"]) == (
        "generator",
        "x = number",
        3,
        0.75,
    )
    assert (cert["seed"], cert["timings_s"], cert["others"]) == (3, {"sketch": 0.1, "generate": 0.2}, [])
    assert [candidate["votes"] for candidate in cert["vote"]["candidates"]] == [3, 1]


def test_a_request_may_hold_the_generator_to_the_sketch_and_is_told_which_choices_left_it() -> None:
    backend = ScriptedBackend()
    asked = {"model": "org/cert", "prompt": "x", "mode": "constrained"}
    assert send("POST", "/v1/completions", backend, json=asked).status_code == 200
    assert backend.asked[0][2].mode is Mode.CONSTRAINED
    answer = CascadeAnswer((), Route.CONSTRAINED, off_sketch=1)
    cert = ResponseWriter("m", ["m"], ["x"], Sampling()).whole([answer]).cert
    assert cert is not None
    assert (cert.route, cert.off_sketch) == ("constrained", 1)


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
        ({"n": "2"}, 400, "n", "invalid_value"),
        ({"n": True}, 400, "n", "invalid_value"),
        ({"n": 10_000}, 400, "n", "limit_exceeded"),
        ({"temperature": "hot"}, 400, "temperature", "invalid_value"),
        ({"max_tokens": 10_000}, 400, "max_tokens", "limit_exceeded"),
        ({"max_tokens": 0}, 400, "max_tokens", "invalid_value"),
        ({"n": 3, "best_of": 2}, 400, "best_of", "invalid_value"),
        ({"best_of": 2, "stream": True}, 400, "best_of", "invalid_value"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options", "invalid_value"),
        ({"logprobs": 6}, 400, "logprobs", "invalid_value"),
        ({"stop": ["x" * 300]}, 400, "stop", "limit_exceeded"),
        ({"stop_token_ids": [-1]}, 400, "stop_token_ids", "invalid_value"),
        ({"mode": "guess"}, 400, "mode", "invalid_value"),
        ({"presence_penalty": 0.5}, 400, "presence_penalty", "unsupported_field"),
        ({"logit_bias": {"5": 1}}, 400, "logit_bias", "unsupported_field"),
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


@pytest.mark.parametrize(
    "field", [{"sketches": 5}, {"rank": "likelihood"}, {"kind": "names"}, {"least_share": 0.1}, {"generator_stop": []}]
)
def test_options_of_the_operator_are_not_ignored_in_a_request(field: dict[str, Any]) -> None:
    ((name, _),) = field.items()
    response = complete(**field)
    assert response.status_code == 400
    error = error_of(response)
    assert (error["param"], error["code"]) == (name, "unsupported_field")
    assert error["message"] == f"{name} is an option of the server (cascade.{name}), not of a request: leave it out."


def test_a_plain_model_refuses_a_cascades_mode_in_openais_shape() -> None:
    plain = Answerer(None, ScriptedEngine(small_tokenizer(), lambda _: [("x", 0.0)]))
    app = create_app(LocalBackend({"org/cert": (None, plain)}))

    async def ask(mode: str) -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://cert") as client:
            return await client.post("/v1/completions", json={"model": "org/cert", "prompt": "x =", "mode": mode})

    refused = asyncio.run(ask("cascade"))
    assert refused.status_code == 400
    assert (error_of(refused)["param"], error_of(refused)["type"]) == ("mode", "invalid_request_error")
    assert asyncio.run(ask("single")).status_code == 200


def test_unknown_paths_and_methods_are_errors_of_the_same_shape() -> None:
    assert send("POST", "/v1/chat/completions", json={}).status_code == 404
    assert error_of(send("GET", "/nowhere"))["type"] == "not_found_error"
    response = send("GET", "/v1/completions")
    assert response.status_code == 405
    error_of(response)


def test_an_oversized_body_is_refused_by_header_and_by_bytes() -> None:
    config = FrontDoorConfig(limits=RequestLimits(max_body_bytes=100))
    assert send("POST", "/v1/completions", config=config, content=b"x" * 101).status_code == 413

    async def chunks():  # type: ignore[no-untyped-def]
        for _ in range(30):
            yield b"0123456789"

    response = send("POST", "/v1/completions", config=config, content=chunks())
    assert response.status_code == 413
    assert error_of(response)["code"] == "body_too_large"
    assert send("GET", "/v1/models", config=config).status_code == 200


def test_a_body_that_trickles_in_is_refused_and_its_connection_closed() -> None:
    async def chunks():  # type: ignore[no-untyped-def]
        yield b'{"model": "org/cert", '
        await asyncio.sleep(2)
        yield b'"prompt": "x ="}'

    def ask(timeout_s: float) -> httpx.Response:
        config, headers = FrontDoorConfig(request_timeout_s=timeout_s), {"Content-Type": "application/json"}
        return send("POST", "/v1/completions", config=config, content=chunks(), headers=headers)

    response = ask(0.1)
    assert response.status_code == 408
    assert (error_of(response)["type"], error_of(response)["code"]) == ("timeout", "body_timeout")
    assert response.headers["Connection"] == "close"
    assert ask(60).status_code == 200


@pytest.mark.parametrize("status", [400, 503, 504])
def test_a_refusal_of_the_backend_is_passed_on(status: int) -> None:
    response = complete(ScriptedBackend(RequestError(status, "no", "prompt", "because")))
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

    app = create_app(ScriptedBackend(), keys=KeyRing(()))
    asyncio.run(app({"type": "lifespan", "state": {}}, receive, note))
    assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


def test_keys_are_asked_for_everywhere_but_for_health_and_the_page(tmp_path: Any) -> None:
    keys = keys_of(tmp_path, "first-key\nsecond second-key\n")
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer "}, {"Authorization": "Basic x"}):
        for path in ("/v1/models", "/v1/models/health", "/openapi.json", "/playground.js/"):
            response = send("GET", path, keys=keys, headers=headers)
            assert response.status_code == 401
            assert error_of(response)["code"] == "invalid_api_key"
    for path in ("/health", "/", "/playground.js", "/playground.css"):
        assert send("GET", path, keys=keys).status_code == 200
    for key in ("first-key", "second-key"):
        assert send("GET", "/v1/models", keys=keys, headers={"Authorization": f"Bearer {key}"}).status_code == 200


def test_a_used_up_rate_is_a_429_that_says_when_to_come_back(tmp_path: Any) -> None:
    app = create_app(ScriptedBackend(), keys=keys_of(tmp_path, "a key-a 2/hour\nb key-b\n"))

    async def requests() -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://cert") as client:
            keys = ("key-a", "key-a", "key-a", "key-b")
            return [await client.get("/v1/models", headers={"Authorization": f"Bearer {key}"}) for key in keys]

    responses = asyncio.run(requests())
    assert [response.status_code for response in responses] == [200, 200, 429, 200]
    assert [response.headers.get("x-ratelimit-remaining-requests") for response in responses[:2]] == ["1", "0"]
    assert error_of(responses[2])["type"] == "rate_limit_error"
    assert 3500 < int(responses[2].headers["Retry-After"]) <= 3600
    assert "x-ratelimit-limit-requests" not in responses[3].headers


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_server_refuses_at_once(stream: bool) -> None:
    admission = Admission(1, 1, 60)
    with admission.admit():
        response = complete(app={"admission": admission}, stream=stream)
    assert response.status_code == 503
    assert error_of(response)["code"] == "overloaded"
    assert int(response.headers["Retry-After"]) >= 1
    assert complete(app={"admission": admission}, stream=stream).status_code == 200
    assert admission.in_flight == 0


@pytest.mark.parametrize("stream", [False, True])
def test_the_deadline_ends_the_work(stream: bool) -> None:
    backend = ScriptedBackend(hold=True)
    response = complete(backend, app={"config": FrontDoorConfig(request_timeout_s=0.1)}, stream=stream)
    if stream:  # the sketch is there already: the stream ends in an error, and not in [DONE]
        *_, last, end = response.text.split("\n\n")
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
        assert end == ""
    else:
        assert response.status_code == 504
        assert error_of(response)["code"] == "timeout"
    assert backend.ended.is_set()
    assert backend.running == 0


def test_a_client_that_goes_away_before_the_first_event_is_sent_ends_the_work() -> None:
    backend, gone = ScriptedBackend(hold=True), asyncio.Event()
    body = json.dumps({"model": "org/cert", "prompt": "x", "stream": True}).encode()
    incoming = [{"type": "http.request", "body": body, "more_body": False}]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "root_path": ""}
    scope["headers"] = [(b"content-type", b"application/json")]

    async def receive() -> Any:
        if incoming:
            return incoming.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send_until_gone(_: Any) -> None:
        gone.set()
        await asyncio.Event().wait()  # nobody takes it

    async def ask() -> int:
        await create_app(backend)(scope, receive, send_until_gone)
        return backend.running

    assert asyncio.run(ask()) == 0


def test_a_fault_of_the_server_is_an_error_of_the_same_shape_that_tells_nothing() -> None:
    response = complete(ScriptedBackend(ZeroDivisionError("secret")))
    assert response.status_code == 500
    assert "secret" not in error_of(response)["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_every_request_is_observed_once(stream: bool) -> None:
    seen: list[Served] = []
    complete(app={"observe": seen.append}, stream=stream)
    complete(ScriptedBackend(RequestError(503, "no")), app={"observe": seen.append}, stream=stream)
    assert [(served.model, served.status, len(served.answers)) for served in seen] == [
        ("org/cert", 200, 1),
        ("org/cert", 503, 0),
    ]
    assert [served.first_s is not None for served in seen] == [stream, False]


@pytest.mark.parametrize("stream", [False, True])
def test_requests_in_flight_are_told_when_one_begins_and_when_one_ends(stream: bool) -> None:
    told: list[int] = []
    admission = Admission(2, 1, 60, observe=told.append)
    with admission.admit():
        assert complete(app={"admission": admission}, stream=stream).status_code == 200
        assert told == [1, 2, 1]
        with admission.admit():
            assert complete(app={"admission": admission}, stream=stream).status_code == 503
    assert told == [1, 2, 1, 2, 1, 0]


@pytest.mark.parametrize("log_prompts", [False, True])
def test_prompts_are_logged_only_where_asked_for(caplog: pytest.LogCaptureFixture, log_prompts: bool) -> None:
    app = {"config": FrontDoorConfig(log_prompts=log_prompts)}
    with caplog.at_level(logging.DEBUG):
        for fields in ({}, {"stream": True}, {"n": "many"}, {"suffix": "PRIVATE"}):
            complete(app=app, prompt="PRIVATE", **fields)
        complete(ScriptedBackend(RequestError(400, "no")), app=app, prompt="PRIVATE")
    assert "completion 200" in caplog.text
    assert ("PRIVATE" in caplog.text) is log_prompts


def test_the_page_may_load_its_own_files_alone() -> None:
    response = send("GET", "/")
    assert response.headers["Content-Type"] == "text/html; charset=utf-8"
    policy = response.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http://" not in response.text.replace("http://www.w3.org", "")
    assert "https://" not in response.text
    assert send("GET", "/", config=FrontDoorConfig(playground=False)).status_code == 404
