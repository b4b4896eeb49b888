"""The JSON of a request to OpenAI's `POST /v1/completions`, of `GET /v1/models` and of OpenAI's errors.

In: a request body. Out: prompts and `Sampling`. OpenAI's options that this server lacks (penalties, a bias, token ids
as prompts) are refused by name, unless they have their default value. For responses see `openai_responses.py`.

Source: OpenAI API reference, "Completions" (legacy), and the types of the `openai` client. Besides OpenAI's fields
there are `stop_token_ids` and `mode`; with the `openai` client, send them as `extra_body`.
"""

from __future__ import annotations

import secrets
from typing import Annotated, Any, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from cert_ray.config import Config
from cert_ray.errors import ConfigError, RequestError
from cert_ray.serving.sampling import Mode, Sampling

# OpenAI has these, this server does not: only values that mean "not asked for" are accepted.
NOT_DONE = frozenset({"frequency_penalty", "logit_bias", "presence_penalty"})

_LEAST_TOP_P = 1e-9  # OpenAI and llama.cpp accept 0, which leaves only the likeliest token; so does this


class RequestLimits(Config):
    """What one request may ask for."""

    max_prompts: int = Field(default=32, ge=1)
    max_n: int = Field(default=200, ge=1)  # the paper samples 200; limits `best_of` too
    max_choices: int = Field(default=400, ge=1)  # prompts times n, or times best_of
    max_tokens: int = Field(default=2048, ge=1)  # the paper asks for 100; a window of 1,024 bounds it further
    max_stops: int = Field(default=16, ge=1)  # OpenAI allows 4, the paper cuts at 6
    max_stop_characters: int = Field(default=256, ge=1)  # of one stop string: as much text may be held back
    max_body_bytes: int = Field(default=1 << 20, ge=1)


# Numbers in JSON must be numbers: neither "3" nor true is one.
_Count = Annotated[int, Field(strict=True)]
_Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
_Flag = Annotated[bool, Field(strict=True)]


class StreamOptions(BaseModel):
    """What a stream carries besides text."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    include_usage: _Flag | None = None
    include_obfuscation: _Flag | None = None  # accepted, not done: it would hide token lengths from eavesdroppers


class CompletionRequest(BaseModel):
    """A request body. Types, ranges and field names are checked here, the deployment's limits in `read_request`."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model: str
    prompt: str | Annotated[list[str], Field(min_length=1)]
    n: _Count | None = Field(default=None, ge=1)
    best_of: _Count | None = Field(
        default=None,
        ge=1,
        description="samples drawn, of which the n likeliest are returned; of sketches, those that won the vote first",
    )
    temperature: _Number | None = Field(default=None, ge=0, le=2)
    top_p: _Number | None = Field(default=None, ge=0, le=1)
    max_tokens: _Count | None = Field(default=None, ge=0, description="0 only with echo=true, which scores the prompt")
    stop: str | list[str] | None = None
    stop_token_ids: list[_Count] | None = Field(
        default=None, description="not in OpenAI's API: each of these tokens ends an answer"
    )
    seed: _Count | None = Field(default=None, ge=-(2**63), lt=2**63)
    logprobs: _Count | None = Field(default=None, ge=0, le=5)
    echo: _Flag | None = None
    suffix: str | None = None
    stream: _Flag | None = None
    stream_options: StreamOptions | None = None
    mode: Mode | None = Field(default=None, description="not in OpenAI's API: which models take part")
    user: str | None = Field(default=None, description="accepted but not used")
    # See NOT_DONE.
    frequency_penalty: _Number | None = Field(default=None, ge=0, le=0)
    presence_penalty: _Number | None = Field(default=None, ge=0, le=0)
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    @pydantic.field_validator("prompt", mode="before")
    @classmethod
    def _check_prompt(cls, prompt: object) -> object:
        parts = prompt if isinstance(prompt, list) else [prompt]
        if any(isinstance(part, int | list) for part in parts):
            raise ValueError("token ids are not supported: send a string or a list of strings")
        return prompt

    @pydantic.field_validator("model", "prompt", "stop", "suffix", "user")
    @classmethod
    def _check_text(cls, text: str | list[str] | None) -> str | list[str] | None:
        for part in [text] if isinstance(text, str) else text or []:
            try:
                part.encode()
            except UnicodeEncodeError as error:  # JSON can hold half a surrogate pair
                raise ValueError(f"not valid Unicode at position {error.start}") from error
        return text

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class ErrorFields(BaseModel):
    """OpenAI's error fields."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """OpenAI's error object, the body of every refusal."""

    error: ErrorFields


