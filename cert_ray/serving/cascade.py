"""Sketch, vote, fill in: the inference of PAPER.md ("Inference", steps 1 to 4), pure over two `Engine`s.

In: a context and sampling options. Out: a `CascadeAnswer`: the choices, the sketch that won, its votes, the route.
No HTTP, no Ray. Whether stage two is needed is read from special token ids, never from the spelling of a word: code
that says `float` or `to_string` is code.

What each model is given:
  sketcher   the sketch of the context (`contexts.sketch_context`), as in its training text, which is sketches of files;
  generator  `encode_pair(sketch, context)`: the sketch that won, the separator, and the context as the user wrote it.
             Its answer continues the context. By default the sketch is the predicted one alone, as in PAPER.md; with
             `sketch_scope="file"` the context's own sketch stands before it, as in the generator's training text.

Blanks at the end of the context are handled by `boundaries`; answers are what comes after them.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

import pydantic

from cert_ray.config import Config
from cert_ray.serving.boundaries import PAPER_STOPS, drop_start, first_stop, split_trailing_blanks
from cert_ray.serving.contexts import sketch_context
from cert_ray.serving.engines import Completion, Engine, TokenLogprobs, check_length
from cert_ray.serving.events import SketchChosen
from cert_ray.serving.sampling import Sampling
from cert_ray.sketching import Placeholder, Sketched, SketchKind, prompt_format


class Route(StrEnum):
    """Who gave the answer, and why."""

    MODEL = "model"  # one plain model: there is no cascade
    SKETCHER = "sketcher"  # the sketch holds no placeholder, so it is the answer
    GENERATOR = "generator"
    GENERATOR_EMPTY_SKETCH = "generator_empty_sketch"  # it saw the context alone: the sketch is empty
    GENERATOR_LONG_SKETCH = "generator_long_sketch"  # it saw the context alone: both do not fit the window
    SKETCHER_EMPTY_GENERATOR = "sketcher_empty_generator"  # every completion of the generator is empty


class CascadeConfig(Config):
    """What the operator of a cascade may change."""

    kind: SketchKind = SketchKind.CONSTANTS  # the kind that the sketcher was trained on
    sketches: int | None = pydantic.Field(default=None, ge=1)  # None: as many as completions are asked for
    sketch_scope: Literal["answer", "file"] = "answer"
    stop: tuple[str, ...] = PAPER_STOPS  # both stages are cut here, and at the request's own stop strings
    # Three newlines end a block of the generator's training text: behind them the next block's sketch begins.
    generator_stop: tuple[str, ...] = ("\n\n\n",)


@dataclass(frozen=True, slots=True)
class CascadeAnswer:
    """The completions of one prompt, and how they came about.

    `timings_s` is in seconds by stage: `sketch` and `generate`, waiting for a place in the batch included.
    `prompt_tokens` are those of the prompt as the model that is asked first reads it; `cached_tokens` of them were not
    read again. `completion_tokens` are all tokens drawn for the choices, those of `best_of` that are not given
    included; `sketch_tokens` those drawn for sketches.
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
    completion_tokens: int = 0
    sketch_tokens: int = 0
    prompt_logprobs: TokenLogprobs | None = (
        None  # with `echo` and `logprobs`, where one model reads the prompt as it is
    )
    from_cache: bool = False  # the same request was answered before; `timings_s` are of that answer


@dataclass(frozen=True, slots=True)
class _Sketch:
    """One sample of the sketcher, read: its text as a vote counts it, and the sample with its text cut."""

    text: str
    placeholders: tuple[Placeholder, ...]
    completion: Completion


def run_single(context: str, sampling: Sampling, engine: Engine) -> CascadeAnswer:
    """Complete `context` with one plain model, cut at the request's stop strings only."""
    began = time.perf_counter()
    body, blanks = split_trailing_blanks(context)
    prompt = prompt_format.encode_code(engine.tokenizer, body)
    choices = _generate(engine, prompt, sampling, sampling.stop, blanks)
    timings_s = {"generate": time.perf_counter() - began}
    return CascadeAnswer(tuple(choices), Route.MODEL, prompt_tokens=len(prompt), timings_s=timings_s)


