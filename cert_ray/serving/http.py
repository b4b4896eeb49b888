"""The HTTP front door: `POST /v1/completions`, `GET /v1/models[/NAME]`, `GET /health`.

In: a `Backend` that answers prompts. Out: a FastAPI application, to be served by anything that speaks ASGI. Every
refusal, also that of a path or a body nobody knows, is OpenAI's error object. No model and no Ray in here, and no TLS.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any, Protocol

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cert_ray.errors import RequestError
from cert_ray.serving.cascade import CascadeAnswer
from cert_ray.serving.openai_schema import (
    CompletionRequest,
    CompletionResponse,
    RequestLimits,
    error_body,
    model_card,
    read_request,
    write_response,
)
from cert_ray.serving.sampling import Sampling

_RETRY_AFTER_S = 1  # assumed: what a client waits when the queue is full
_SHOWN_VALUE_CHARACTERS = 80


class Backend(Protocol):
    """What answers prompts; `complete` raises `RequestError` for what it refuses."""

    @property
    def model_name(self) -> str: ...

    async def complete(self, prompts: Sequence[str], sampling: Sampling) -> list[CascadeAnswer]: ...


def create_app(backend: Backend, limits: RequestLimits | None = None, api_keys: Sequence[str] = ()) -> FastAPI:
    """The application over `backend`. With `api_keys`, every path but `/health` wants one as a bearer token."""
    limits = limits or RequestLimits()
    app = FastAPI(title="cert-ray", docs_url=None, redoc_url=None)  # those pages load scripts from elsewhere
    app.add_middleware(_BodyLimit, max_body_bytes=limits.max_body_bytes)
    if api_keys:
        app.add_middleware(_ApiKeys, api_keys=api_keys)
    _add_error_handlers(app)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model_card(backend.model_name)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        _check_model(name, backend.model_name)
        return model_card(name)

    @app.post("/v1/completions")
    async def completions(request: CompletionRequest) -> CompletionResponse:
        _check_model(request.model, backend.model_name)
        prompts, sampling = read_request(request, limits)
        return write_response(request.model, sampling, await backend.complete(prompts, sampling))

    return app


def _check_model(asked: str, served: str) -> None:
    if asked != served:
        problem = f"The model {asked!r} does not exist here; this server has {served!r}."
        raise RequestError(404, problem, "model", "model_not_found")


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(RequestError)
    async def refuse(_: Request, error: RequestError) -> JSONResponse:
        return _error_response(error)

    @app.exception_handler(RequestValidationError)
    async def refuse_invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return _error_response(_invalid_request(error))

    @app.exception_handler(HTTPException)
    async def refuse_http(request: Request, error: HTTPException) -> JSONResponse:
        where = f"{request.method} {request.url.path}"
        return _error_response(RequestError(error.status_code, f"{where}: {error.detail}", None, None))


def _invalid_request(error: RequestValidationError) -> RequestError:
    """What pydantic found first, as OpenAI would say it: 400, naming the field."""
    problem = error.errors()[0]
    if problem["type"] == "json_invalid":
        reason = problem.get("ctx", {}).get("error", "unreadable")
        return RequestError(400, f"The body is not JSON: {reason}.", None, "invalid_json")
    param = next((part for part in problem["loc"][1:] if isinstance(part, str)), None)
    if param is None:
        return RequestError(400, "The body must be a JSON object, sent as application/json.", None, "invalid_body")
    if problem["type"] == "missing":
        return RequestError(400, f"{param}: required, but not given.", param, "missing_field")
    received = repr(problem["input"])[:_SHOWN_VALUE_CHARACTERS]
    return RequestError(400, f"{param}: {problem['msg']} (got {received}).", param, "invalid_value")


def _error_response(error: RequestError) -> JSONResponse:
    headers = {"Retry-After": str(_RETRY_AFTER_S)} if error.status in (429, 503) else None
    return JSONResponse(error_body(error), status_code=error.status, headers=headers)


class _BodyLimit:
    """ASGI middleware: 413 as soon as a body is known to be too long, by its header or by its bytes."""

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self._max_body_bytes:
            await self._refuse(scope, receive, send)
            return
        messages: list[Message] = []
        received_bytes = 0
        while True:  # at most max_body_bytes are held; bodies of this endpoint are read whole anyway
            message = await receive()
            messages.append(message)
            received_bytes += len(message.get("body", b""))
            if received_bytes > self._max_body_bytes:
                await self._refuse(scope, receive, send)
                return
            if not message.get("more_body", False):
                break
        replay = iter(messages)

        async def receive_again() -> Message:
            return next(replay, None) or await receive()

        await self._app(scope, receive_again, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        problem = f"The body is longer than this server's {self._max_body_bytes} bytes."
        await _error_response(RequestError(413, problem, None, "body_too_large"))(scope, receive, send)


class _ApiKeys:
    """ASGI middleware: 401 without a bearer token that is one of the keys."""

    def __init__(self, app: ASGIApp, api_keys: Sequence[str]) -> None:
        self._app = app
        self._api_keys = [key.encode() for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._is_health(scope) or self._allowed(scope):
            await self._app(scope, receive, send)
            return
        problem = "No valid API key: send `Authorization: Bearer KEY`."
        await _error_response(RequestError(401, problem, None, "invalid_api_key"))(scope, receive, send)

    def _is_health(self, scope: Scope) -> bool:
        return bool(scope["path"].removeprefix(scope.get("root_path", "")) == "/health")

    def _allowed(self, scope: Scope) -> bool:
        sent = dict(scope["headers"]).get(b"authorization", b"").removeprefix(b"Bearer ")
        # Every key is compared, in constant time, so that the answer's time tells nothing.
        return sum(secrets.compare_digest(sent, key) for key in self._api_keys) > 0
