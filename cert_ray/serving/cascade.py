"""Sketch, vote, fill in: the inference of PAPER.md ("Inference", steps 1 to 4), pure over `Engine`s.

In: a context and sampling options. Out: a `CascadeAnswer`: the choices, the sketch that won, its votes, the route.
No HTTP, no Ray. Whether stage two is needed is read from special token ids, never from the spelling of a word: code
that says `float` or `to_string` is code. The vote ends as soon as no other sketch can win, going by what samples begin
with, if the sketch that won needs stage two or has as many samples as answers are asked for.

What each stage is given stands in `layouts`: two models in PAPER.md's layout, or one that reads the context first. The
stages are called sketcher and generator whatever model they are.

With mode `constrained` the generator's answer must be the sketch, its placeholders filled (`constraints.py`), as long
as the generator finds that likely enough.

Blanks at the end of the context are handled by `boundaries`; answers are what comes after them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Final, Literal, Self

import pydantic

from cert_ray.config import Config
from cert_ray.errors import ConfigError, RequestError
from cert_ray.serving import drafts
from cert_ray.serving.boundaries import PAPER_STOPS, first_stop, split_trailing_blanks
from cert_ray.serving.constraints import Template
from cert_ray.serving.engines import Completion, Drawn, Engine, Hooks, TokenLogprobs, Work, check_length
from cert_ray.serving.events import Event, SketchChosen, TextDrawn
from cert_ray.serving.layouts import ContextFirst, Layout, SketchFirst
from cert_ray.serving.sampling import Mode, Sampling
from cert_ray.serving.voting import Ballot, Sketch, read_beginning, read_sketch
from cert_ray.sketching import SketchKind, prompt_format


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


class CascadeConfig(Config):
    """What the operator of a cascade may change."""

    kind: SketchKind = SketchKind.CONSTANTS  # the kind that the sketcher was trained on
    sketches: int | None = pydantic.Field(default=None, ge=1)  # None: as many as completions are asked for
    sketch_scope: Literal["answer", "file"] = "answer"
    stop: tuple[str, ...] = PAPER_STOPS  # both stages are cut here, and at the request's own stop strings
    # Whether a sketch needs stage two: by its special tokens, or as the authors' code did, which looked for the words
    # in the text, and so takes `astype(float)` for a placeholder (PAPER.md). `released` also gives the models plain
    # text instead of special tokens, and goes with `kind: released` and models trained on that.
    routing: Literal["special_tokens", "released"] = "special_tokens"
    # Draw the same samples again after so many, as the authors' code did after 50. None: every sample its own.
    reseed_every: int | None = pydantic.Field(default=None, ge=1)
    rank: Literal["drawn", "likelihood"] = "drawn"  # answers in the order drawn, or the likeliest per token first
    # Unless a request asks otherwise.
    mode: Literal[Mode.CASCADE, Mode.CONSTRAINED, Mode.SKETCH_ONLY, Mode.GENERATOR_ONLY] = Mode.CASCADE
    # With mode `constrained`: an answer goes on freely where the generator gives less than this probability to all that
    # the sketch allows. Assumed.
    least_share: float = pydantic.Field(default=0.001, gt=0, le=1)
    # Three newlines end a block of the generator's training text: behind them the next block's sketch begins.
    generator_stop: tuple[str, ...] = ("\n\n\n",)

    @pydantic.model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.mode is Mode.CONSTRAINED and self.routing == "released":
            raise ConfigError("mode='constrained' with routing='released': words do not tell placeholders from code.")
        return self


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
    completion_tokens: int | None = None  # None: those of the choices
    sketch_tokens: int = 0
    prompt_logprobs: TokenLogprobs | None = (
        None  # with `echo` and `logprobs`, where one model reads the prompt as it is
    )
    from_cache: bool = False  # the same request was answered before; `timings_s` are of that answer
    off_sketch: int | None = None  # with mode `constrained`: choices that are not the sketch with its holes filled


@dataclass(frozen=True, slots=True)
class Listener:
    """Who waits for an answer: `check` raises what ends the work, `tell` hears events as they come."""

    check: Callable[[], None] = lambda: None
    tell: Callable[[Event], None] | None = None


NOBODY = Listener()


# Of the window, kept for an answer that may be longer: editors ask for up to 2,048 tokens, and few are drawn. Assumed.
_ANSWER_SHARE: Final = 0.5


def run_single(
    context: str, sampling: Sampling, engine: Engine, listener: Listener = NOBODY, ahead: str = ""
) -> CascadeAnswer:
    """Complete `context` with one plain model, cut at the request's stop strings only.

    `ahead` is documentation that the model reads first, if the window has room for it and an answer.

    Raises:
        RequestError: 400, when the context does not fit the window, or for a mode or suffix that the model cannot do.
    """
    if sampling.mode not in (None, Mode.SINGLE):
        raise _unsupported("mode", f"{sampling.mode}: one plain model, no cascade, is served here; leave mode out")
    began = time.perf_counter()
    return _alone(context, sampling, engine, sampling.stop, Route.MODEL, listener, began, ahead=ahead)


def run_cascade(
    context: str,
    sampling: Sampling,
    sketcher: Engine,
    generator: Engine,
    config: CascadeConfig | None = None,
    listener: Listener = NOBODY,
    ahead: str = "",
) -> CascadeAnswer:
    """Complete `context` by sketching first.

    `ahead` is documentation that both models read first, if both windows have room for it and an answer.

    Where the sketcher's samples are the answer, those that voted for the winner come first. A function of its arguments
    alone, timings and cached tokens apart, if the engines are.

    Raises:
        RequestError: 400, when the context does not fit a model's window, or for what a cascade cannot do.
    """
    config = config or CascadeConfig()
    return _run(context, sampling, SketchFirst(sketcher, generator, config), config, listener, ahead)


def run_context_first(
    context: str,
    sampling: Sampling,
    model: Engine,
    config: CascadeConfig | None = None,
    listener: Listener = NOBODY,
    ahead: str = "",
) -> CascadeAnswer:
    """The same with one model that was trained on the view `context_first`; stage two goes on from stage one's prompt.

    Raises:
        RequestError: as `run_cascade`.
    """
    return _run(context, sampling, ContextFirst(model), config or CascadeConfig(), listener, ahead)


def _run(
    context: str, sampling: Sampling, layout: Layout, config: CascadeConfig, listener: Listener, ahead: str
) -> CascadeAnswer:
    mode = sampling.mode or config.mode
    if mode is Mode.SINGLE:
        raise _unsupported("mode", "single: a cascade is served here; leave mode out, or ask for mode=generator_only")
    if mode is Mode.CONSTRAINED and config.routing == "released":
        raise _unsupported("mode", "constrained: this cascade does not tell placeholders from code (routing: released)")
    began = time.perf_counter()
    stops = (*config.stop, *sampling.stop)
    if mode is Mode.GENERATOR_ONLY:
        stops = (*stops, *config.generator_stop)
        return _alone(context, sampling, layout.generator, stops, Route.GENERATOR_ONLY, listener, began, config, ahead)
    if sampling.suffix is not None:
        raise _unsupported("suffix", "a cascade has no sketch of what stands behind; ask for mode=generator_only")
    if sampling.echo and (sampling.logprobs is not None or sampling.max_tokens == 0):
        problem = "with logprobs or max_tokens=0: two stages read the prompt here; ask for mode=generator_only"
        raise _unsupported("echo", problem)
    return _Cascade(context, sampling, layout, config, listener, ahead).run(mode, began)


def _alone(
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
    """Complete `context`, or what stands between it and the suffix, with one model."""
    body, blanks = split_trailing_blanks(context)
    scored = sampling.echo and sampling.logprobs is not None
    if sampling.suffix is not None:
        body, blanks = context, ""
    elif scored or sampling.max_tokens == 0:
        body, blanks = context, ""  # the prompt's tokens are told, so they must be the whole prompt
    prompt = prompt_format.encode_code(engine.tokenizer, ahead + body)
    if ahead and not _has_room(prompt, sampling, engine, stages=1 if config is None else 2):
        prompt = prompt_format.encode_code(engine.tokenizer, body)
    if sampling.suffix is not None:
        prompt = _infill(engine, prompt, sampling.suffix)
    # Room is needed for an answer, if one is asked for.
    check_length(len(prompt) - (sampling.max_tokens == 0), engine.context_tokens)
    work = _work(sampling, prompt, stops, blanks, config)
    teller = _Teller(listener, sampling, config)
    drawn = engine.draw(replace(work, score_prompt=scored), teller.hooks())
    choices = _best(_complete(drawn.samples), sampling, config)
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


class _Cascade:
    """One context on its way through both stages."""

    def __init__(
        self,
        context: str,
        sampling: Sampling,
        layout: Layout,
        config: CascadeConfig,
        listener: Listener,
        ahead: str,
    ) -> None:
        self._sampling, self._layout = sampling, layout
        self._sketcher, self._generator = layout.sketcher, layout.generator
        self._config, self._listener = config, listener
        body, self._blanks = split_trailing_blanks(context)
        self._stops = (*config.stop, *sampling.stop)
        if not ahead or not self._read(ahead + body, documented=True):
            self._read(body, documented=False)

    def _read(self, body: str, *, documented: bool) -> bool:
        """Take `body` for what both models are given; False where documentation leaves no room for an answer."""
        prompts = self._layout.prompts(body, self._blanks)
        if documented and not _has_room(prompts.alone, self._sampling, self._generator, stages=2):
            return False
        # Before sketching, whose cost grows with a prompt that would be refused anyway.
        check_length(len(prompts.alone), self._generator.context_tokens)
        self._prompts = prompts
        return not documented or _has_room(prompts.before_sketch, self._sampling, self._sketcher, stages=2)

    def run(self, mode: Mode, began: float) -> CascadeAnswer:
        """Both stages, as far as they are needed."""
        prompt = self._prompts.before_sketch
        ballot, drawn = self._sketch(prompt, mode)
        chosen = ballot.result()
        timings_s = {"sketch": time.perf_counter() - began}
        answer = CascadeAnswer(
            (),
            Route.SKETCH_ONLY,
            chosen.text,
            chosen.votes,
            chosen.vote_share,
            len(prompt),
            timings_s,
            chosen,
            cached_tokens=drawn.cached_tokens,
            sketch_tokens=drawn.tokens,
        )
        try:
            return self._go_on(answer, chosen, ballot, mode)
        finally:
            del drawn  # held until stage two has its answer, and no longer if there is an error: see its `pin`

    def _go_on(self, answer: CascadeAnswer, chosen: SketchChosen, ballot: Ballot, mode: Mode) -> CascadeAnswer:
        winner, timings_s = ballot.winner, answer.timings_s
        if self._listener.tell is not None:
            self._listener.tell(chosen)
        if mode is Mode.SKETCH_ONLY:
            return self._answer_with_sketches(answer, ballot, answer.route)
        if winner.text.strip() and not self._is_open(winner):
            return self._answer_with_sketches(answer, ballot, Route.SKETCHER)
        began = time.perf_counter()
        choices, second, route = self._fill_in(winner, mode)
        timings_s["generate"] = time.perf_counter() - began
        if choices is None:
            if chosen.undecided and chosen.votes < self._sampling.n:  # they are the answers after all: draw all of them
                began = time.perf_counter()
                ballot, drawn = self._sketch(self._prompts.before_sketch, mode, all_of_them=True)
                timings_s["sketch"] += time.perf_counter() - began
                answer = replace(answer, sketch_tokens=answer.sketch_tokens + drawn.tokens)
            return self._answer_with_sketches(answer, ballot, Route.SKETCHER_EMPTY_GENERATOR)
        held = [choice.keeps_to_template for choice in choices if choice.keeps_to_template is not None]
        off_sketch = held.count(False) if held else None
        given = replace(answer, choices=tuple(choices), route=route, off_sketch=off_sketch)
        return replace(given, completion_tokens=second.tokens)

    def _is_open(self, sketch: Sketch) -> bool:
        """Whether stage two is needed to fill the sketch in."""
        if self._config.routing == "released":
            return prompt_format.released_has_placeholder(sketch.text)
        return bool(sketch.placeholders)

    def _sketch(self, prompt: list[int], mode: Mode, *, all_of_them: bool = False) -> tuple[Ballot, Drawn]:
        wanted = self._config.sketches or self._sampling.drawn
        needed = self._sampling.n
        tokenizer, blanks, stops = self._sketcher.tokenizer, self._blanks, self._stops
        known: dict[tuple[tuple[int, ...], float], Sketch] = {}  # read once, though asked about at every step

        def count(ended: Sequence[tuple[Completion, int]]) -> Ballot:
            ballot = Ballot(wanted)
            for sample, votes in ended:
                key = (sample.ids, sample.mean_logprob)
                if key not in known:
                    known[key] = read_sketch(tokenizer, sample, blanks, stops)
                ballot.add(known[key], votes)
            return ballot

        def enough(ended: Sequence[tuple[Completion, int]], begun: Sequence[tuple[tuple[int, ...], int]]) -> bool:
            ballot = count(ended)
            winner, votes = ballot.winner, ballot.votes_of(ballot.winner)
            fills_in = self._is_open(winner) or not winner.text.strip()
            if votes < needed and (mode is Mode.SKETCH_ONLY or not fills_in):
                return False
            if not ballot.may_be_decided([more for _, more in begun]):
                return False
            return ballot.is_decided_for([(read_beginning(tokenizer, ids, blanks, stops), more) for ids, more in begun])

        work = _work(self._sampling, prompt, stops, blanks, self._config)
        work = replace(work, n=wanted, logprobs=self._sampling.logprobs, code_only=False)
        work = replace(work, stop_token_ids=work.stop_token_ids | self._layout.sketch_ends)
        work = replace(work, comes_again=self._layout.begins_alike)
        drawn = self._sketcher.draw(work, Hooks(self._listener.check, enough=None if all_of_them else enough))
        return count([(sample, 1) for sample in drawn.samples if sample is not None]), drawn

    def _fill_in(self, winner: Sketch, mode: Mode) -> tuple[list[Completion] | None, Drawn, Route]:
        """The generator's answers, None if all are empty."""
        pair = self._pair(winner) if winner.text.strip() else None
        route = Route.GENERATOR_EMPTY_SKETCH
        template: Template | None = None
        draft: tuple[int, ...] = ()
        if winner.text.strip():
            route = Route.GENERATOR_LONG_SKETCH if pair is None else Route.GENERATOR
            if self._generator.takes_drafts:
                draft = drafts.source(self._generator.tokenizer, self._blanks, winner.text, winner.placeholders)
            if mode is Mode.CONSTRAINED:
                template = self._template(winner)
                route = Route.CONSTRAINED if pair is not None and template is not None else route
        stops = (*self._stops, *self._config.generator_stop)
        prompt = self._prompts.alone if pair is None else pair
        work = _work(self._sampling, prompt, stops, self._blanks, self._config)
        work = replace(work, template=template, draft=draft)
        teller = _Teller(self._listener, self._sampling, self._config, holds_blanks=True)
        drawn = self._generator.draw(work, teller.hooks())
        choices = _best(_complete(drawn.samples), self._sampling, self._config)
        if all(not choice.text.strip() for choice in choices):
            return None, drawn, route
        teller.finish(choices)
        return choices, drawn, route

    def _template(self, winner: Sketch) -> Template | None:
        """What an answer must be; None where the generator's own stops leave nothing of the sketch.

        A sketch that ended because it was long enough is no whole one: what comes behind it is the generator's choice.
        """
        text = winner.text[: first_stop(winner.text, self._config.generator_stop)].rstrip()
        if not text:
            return None
        is_cut = text == winner.text and winner.completion.finish_reason == "length"
        held = [place for place in winner.placeholders if place.end <= len(text)]
        return Template.of(self._blanks, text, held, self._config.least_share, is_cut=is_cut)

    def _answer_with_sketches(self, answer: CascadeAnswer, ballot: Ballot, route: Route) -> CascadeAnswer:
        choices = ballot.samples(self._sampling.n)
        _Teller(self._listener, self._sampling, self._config).finish(choices)
        tokens = sum(choice.tokens for choice in choices)
        return replace(answer, choices=tuple(choices), route=route, completion_tokens=tokens)

    def _pair(self, winner: Sketch) -> list[int] | None:
        """The generator's prompt of sketch and context; None when the window cannot hold them and an answer."""
        own = len(prompt_format.encode_sketch(self._generator.tokenizer, winner.text, winner.placeholders))
        pair = self._prompts.before_code(winner)
        # The answer fills the sketch's placeholders: room for twice its tokens is assumed to do.
        room = min(self._sampling.max_tokens, 2 * own) + len(self._blanks)
        return pair if len(pair) + room <= self._generator.context_tokens else None


