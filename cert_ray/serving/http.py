"""The HTTP front door: `POST /v1/completions`, `GET /v1/models[/NAME]`, `GET /health`, the playground at `/`, and the
routes of editor plugins (`editors`).

In: a `Backend` that answers prompts. Out: a FastAPI application, to be served by anything that speaks ASGI. Every
refusal is OpenAI's error object, even for an unknown path or body. No model and no Ray in here, and no TLS.

Work ends when nobody waits for it: at the deadline, or when the client goes away.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any, TypeVar

from fastapi import APIRouter, FastAPI, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from cert_ray.errors import DeadlineError, RequestCancelledError, RequestError
from cert_ray.serving import editors
from cert_ray.serving.admission import Admission
from cert_ray.serving.answers import CascadeAnswer
from cert_ray.serving.api_keys import KeyRing, RateLimiter
from cert_ray.serving.backends import Backend, Served, Told
from cert_ray.serving.cascade_config import CascadeConfig
from cert_ray.serving.deployment import FrontDoorConfig
from cert_ray.serving.middleware import BodyLimit, Keys, SecurityHeaders, error_response
from cert_ray.serving.openai_responses import CompletionResponse, ResponseWriter
from cert_ray.serving.openai_schema import (
    NOT_DONE,
    CompletionRequest,
    ErrorBody,
    ModelCard,
    ModelList,
    error_body,
    read_request,
)
from cert_ray.serving.resolving import resolve
from cert_ray.serving.sampling import Sampling

_SHOWN_VALUE_CHARACTERS = 80
_BODY_S = 10.0  # time for a body to arrive; assumed: the longest, 1 MiB by default, takes 8.4 s at 1 Mbit/s
_PAGE = {"/": "index.html", **{f"/{name}": name for name in ("playground.js", "playground.css", "playground.svg")}}
_MEDIA_TYPES = {"html": "text/html", "js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
_PUBLIC = frozenset({"/health", *_PAGE})  # the page holds no secret: it asks for a key where one is wanted
_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "Refused; the body is an error object as OpenAI's"},
    "5XX": {"model": ErrorBody, "description": "Busy, too slow or failed; the body is an error object as OpenAI's"},
}
# For the OpenAPI document of servers with keys. `Keys` does the asking.
_BEARER = Security(HTTPBearer(auto_error=False, description="One of the server's keys"))
_KEY_ERRORS: dict[int | str, dict[str, Any]] = {
    401: {"model": ErrorBody, "description": "No valid key"},
    429: {"model": ErrorBody, "description": "The key's rate limit is reached; Retry-After says when to try again"},
}
_T = TypeVar("_T")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Asked:
    """A request that was understood: what is asked of which model, and the key's name for the log."""

    model: str
    prompts: list[str]
    sampling: Sampling
    key_name: str | None
    began: float


def create_app(
    backend: Backend,
    config: FrontDoorConfig | None = None,
    *,
    any_library: str | None = None,
    keys: KeyRing | None = None,
    admission: Admission | None = None,
    front_doors: int = 1,
    observe: Callable[[Served], None] | None = None,
) -> FastAPI:
    """The application over `backend`.

    `any_library` is a model name that stands for all models: see `resolving`. With `keys`, every path except
    `/health` and the page wants one as a bearer token; this one of `front_doors` allows its share of a key's rate.
    `observe` is called once for every completion request that was understood.
    """
    config = config or FrontDoorConfig()
    any_library = any_library or next(iter(backend.served))
    admission = admission or Admission(1_000, 1_000, config.request_timeout_s)
    app = FastAPI(
        title="cert-ray", docs_url=None, redoc_url=None, redirect_slashes=False
    )  # those pages load scripts from elsewhere
    body_s = min(_BODY_S, config.request_timeout_s)
    app.add_middleware(BodyLimit, max_body_bytes=config.limits.max_body_bytes, timeout_s=body_s)
    if keys is not None:
        app.add_middleware(Keys, keys=keys, rates=RateLimiter(config.rate, front_doors), public=_PUBLIC)
    app.add_middleware(SecurityHeaders)
    _add_error_handlers(app)
    _add_health(app)
    if config.playground:
        _add_page(app)
    routes = APIRouter(responses=_ERRORS)
    if keys is not None:
        routes = APIRouter(responses=_ERRORS | _KEY_ERRORS, dependencies=[_BEARER])
    _add_models(routes, backend, any_library)
    completions = _Completions(backend, config, any_library, admission, observe or (lambda _: None))
    _add_completions(routes, completions)
    _add_editors(routes, completions, any_library)
    app.include_router(routes)
    return app


