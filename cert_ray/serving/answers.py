"""What comes of a prompt: its choices, and which model gave them and why; and who listens while it is worked on.

In: nothing; these are values, which survive pickling (except `Listener`). Out: what HTTP, Ray and evaluation read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

from cert_ray.errors import RequestError
from cert_ray.serving.engines import Completion, TokenLogprobs
from cert_ray.serving.events import Event, SketchChosen


class Route(StrEnum):
    """Who gave the answer, and why."""

    MODEL = "model"  # one plain model: there is no cascade
    SKETCH_ONLY = "sketch_only"  # the request asked for sketches
    GENERATOR_ONLY = "generator_only"  # the request asked for the generator alone
    SKETCHER = "sketcher"  # the sketch holds no placeholder, so it is the answer
    GENERATOR = "generator"
    CONSTRAINED = "constrained"  # the generator, held to the sketch; `off_sketch` answers left it
    GENERATOR_EMPTY_SKETCH = "generator_empty_sketch"  # it saw the context alone: the sketch is empty
    GENERATOR_LONG_SKETCH = "generator_long_sketch"  # it saw the context alone: both do not fit the window
    SKETCHER_EMPTY_GENERATOR = "sketcher_empty_generator"  # every completion of the generator is empty


@dataclass(frozen=True, slots=True)
class CascadeAnswer:
    """The completions of one prompt, and how they came about.

    `timings_s` is in seconds by stage, `sketch` and `generate`, including the wait for a place in the batch.
    `prompt_tokens` are those of the prompt as read by the model that is asked first; `cached_tokens` of them were not
    read again. `completion_tokens` are all tokens drawn for the choices, including those of `best_of` that are not
    given; `sketch_tokens` are those drawn for sketches.
    """

    choices: tuple[Completion, ...]
    route: Route
    sketch: str | None = None  # None without a cascade
    sketch_votes: int = 0
    vote_share: float = 0.0
    prompt_tokens: int = 0
    timings_s: dict[str, float] = field(default_factory=dict)
    chosen: SketchChosen | None = None  # the whole vote; `sketch`, `sketch_votes` and `vote_share` are taken from it
    cached_tokens: int = 0
    completion_tokens: int | None = None  # None: those of the choices
    sketch_tokens: int = 0
    prompt_logprobs: TokenLogprobs | None = (
        None  # with `echo` and `logprobs`, where one model reads the prompt as it is
    )
    from_cache: bool = False  # the same request was answered before; `timings_s` are of that answer
    off_sketch: int | None = None  # with mode `constrained`: choices that are not the sketch with its holes filled


@dataclass(frozen=True, slots=True)
class Listener:
    """Who waits for an answer: `check` raises what ends the work, `tell` receives events as they come."""

    check: Callable[[], None] = lambda: None
    tell: Callable[[Event], None] | None = None


NOBODY = Listener()


def unsupported(param: str, problem: str) -> RequestError:
    """The refusal of an option that these models do not support."""
    return RequestError(400, f"{param} {problem}.", param, "unsupported_value")