def _has_room(prompt: Sequence[int], sampling: Sampling, engine: Engine, stages: int) -> bool:
    """Whether a prompt with documentation leaves room: a second stage's holds the sketch too, about an answer long."""
    wanted = sampling.max_tokens * (2 * stages - 1)
    return len(prompt) + min(wanted, int(engine.context_tokens * _ANSWER_SHARE)) <= engine.context_tokens


class _Teller:
    """Passes the text of choices on as events, as it is drawn where that can be, and whole at the end."""

    def __init__(
        self, listener: Listener, sampling: Sampling, config: CascadeConfig | None, *, holds_blanks: bool = False
    ) -> None:
        """With `holds_blanks`, nothing is told before some text is more than blanks."""
        self._listener = listener
        ranked = config is not None and config.rank == "likelihood"
        # Which samples will be given, and in what order, is known only at the end.
        self._streams = listener.tell is not None and sampling.drawn == sampling.n and not ranked
        self._holds = holds_blanks
        self._held: list[TextDrawn] = []
        self._ended: set[int] = set()

    def hooks(self) -> Hooks:
        """What the engine is to call."""
        return Hooks(check=self._listener.check, on_text=self._on_text, streams_text=self._streams)

    def _on_text(self, index: int, text: str, reason: str | None) -> None:
        if reason is not None:
            self._ended.add(index)
        self._held.append(TextDrawn(index, text, reason))
        self._holds = self._holds and not text.strip()
        if not self._holds:
            self._flush()

    def _flush(self) -> None:
        held, self._held = self._held, []
        for event in held:
            assert self._listener.tell is not None
            self._listener.tell(event)

    def finish(self, choices: Sequence[Completion]) -> None:
        """Tell what was not told yet of `choices`, which are final."""
        if self._listener.tell is None:
            return
        self._flush()
        for index, choice in enumerate(choices):
            if index not in self._ended:
                self._listener.tell(TextDrawn(index, choice.text, choice.finish_reason))