def _add_health(app: FastAPI) -> None:
    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}


def _add_models(routes: APIRouter, backend: Backend, any_library: str) -> None:
    @routes.get("/v1/models")
    async def models() -> ModelList:
        cards = [ModelCard(id=name, library=library) for name, library in backend.served.items()]
        if any_library not in backend.served:
            cards.insert(0, ModelCard(id=any_library))
        return ModelList(data=cards)

    @routes.get("/v1/models/{name:path}")
    async def model(name: str) -> ModelCard:
        resolve(name, (), backend.served, any_library)
        return ModelCard(id=name, library=backend.served.get(name))


def _add_page(app: FastAPI) -> None:
    folder = resources.files("cert_ray.serving") / "playground"
    for path, name in _PAGE.items():
        app.add_route(path, _file(folder / name), include_in_schema=False)


def _file(file: Traversable) -> Callable[[Request], Response]:
    content, media_type = file.read_bytes(), _MEDIA_TYPES[file.name.rpartition(".")[2]]
    return lambda _: Response(content, media_type=media_type, headers={"Cache-Control": "no-cache"})


def _add_completions(routes: APIRouter, completions: _Completions) -> None:
    events = {"text/event-stream": {"schema": {"type": "string", "description": "with stream=true: OpenAI's chunks"}}}

    @routes.post("/v1/completions", response_model=CompletionResponse, responses={200: {"content": events}})
    async def complete(request: Request, body: CompletionRequest) -> Response:
        return await completions.answer(request, body)


def _add_editors(routes: APIRouter, completions: _Completions, any_library: str) -> None:
    limits = completions.limits

    @routes.post("/infill")
    async def infill(request: Request, body: editors.InfillRequest) -> editors.InfillResponse:
        if body.n_predict == 0:  # a plugin that warms up
            return editors.nothing_infilled(any_library)
        return editors.write_infill(await completions.fill(request, editors.read_infill(body, any_library, limits)))

    @routes.post("/tabby/v1/completions")
    async def tabby(request: Request, body: editors.TabbyRequest) -> editors.TabbyResponse:
        return editors.write_tabby(await completions.fill(request, editors.read_tabby(body, any_library, limits)))

    @routes.get("/tabby/v1/health")
    async def tabby_health() -> editors.TabbyHealth:
        return editors.TabbyHealth(model=any_library)

    @routes.get("/tabby/v1beta/server_setting")
    async def tabby_settings() -> editors.TabbySettings:
        return editors.TabbySettings()

    @routes.post("/tabby/v1/events", status_code=204)
    async def tabby_events() -> None:
        """Plugins report here what was shown and accepted. Nothing is kept."""