class ModelCard(BaseModel):
    """One entry of `GET /v1/models`. `library` is what the model was trained for."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "cert-ray"
    library: str | None = None


class ModelList(BaseModel):
    """The body of `GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


def read_request(request: CompletionRequest, limits: RequestLimits) -> tuple[list[str], Sampling]:
    """The prompts and options of a request, with OpenAI's defaults. A request without a seed gets a fresh one.

    Raises:
        RequestError: 400, naming the limit, or the options that do not go together.
    """
    prompts = [request.prompt] if isinstance(request.prompt, str) else request.prompt
    stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
    stop_token_ids = tuple(request.stop_token_ids or ())
    n, max_tokens = request.n or 1, 16 if request.max_tokens is None else request.max_tokens
    drawn = max(n, request.best_of or 1)
    _check_together(request, n)
    _check_limit("prompt", "prompts", len(prompts), limits.max_prompts)
    _check_limit("n" if drawn == n else "best_of", "samples of a prompt", drawn, limits.max_n)
    _check_limit("n", "prompts times samples", len(prompts) * drawn, limits.max_choices)
    _check_limit("max_tokens", "max_tokens", max_tokens, limits.max_tokens)
    _check_limit("stop", "stop strings", len(stops), limits.max_stops)
    _check_limit("stop", "characters of a stop string", max(map(len, stops), default=0), limits.max_stop_characters)
    _check_limit("stop_token_ids", "stop tokens", len(stop_token_ids), limits.max_stops)
    try:
        sampling = Sampling(
            n=n,
            best_of=request.best_of,
            max_tokens=max_tokens,
            temperature=1.0 if request.temperature is None else request.temperature,
            top_p=1.0 if request.top_p is None else max(request.top_p, _LEAST_TOP_P),
            # 53 bits survive JSON in every language
            seed=secrets.randbits(53) if request.seed is None else request.seed,
            is_seeded=request.seed is not None,
            stop=tuple(stop for stop in stops if stop),
            stop_token_ids=stop_token_ids,
            logprobs=request.logprobs,
            echo=bool(request.echo),
            suffix=request.suffix or None,
            mode=request.mode,
        )
    except ConfigError as error:
        raise RequestError(400, str(error), None, "invalid_value") from error
    return prompts, sampling


def _check_together(request: CompletionRequest, n: int) -> None:
    """Refuse, as OpenAI does, options that contradict each other."""
    problem, param = None, None
    if request.best_of is not None and request.best_of < n:
        problem, param = f"best_of={request.best_of} is less than n={n}.", "best_of"
    elif request.max_tokens == 0 and not request.echo:
        problem, param = (
            "max_tokens=0 needs echo=true, which scores the prompt: else ask for one token or more.",
            "max_tokens",
        )
    elif request.stream and request.best_of is not None and request.best_of > n:
        problem, param = "best_of cannot be streamed: which samples are best is known only at the end.", "best_of"
    elif request.stream_options is not None and not request.stream:
        problem, param = "stream_options needs stream=true.", "stream_options"
    elif request.echo and request.suffix:
        problem, param = "echo and suffix cannot be used together.", "suffix"
    elif any(not 0 <= token < 2**31 for token in request.stop_token_ids or ()):
        problem, param = "stop_token_ids: a token is a number from 0 to 2147483647.", "stop_token_ids"
    if problem is not None:
        raise RequestError(400, problem, param, "invalid_value")


def _check_limit(param: str, what: str, value: int, limit: int) -> None:
    if value > limit:
        raise RequestError(400, f"{what}: {value} is more than this server's limit, {limit}.", param, "limit_exceeded")


def error_body(error: RequestError) -> dict[str, Any]:
    """OpenAI's error object."""
    kinds = {401: "authentication_error", 404: "not_found_error", 408: "timeout", 429: "rate_limit_error"}
    fallback = "server_error" if error.status >= 500 else "invalid_request_error"
    fields = ErrorFields(
        message=error.message, type=kinds.get(error.status, fallback), param=error.param, code=error.code
    )
    return ErrorBody(error=fields).model_dump()
