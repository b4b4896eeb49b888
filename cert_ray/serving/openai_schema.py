"""The JSON of OpenAI's `POST /v1/completions`, `GET /v1/models` and of its errors, as pydantic models.

In: a request body. Out: prompts and `Sampling`; and the way back, from answers to a response body. What OpenAI has and
this server does not do (streaming, logprobs, echo, penalties, token ids as prompts) is refused by name, unless it
is set to what it is by default. Beside OpenAI's fields a response carries `cert`: sketch, votes, route and timings.

Source: OpenAI API reference, "Completions" (legacy), and the types of the `openai` client.
"""

from __future__ import annotations

import secrets
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from cert_ray.config import Config
from cert_ray.errors import RequestError
from cert_ray.serving.cascade import CascadeAnswer
from cert_ray.serving.sampling import Sampling

# Known to OpenAI, not done here: the values that mean "not asked for".
_NOT_DONE: Mapping[str, tuple[object, ...]] = {
    "best_of": (None,),
    "echo": (None, False),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
    "logprobs": (None,),
    "presence_penalty": (None, 0),
    "stream": (None, False),
    "stream_options": (None,),
    "suffix": (None, ""),
}


class RequestLimits(Config):
    """What one request may ask for."""

    max_prompts: int = Field(default=32, ge=1)
    max_n: int = Field(default=200, ge=1)  # PAPER.md samples 200
    max_choices: int = Field(default=400, ge=1)  # prompts times n
    max_stops: int = Field(default=16, ge=1)  # OpenAI allows 4, PAPER.md cuts at 6
    max_body_bytes: int = Field(default=1 << 20, ge=1)


class CompletionRequest(BaseModel):
    """A request body. Types, ranges and field names are checked here, limits of the deployment in `read_request`."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False, protected_namespaces=())

    model: str
    prompt: str | list[str]
    n: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    max_tokens: int | None = Field(default=None, ge=1)
    stop: str | list[str] | None = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    user: str | None = None  # accepted, not used

    @pydantic.field_validator("prompt", mode="before")
    @classmethod
    def _check_prompt(cls, prompt: object) -> object:
        parts = prompt if isinstance(prompt, list) else [prompt]
        if any(isinstance(part, int | list) for part in parts):
            raise ValueError("token ids are not supported: send a string or a list of strings")
        if not parts:
            raise ValueError("the list is empty: send a string or a list of strings")
        return prompt

    @pydantic.field_validator("prompt", "stop")
    @classmethod
    def _check_text(cls, text: str | list[str] | None) -> str | list[str] | None:
        for part in [text] if isinstance(text, str) else text or []:
            try:
                part.encode()
            except UnicodeEncodeError as error:  # JSON can hold half a surrogate pair
                raise ValueError(f"not valid Unicode at position {error.start}") from error
        return text

    @pydantic.model_validator(mode="after")
    def _check_not_done(self) -> CompletionRequest:
        for name, value in (self.model_extra or {}).items():
            if value in _NOT_DONE.get(name, (None,)):
                continue
            problem = "is not supported by this server" if name in _NOT_DONE else "is not a field of this endpoint"
            raise RequestError(400, f"{name} {problem}: leave it out.", name, "unsupported_field")
        return self


class CertTrace(BaseModel):
    """How an answer came about. `timings_s` is in seconds by stage; `seed` repeats the answer."""

    route: str
    sketch: str | None
    sketch_votes: int
    vote_share: float
    seed: int
    timings_s: dict[str, float]
    # Traces of the second and further prompts of the request, in order.
    others: list[CertTrace] = Field(default_factory=list)


class Choice(BaseModel):
    """One completion; `index` counts through all prompts, as OpenAI does."""

    index: int
    text: str
    logprobs: None = None
    finish_reason: Literal["stop", "length"]


class Usage(BaseModel):
    """Tokens of the prompts and of all choices; sketches are not counted."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionResponse(BaseModel):
    """A response body."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    cert: CertTrace


def read_request(request: CompletionRequest, limits: RequestLimits) -> tuple[list[str], Sampling]:
    """The prompts and options of a request, with OpenAI's defaults; a request without a seed gets a fresh one.

    Raises:
        RequestError: 400, naming the limit.
    """
    prompts = [request.prompt] if isinstance(request.prompt, str) else request.prompt
    stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
    sampling = Sampling(
        n=request.n or 1,
        max_tokens=request.max_tokens or 16,
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=request.top_p or 1.0,
        seed=secrets.randbits(53) if request.seed is None else request.seed,  # 53 bits survive JSON in every language
        stop=tuple(stop for stop in stops if stop),
    )
    _check_limit("prompt", "prompts", len(prompts), limits.max_prompts)
    _check_limit("n", "n", sampling.n, limits.max_n)
    _check_limit("n", "prompts times n", len(prompts) * sampling.n, limits.max_choices)
    _check_limit("stop", "stop strings", len(stops), limits.max_stops)
    return prompts, sampling


def _check_limit(param: str, what: str, value: int, limit: int) -> None:
    if value > limit:
        raise RequestError(400, f"{what}: {value} is more than this server's {limit}.", param, "limit_exceeded")


def write_response(model: str, sampling: Sampling, answers: Sequence[CascadeAnswer]) -> CompletionResponse:
    """The response body for `answers`, one per prompt, in order."""
    completions = [choice for answer in answers for choice in answer.choices]
    choices = [
        Choice(index=index, text=choice.text, finish_reason=choice.finish_reason)
        for index, choice in enumerate(completions)
    ]
    first, *others = [_trace(answer, sampling.seed) for answer in answers]
    prompt_tokens = sum(answer.prompt_tokens for answer in answers)
    completion_tokens = sum(len(choice.ids) for choice in completions)
    return CompletionResponse(
        id=f"cmpl-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=model,
        choices=choices,
        usage=Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
        ),
        cert=first.model_copy(update={"others": others}),
    )


def _trace(answer: CascadeAnswer, seed: int) -> CertTrace:
    return CertTrace(
        route=answer.route.value,
        sketch=answer.sketch,
        sketch_votes=answer.sketch_votes,
        vote_share=answer.vote_share,
        seed=seed,
        timings_s={stage: round(seconds, 6) for stage, seconds in answer.timings_s.items()},
    )


def model_card(name: str) -> dict[str, Any]:
    """One entry of `GET /v1/models`."""
    return {"id": name, "object": "model", "created": 0, "owned_by": "cert-ray"}


def error_body(error: RequestError) -> dict[str, Any]:
    """OpenAI's error object."""
    kinds = {401: "authentication_error", 404: "not_found_error", 408: "timeout", 429: "rate_limit_error"}
    fallback = "server_error" if error.status >= 500 else "invalid_request_error"
    kind = kinds.get(error.status, fallback)
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}