class _Completions:
    """`POST /v1/completions`, and the routes that reduce to it."""

    def __init__(
        self,
        backend: Backend,
        config: FrontDoorConfig,
        any_library: str,
        admission: Admission,
        observe: Callable[[Served], None],
    ) -> None:
        self._backend, self._config, self._any_library = backend, config, any_library
        self._admission, self._observe = admission, observe
        self.limits = config.limits

    async def fill(self, request: Request, body: CompletionRequest) -> CompletionResponse:
        """The answer to one prompt and suffix, shortened as far as the window and the model require."""
        asked, writer = self._understand(request, body)
        return await self._whole(request, asked, writer, lambda: self._fitted(asked))

    async def _fitted(self, asked: _Asked) -> Sequence[CascadeAnswer]:
        (prompt,), sampling = asked.prompts, asked.sampling
        while True:
            try:
                return await self._backend.answer(asked.model, [prompt], sampling, self._config.request_timeout_s)
            except RequestError as error:
                is_too_long, nearer = error.code == "context_length_exceeded", editors.nearer_half(prompt)
                if is_too_long and (nearer is not None or sampling.suffix is not None):
                    half = (sampling.suffix or "")[: len(sampling.suffix or "") // 2]
                    prompt, sampling = nearer or prompt, sampling.model_copy(update={"suffix": half or None})
                elif error.param == "suffix" and sampling.suffix is not None:  # not trained to fill in the middle
                    sampling = sampling.model_copy(update={"suffix": None})
                else:
                    raise

    async def answer(self, request: Request, body: CompletionRequest) -> Response:
        """The response: whole, or as a stream whose first event is already there."""
        asked, writer = self._understand(request, body)
        if not body.stream:
            timeout_s = self._config.request_timeout_s
            response = await self._whole(
                request,
                asked,
                writer,
                lambda: self._backend.answer(asked.model, asked.prompts, asked.sampling, timeout_s),
            )
            return Response(response.model_dump_json(), media_type="application/json")
        events = self._events(asked, writer, body.include_usage)
        # Every refusal comes before the first event, with its own status.
        first = await _while_connected(request, anext(events))
        return _EventStream(first, events)

    def _understand(self, request: Request, body: CompletionRequest) -> tuple[_Asked, ResponseWriter]:
        began = time.perf_counter()
        prompts, sampling = read_request(body, self._config.limits)
        model = resolve(body.model, prompts, self._backend.served, self._any_library)
        asked = _Asked(model, prompts, sampling, getattr(request.state, "key_name", None), began)
        return asked, ResponseWriter(body.model, [model] * len(prompts), prompts, sampling)

    async def _whole(
        self,
        request: Request,
        asked: _Asked,
        writer: ResponseWriter,
        ask: Callable[[], Awaitable[Sequence[CascadeAnswer]]],
    ) -> CompletionResponse:
        timeout_s = self._config.request_timeout_s
        answers: Sequence[CascadeAnswer] = ()
        status = 499  # unless something else ends it, the client went away
        try:
            with self._admission.admit(len(asked.prompts)):
                answers = await _while_connected(request, _until(ask(), timeout_s))
            status = 200
        except RequestError as error:
            status = error.status
            raise
        except Exception:  # recorded and re-raised: the application answers 500
            status = 500
            raise
        finally:
            self._tell(asked, status, answers=answers)
        return writer.whole(answers)

    async def _events(self, asked: _Asked, writer: ResponseWriter, include_usage: bool) -> AsyncGenerator[str, None]:
        """Server-sent events. What goes wrong before the first one is raised; afterwards it becomes an event."""
        first_s: float | None = None
        answers: tuple[CascadeAnswer, ...] = ()
        status = 499  # unless something else ends it, the client went away
        timeout_s = self._config.request_timeout_s
        try:
            with self._admission.admit(len(asked.prompts)):
                told = self._backend.stream(asked.model, asked.prompts, asked.sampling, timeout_s)
                async with aclosing(_each_until(told, timeout_s)) as batches:
                    async for batch in batches:
                        text = "".join(_sse(chunk, include_usage) for chunk in _chunks(writer, batch, include_usage))
                        if text:
                            first_s = first_s or time.perf_counter() - asked.began
                            yield text
                        answers = batch.answers or ()
            status = 200
            yield "data: [DONE]\n\n"
        except Exception as error:
            refusal = error if isinstance(error, RequestError) else _failed()
            status = refusal.status
            if first_s is None:
                raise
            if refusal is not error:
                _log.exception("a stream failed after its first event")
            yield f"data: {json.dumps(error_body(refusal))}\n\n"
        finally:
            self._tell(asked, status, first_s, answers if status == 200 else ())

    def _tell(
        self, asked: _Asked, status: int, first_s: float | None = None, answers: Sequence[CascadeAnswer] = ()
    ) -> None:
        seconds = time.perf_counter() - asked.began
        self._observe(Served(asked.model, status, seconds, first_s, tuple(answers)))
        _log.info(
            "completion %d %.3f s model %s key %s prompts %d n %d max_tokens %d route %s%s",
            status,
            seconds,
            asked.model,
            asked.key_name or "-",
            len(asked.prompts),
            asked.sampling.drawn,
            asked.sampling.max_tokens,
            ",".join(answer.route.value for answer in answers) or "-",
            f" prompts {asked.prompts!r}" if self._config.log_prompts else "",
        )


class _EventStream(StreamingResponse):
    """A stream of server-sent events, which no cache keeps and no proxy buffers."""

    def __init__(self, first: str, rest: AsyncGenerator[str, None]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(_chain(first, rest), media_type="text/event-stream", headers=headers)
        self._rest = rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # When the client goes away, Starlette stops iterating, or never starts; only closing ends the work.
        async with aclosing(self._rest):
            await super().__call__(scope, receive, send)


async def _chain(first: str, rest: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
    yield first
    async for event in rest:
        yield event


def _chunks(writer: ResponseWriter, batch: Told, include_usage: bool) -> Iterator[CompletionResponse]:
    for prompt, event in batch.events:
        yield from writer.chunks(prompt, event)
    if batch.answers is not None:
        yield from writer.last_chunks(batch.answers, include_usage)


def _sse(chunk: CompletionResponse, include_usage: bool) -> str:
    """One server-sent event. Before the end, usage is null, or absent if it was not asked for, as with OpenAI."""
    absent = {name for name, there in (("cert", chunk.cert), ("usage", chunk.usage or include_usage)) if not there}
    return f"data: {chunk.model_dump_json(exclude=absent)}\n\n"


async def _until(work: Awaitable[_T], timeout_s: float) -> _T:
    """The result of `work`; `DeadlineError` when it takes longer than `timeout_s`."""
    try:
        return await asyncio.wait_for(work, timeout_s)
    except TimeoutError as error:
        problem = f"No answer within {timeout_s:g} s. Ask for fewer tokens or samples."
        raise DeadlineError(504, problem, None, "timeout") from error


async def _each_until(told: AsyncGenerator[Told, None], timeout_s: float) -> AsyncGenerator[Told, None]:
    """Pass batches on up to the one with the answers; `DeadlineError` after `timeout_s` in all."""
    ends = time.monotonic() + timeout_s
    async with aclosing(told):
        while True:
            batch = await _until(anext(told), max(0.0, ends - time.monotonic()))
            yield batch
            if batch.answers is not None:
                return


async def _while_connected(request: Request, work: Awaitable[_T]) -> _T:
    """The result of `work`. If the client goes away first, `work` is cancelled and `RequestCancelledError` raised."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = (asyncio.ensure_future(work), asyncio.ensure_future(gone()))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            return tasks[0].result()
        raise RequestCancelledError(499, "The client went away.", None, "cancelled")
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(RequestError)
    async def refuse(_: Request, error: RequestError) -> JSONResponse:
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def refuse_invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return error_response(_invalid_request(error))

    @app.exception_handler(HTTPException)
    async def refuse_http(request: Request, error: HTTPException) -> JSONResponse:
        where = f"{request.method} {request.url.path}"
        response = error_response(RequestError(error.status_code, f"{where}: {error.detail}", None, None))
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def fail(_: Request, __: Exception) -> JSONResponse:
        return error_response(_failed())


def _failed() -> RequestError:
    """What a client is told about a fault of ours."""
    return RequestError(500, "The server failed; its log says why.", None, "failed")


def _invalid_request(error: RequestValidationError) -> RequestError:
    """The first problem that pydantic found, as OpenAI would report it: 400, naming the field."""
    problem = error.errors()[0]
    if problem["type"] == "json_invalid":
        reason = problem.get("ctx", {}).get("error", "unreadable")
        return RequestError(400, f"The body is not JSON: {reason}.", None, "invalid_json")
    param = next((part for part in problem["loc"][1:] if isinstance(part, str)), None)
    if param is None:
        return RequestError(400, "The body must be a JSON object, sent as application/json.", None, "invalid_body")
    if problem["type"] == "missing":
        return RequestError(400, f"{param}: required, but not given.", param, "missing_field")
    if problem["type"] == "extra_forbidden" or param in NOT_DONE:
        what = "is not supported by this server" if param in NOT_DONE else "is not a field of this endpoint"
        if param in CascadeConfig.model_fields:
            what = f"is an option of the server (cascade.{param}), not of a request"
        return RequestError(400, f"{param} {what}: leave it out.", param, "unsupported_field")
    received = repr(problem["input"])[:_SHOWN_VALUE_CHARACTERS]
    return RequestError(400, f"{param}: {problem['msg']} (got {received}).", param, "invalid_value")
