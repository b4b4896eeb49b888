"""What stands before every route: limits on the body, API keys and their rates, and security headers for browsers.

ASGI in, ASGI out. A request refused here never reaches a route; its answer is OpenAI's error object as well.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Collection

from starlette.datastructures import MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cert_ray.errors import RequestError
from cert_ray.serving.api_keys import KeyRing, Quota, RateLimiter
from cert_ray.serving.openai_schema import error_body

# The page loads its own files and asks its own server: nothing from elsewhere, no inline code, no frames.
SECURITY_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def error_response(error: RequestError) -> JSONResponse:
    """OpenAI's error object; a 429 or 503 says when to try again."""
    headers = None
    if error.status in (429, 503):
        headers = {"Retry-After": str(max(1, math.ceil(error.retry_after_s or 1)))}
    return JSONResponse(error_body(error), status_code=error.status, headers=headers)


def request_path(scope: Scope) -> str:
    """The path below the prefix that the application is mounted at."""
    return str(scope["path"].removeprefix(scope.get("root_path", "")))


class BodyLimit:
    """413 as soon as header or bytes show that a body is too long; 408 when it does not arrive in time."""

    def __init__(self, app: ASGIApp, max_body_bytes: int, timeout_s: float) -> None:
        self._app, self._max_body_bytes, self._timeout_s = app, max_body_bytes, timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self._max_body_bytes:
            await self._too_long()(scope, receive, send)
            return
        try:
            async with asyncio.timeout(self._timeout_s):
                messages = await self._read(receive)
        except TimeoutError:
            await self._too_slow()(scope, receive, send)
            return
        if messages is None:
            await self._too_long()(scope, receive, send)
            return
        replay = iter(messages)

        async def receive_again() -> Message:
            return next(replay, None) or await receive()

        await self._app(scope, receive_again, send)

    async def _read(self, receive: Receive) -> list[Message] | None:
        """The messages that hold the body, or None if it is too long. Routes read whole bodies anyway."""
        messages: list[Message] = []
        received_bytes = 0
        while not messages or messages[-1].get("more_body", False):
            messages.append(await receive())
            received_bytes += len(messages[-1].get("body", b""))
            if received_bytes > self._max_body_bytes:
                return None
        return messages

    def _too_long(self) -> JSONResponse:
        problem = f"The body is longer than this server's limit of {self._max_body_bytes} bytes."
        return error_response(RequestError(413, problem, None, "body_too_large"))

    def _too_slow(self) -> JSONResponse:
        problem = f"The body did not arrive within {self._timeout_s:g} s."
        response = error_response(RequestError(408, problem, None, "body_timeout"))
        response.headers["Connection"] = "close"  # otherwise the server would wait for the rest of the body
        return response


class Keys:
    """401 without a bearer token that is one of the keys, 429 when the key's rate is used up.

    Passes the key's name on as `scope["state"]["key_name"]`. Paths in `public` need no key.
    """

    def __init__(self, app: ASGIApp, keys: KeyRing, rates: RateLimiter, public: Collection[str]) -> None:
        self._app, self._keys, self._rates, self._public = app, keys, rates, public

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or request_path(scope) in self._public:
            await self._app(scope, receive, send)
            return
        scheme, _, sent = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        key = self._keys.find(sent.strip()) if scheme.lower() == b"bearer" else None
        if key is None:
            problem = "No valid API key: send `Authorization: Bearer KEY`."
            response = error_response(RequestError(401, problem, None, "invalid_api_key"))
            response.headers["WWW-Authenticate"] = "Bearer"
            await response(scope, receive, send)
            return
        scope.setdefault("state", {})["key_name"] = key.name
        try:
            quota = self._rates.count(key)
        except RequestError as error:
            await error_response(error)(scope, receive, send)
            return
        await self._app(scope, receive, _with_quota(send, quota) if quota is not None else send)


def _with_quota(send: Send, quota: Quota) -> Send:
    """`send`, with the rest of the rate in OpenAI's headers."""

    async def send_quota(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["x-ratelimit-limit-requests"] = str(quota.limit)
            headers["x-ratelimit-remaining-requests"] = str(quota.remaining)
            headers["x-ratelimit-reset-requests"] = f"{quota.reset_s:.0f}s"
        await send(message)

    return send_quota


class SecurityHeaders:
    """Adds `SECURITY_HEADERS` to every response."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_secured(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(SECURITY_HEADERS)
            await send(message)

        await self._app(scope, receive, send_secured if scope["type"] == "http" else send)