def run_cascade(
    context: str,
    sampling: Sampling,
    sketcher: Engine,
    generator: Engine,
    config: CascadeConfig | None = None,
) -> CascadeAnswer:
    """Complete `context` by sketching first.

    Where the sketcher's samples are the answer, those that voted for the winner come first. A function of its arguments
    alone, timings apart, if the engines are.

    Raises:
        RequestError: 400, when the context does not fit a model's window.
    """
    config = config or CascadeConfig()
    began = time.perf_counter()
    body, blanks = split_trailing_blanks(context)
    # Before sketching, whose cost grows with a prompt that would be refused anyway.
    alone = prompt_format.encode_code(generator.tokenizer, body)
    check_length(len(alone), generator.context_tokens)
    seen = sketch_context(body, config.kind)
    stops = (*config.stop, *sampling.stop)
    prompt = prompt_format.encode_sketch(sketcher.tokenizer, seen.text, seen.placeholders)
    wanted = sampling.model_copy(update={"n": config.sketches or sampling.n})
    samples = _generate(sketcher, prompt, wanted, stops, blanks)
    sketches = [_read_sketch(sketcher, sample, blanks, stops) for sample in samples]
    winner, votes = _vote(sketches)
    timings_s = {"sketch": time.perf_counter() - began}

    def answer(choices: Sequence[Completion], route: Route) -> CascadeAnswer:
        share = votes / len(sketches)
        return CascadeAnswer(tuple(choices), route, winner.text, votes, share, len(prompt), timings_s)

    if winner.text.strip() and not winner.placeholders:
        return answer(_samples_of(sketches, winner, sampling.n), Route.SKETCHER)
    began = time.perf_counter()
    above = seen if config.sketch_scope == "file" else None
    pair = _pair(generator, above, body, blanks, winner, sampling.max_tokens) if winner.text.strip() else None
    route = Route.GENERATOR_EMPTY_SKETCH
    if winner.text.strip():
        route = Route.GENERATOR_LONG_SKETCH if pair is None else Route.GENERATOR
    choices = _generate(generator, alone if pair is None else pair, sampling, (*stops, *config.generator_stop), blanks)
    timings_s["generate"] = time.perf_counter() - began
    if all(not choice.text.strip() for choice in choices):
        return answer(_samples_of(sketches, winner, sampling.n), Route.SKETCHER_EMPTY_GENERATOR)
    return answer(choices, route)


def _generate(
    engine: Engine, prompt: Sequence[int], sampling: Sampling, stops: Sequence[str], blanks: str
) -> list[Completion]:
    return engine.generate(
        [prompt],
        n=sampling.n,
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=sampling.seed,
        stop=stops,
        starts=[blanks],
    )[0]


def _read_sketch(sketcher: Engine, sample: Completion, blanks: str, stops: Sequence[str]) -> _Sketch:
    """The sample's tokens as text and placeholder spans, cut; the blanks that the prompt ended in are not its own."""
    decoded = prompt_format.decode_sketch(sketcher.tokenizer, sample.ids)
    start = len(decoded.text) - len(drop_start(decoded.text, blanks))
    shown = decoded.text[start:]
    shown = shown[: first_stop(shown, stops)]
    text = shown.rstrip()  # trailing blanks make no other sketch
    placeholders = tuple(
        Placeholder(place.start - start, place.end - start, place.kind)
        for place in decoded.placeholders
        if place.end - start <= len(text)
    )
    return _Sketch(text, placeholders, Completion(sample.ids, shown, sample.finish_reason, sample.mean_logprob))


def _vote(sketches: Sequence[_Sketch]) -> tuple[_Sketch, int]:
    """The most frequent sketch and its votes; among equals the likeliest by its best sample, then the first drawn."""
    votes = Counter((sketch.text, sketch.placeholders) for sketch in sketches)
    winner = max(sketches, key=lambda sketch: (votes[sketch.text, sketch.placeholders], sketch.completion.mean_logprob))
    return winner, votes[winner.text, winner.placeholders]


def _samples_of(sketches: Sequence[_Sketch], winner: _Sketch, n: int) -> list[Completion]:
    """`n` of the sketcher's samples, the winner's first; repeated when fewer sketches than answers were drawn."""
    elected = (winner.text, winner.placeholders)
    ordered = sorted(sketches, key=lambda sketch: (sketch.text, sketch.placeholders) != elected)
    return [ordered[place % len(ordered)].completion for place in range(n)]


def _pair(
    generator: Engine, above: Sketched | None, body: str, blanks: str, winner: _Sketch, max_tokens: int
) -> list[int] | None:
    """The generator's prompt of sketch and context; None when the window cannot hold them and an answer.

    `above` is the context's own sketch where the generator is to see it before the answer's.
    """
    text, placeholders = winner.text, winner.placeholders
    if above is not None:
        shift = len(above.text) + len(blanks)
        moved = (Placeholder(place.start + shift, place.end + shift, place.kind) for place in placeholders)
        text, placeholders = above.text + blanks + text, (*above.placeholders, *moved)
    pair = prompt_format.encode_pair(generator.tokenizer, text, placeholders, body)
    # The answer fills the sketch's placeholders: room for twice its tokens is assumed to do.
    room = min(max_tokens, 2 * len(prompt_format.encode_sketch(generator.tokenizer, winner.text, winner.placeholders)))
    return pair if len(pair) + room <= generator.context_tokens else None