def _work(
    sampling: Sampling, prompt: Sequence[int], stops: Sequence[str], blanks: str, config: CascadeConfig | None
) -> Work:
    return Work(
        tuple(prompt),
        n=sampling.drawn,
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=sampling.seed,
        stop=tuple(stop for stop in stops if stop),
        stop_token_ids=frozenset(sampling.stop_token_ids),
        start=blanks,
        code_only=True,
        logprobs=sampling.logprobs,
        streams=None if config is None else config.reseed_every,
    )


def _complete(samples: Sequence[Completion | None]) -> list[Completion]:
    complete = [sample for sample in samples if sample is not None]
    assert len(complete) == len(samples), "only a vote may leave samples undrawn"
    return complete


def _best(samples: list[Completion], sampling: Sampling, config: CascadeConfig | None) -> list[Completion]:
    """The samples that are given: of more than are asked for the likeliest, in the order that the operator chose."""
    ranked = sorted(samples, key=lambda sample: -sample.mean_logprob)[: sampling.n]
    if len(samples) > sampling.n or (config is not None and config.rank == "likelihood"):
        return ranked
    return samples


def _infill(engine: Engine, prefix: Sequence[int], suffix: str) -> list[int]:
    if engine.infill_tokens is None:
        raise _unsupported("suffix", "this model was not trained to fill in the middle")
    before_prefix, before_suffix, before_middle = engine.infill_tokens
    behind = prompt_format.encode_code(engine.tokenizer, suffix)
    return [before_prefix, *prefix, before_suffix, *behind, before_middle]


def _unsupported(param: str, problem: str) -> RequestError:
    return RequestError(400, f"{param} {problem}.", param, "unsupported_value")
