"""One model completes a context by itself: a plain one, or the generator of a cascade when only it is asked for.

In: a context, with a suffix if the model was trained to fill in the middle. Out: a `CascadeAnswer` without a sketch.
Blanks at the end of the context are handled by `boundaries`; answers are what comes after them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from cert_ray.serving.answers import NOBODY, CascadeAnswer, Listener, Route, unsupported
from cert_ray.serving.boundaries import split_trailing_blanks
from cert_ray.serving.cascade_config import CascadeConfig
from cert_ray.serving.choices import Teller, choices_of, has_room, work_for
from cert_ray.serving.engines import Engine, check_length
from cert_ray.serving.sampling import Mode, Sampling
from cert_ray.sketching import prompt_format


def run_single(
    context: str, sampling: Sampling, engine: Engine, listener: Listener = NOBODY, ahead: str = ""
) -> CascadeAnswer:
    """Complete `context` with one plain model, cut only at the request's stop strings.

    `ahead` is documentation that the model reads first, if the window has room for it and an answer.

    Raises:
        RequestError: 400, when the context does not fit the window, or for a mode or suffix that the model cannot do.
    """
    if sampling.mode not in (None, Mode.SINGLE):
        raise unsupported("mode", f"{sampling.mode}: one plain model is served here, not a cascade; leave mode out")
    began = time.perf_counter()
    return complete_alone(context, sampling, engine, sampling.stop, Route.MODEL, listener, began, ahead=ahead)


def complete_alone(
    context: str,
    sampling: Sampling,
    engine: Engine,
    stops: Sequence[str],
    route: Route,
    listener: Listener,
    began: float,
    config: CascadeConfig | None = None,
    ahead: str = "",
) -> CascadeAnswer:
    """Complete `context`, or the gap between it and the suffix, with one model."""
    body, blanks = split_trailing_blanks(context)
    scored = sampling.echo and sampling.logprobs is not None
    if sampling.suffix is not None:
        body, blanks = context, ""
    elif scored or sampling.max_tokens == 0:
        body, blanks = context, ""  # the prompt's tokens are reported, so they must be the whole prompt
    prompt = prompt_format.encode_code(engine.tokenizer, ahead + body)
    if ahead and not has_room(prompt, sampling, engine, stages=1 if config is None else 2):
        prompt = prompt_format.encode_code(engine.tokenizer, body)
    if sampling.suffix is not None:
        prompt = _infill(engine, prompt, sampling.suffix)
    # An answer needs room, if one is asked for.
    check_length(len(prompt) - (sampling.max_tokens == 0), engine.context_tokens)
    work = work_for(sampling, prompt, stops, blanks, config)
    teller = Teller(listener, sampling, config)
    drawn = engine.draw(replace(work, score_prompt=scored), teller.hooks())
    choices = choices_of(drawn.samples, sampling, config)
    teller.finish(choices)
    return CascadeAnswer(
        tuple(choices),
        route,
        prompt_tokens=len(prompt),
        timings_s={"generate": time.perf_counter() - began},
        cached_tokens=drawn.cached_tokens,
        completion_tokens=drawn.tokens,
        prompt_logprobs=drawn.prompt_logprobs,
    )


def _infill(engine: Engine, prefix: Sequence[int], suffix: str) -> list[int]:
    if engine.infill_tokens is None:
        raise unsupported("suffix", "is not supported: this model was not trained to fill in the middle")
    before_prefix, before_suffix, before_middle = engine.infill_tokens
    behind = prompt_format.encode_code(engine.tokenizer, suffix)
    return [before_prefix, *prefix, before_suffix, *behind, before_middle]
