"""What editor plugins speak: llama.cpp's `/infill` and Tabby's completions, turned into this server's own requests.

In: their JSON. Out: a `CompletionRequest`, and its answer in their JSON. Plugins send more than is known here (cache
hints, samplers, clipboards); such fields are ignored, since a plugin cannot leave them out.

Source: the server's README in ggml-org/llama.cpp, `POST /infill`; the OpenAPI document of TabbyML/tabby.
"""

from __future__ import annotations

from typing import Annotated, Any

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from cert_ray.errors import RequestError
from cert_ray.serving.boundaries import PAPER_STOPS
from cert_ray.serving.openai_responses import CompletionResponse
from cert_ray.serving.openai_schema import CompletionRequest, RequestLimits

TABBY_TOKENS = 64  # Tabby's own default
_TABBY_TEMPERATURE = 0.1  # Tabby's own default
_Count = Annotated[int, Field(strict=True)]
_Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]


class _Asked(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, protected_namespaces=())


class InfillRequest(_Asked):
    """Body of llama.cpp's `POST /infill`. What stands before the cursor is `input_prefix`, then `prompt`."""

    input_prefix: str = ""
    input_suffix: str = ""
    prompt: str = ""
    n_predict: _Count | None = Field(default=None, ge=-1, description="-1 or none: as many as this server allows")
    temperature: _Number | None = Field(default=None, ge=0)
    top_p: _Number | None = Field(default=None, ge=0, le=1)
    seed: _Count | None = Field(default=None, ge=-(2**63), lt=2**63, description="-1: a fresh one")
    stop: list[str] | None = None
    stream: Annotated[bool, Field(strict=True)] = False


class InfillResponse(BaseModel):
    """The fields of llama.cpp's answer that plugins read."""

    content: str
    model: str
    stop: bool = True
    stop_type: str
    tokens_predicted: int
    tokens_evaluated: int


class TabbySegments(_Asked):
    """The text around the cursor."""

    prefix: str
    suffix: str | None = None


class TabbyRequest(_Asked):
    """Body of Tabby's `POST /v1/completions`."""

    language: str | None = None
    segments: TabbySegments
    temperature: _Number | None = Field(default=None, ge=0)
    seed: _Count | None = Field(default=None, ge=0, lt=2**63)


class TabbyChoice(BaseModel):
    """One completion."""

    index: int
    text: str


class TabbyResponse(BaseModel):
    """Tabby's answer."""

    id: str
    choices: list[TabbyChoice]


class TabbyHealth(BaseModel):
    """What plugins check before they ask for completions."""

    model: str
    device: str = "cpu"
    version: dict[str, str] = Field(default_factory=dict)


class TabbySettings(BaseModel):
    """What Tabby's agent asks its server: whether it may report its use to its maker."""

    disable_client_side_telemetry: bool = True


def read_infill(asked: InfillRequest, model: str, limits: RequestLimits) -> CompletionRequest:
    """`asked` as a request of this server.

    Raises:
        RequestError: 400 for streaming, which no plugin asks for.
    """
    if asked.stream:
        raise RequestError(400, "stream is not supported here: leave it out.", "stream", "unsupported_field")
    wanted = asked.n_predict if asked.n_predict is not None and asked.n_predict >= 0 else limits.max_tokens
    return _request(
        model=model,
        prompt=asked.input_prefix + asked.prompt,
        suffix=asked.input_suffix,
        max_tokens=min(wanted, limits.max_tokens),
        temperature=asked.temperature,
        top_p=asked.top_p,
        seed=None if asked.seed == -1 else asked.seed,
        stop=(asked.stop or [])[: limits.max_stops],
    )


def read_tabby(asked: TabbyRequest, model: str, limits: RequestLimits) -> CompletionRequest:
    """`asked` as a request of this server. Tabby's plugins leave length and stops to it, so it cuts as in the paper.

    Raises:
        RequestError: 400 for a language other than Python.
    """
    if asked.language not in (None, "python"):
        raise RequestError(400, f"language: {asked.language!r}; this server completes python.", "language", None)
    return _request(
        model=model,
        prompt=asked.segments.prefix,
        suffix=asked.segments.suffix,
        max_tokens=min(TABBY_TOKENS, limits.max_tokens),
        temperature=_TABBY_TEMPERATURE if asked.temperature is None else asked.temperature,
        top_p=None,
        seed=asked.seed,
        stop=list(PAPER_STOPS),
    )


def _request(temperature: float | None, suffix: str | None, **fields: Any) -> CompletionRequest:
    hottest = None if temperature is None else min(temperature, 2.0)
    try:
        return CompletionRequest(temperature=hottest, suffix=suffix or None, **fields)
    except pydantic.ValidationError as error:
        problem = error.errors(include_url=False)[0]
        name = str(problem["loc"][0])
        raise RequestError(400, f"{name}: {problem['msg']}.", name, "invalid_value") from error


def nearer_half(prefix: str) -> str | None:
    """The half of `prefix` next to the cursor, from the beginning of a line; None if no line begins there.

    A plugin sends as many lines as it likes and does not know the window.
    """
    line = prefix.find("\n", len(prefix) // 2) + 1
    return prefix[line:] if 0 < line < len(prefix) else None


def write_infill(response: CompletionResponse) -> InfillResponse:
    """llama.cpp's answer."""
    choice, usage = response.choices[0], response.usage
    return InfillResponse(
        content=choice.text,
        model=response.model,
        stop_type="limit" if choice.finish_reason == "length" else "word",
        tokens_predicted=usage.completion_tokens if usage else 0,
        tokens_evaluated=usage.prompt_tokens if usage else 0,
    )


def nothing_infilled(model: str) -> InfillResponse:
    """llama.cpp's answer when no token is asked for."""
    return InfillResponse(content="", model=model, stop_type="limit", tokens_predicted=0, tokens_evaluated=0)


def write_tabby(response: CompletionResponse) -> TabbyResponse:
    """Tabby's answer."""
    choices = [TabbyChoice(index=one.index, text=one.text) for one in response.choices]
    return TabbyResponse(id=response.id, choices=choices)
