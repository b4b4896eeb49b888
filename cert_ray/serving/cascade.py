"""Sketch, vote, fill in: the inference of the paper ("Inference", steps 1 to 4), pure over `Engine`s.

In: a context and sampling options. Out: a `CascadeAnswer`: the choices, the winning sketch, its votes, the route. No
HTTP, no Ray. Whether stage two is needed is read from special token ids, never from the spelling of a word: code that
says `float` or `to_string` is code. The vote ends as soon as the beginnings of samples show that no other sketch can
win, provided that the winner needs stage two or has as many samples as answers are asked for.

`layouts` says what each stage reads: two models in the paper's layout, or one that reads the context first. The stages
are called sketcher and generator, whatever model they are.

With mode `constrained`, the generator's answer must be the sketch with its placeholders filled (`constraints.py`), as
long as the generator finds that likely enough.

Blanks at the end of the context are handled by `boundaries`; answers are what comes after them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from cert_ray.serving import drafts
from cert_ray.serving.answers import NOBODY, CascadeAnswer, Listener, Route, unsupported
from cert_ray.serving.boundaries import first_stop, split_trailing_blanks
from cert_ray.serving.cascade_config import CascadeConfig
from cert_ray.serving.choices import Teller, are_ranked, choices_of, has_room, work_for
from cert_ray.serving.constraints import Template
from cert_ray.serving.engines import Completion, Drawn, Engine, Hooks, check_length
from cert_ray.serving.events import SketchChosen
from cert_ray.serving.layouts import ContextFirst, Layout, SketchFirst
from cert_ray.serving.sampling import Mode, Sampling
from cert_ray.serving.single import complete_alone
from cert_ray.serving.voting import Ballot, Sketch, read_beginning, read_sketch
from cert_ray.sketching import prompt_format


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

    If the sketcher's samples are the answer, those that voted for the winner come first. If the winner holds no
    placeholder, samples that do are left out, unless `routing` is `released`. If the engines are pure functions, so is
    this, timings and cached tokens apart.

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
    """The same with one model trained on the view `context_first`; stage two continues stage one's prompt.

    Raises:
        RequestError: as `run_cascade`.
    """
    return _run(context, sampling, ContextFirst(model), config or CascadeConfig(), listener, ahead)


def _run(
    context: str, sampling: Sampling, layout: Layout, config: CascadeConfig, listener: Listener, ahead: str
) -> CascadeAnswer:
    mode = sampling.mode or config.mode
    if mode is Mode.SINGLE:
        raise unsupported(
            "mode",
            "single: this server has a cascade, not one plain model; leave mode out, or ask for mode=generator_only",
        )
    if mode is Mode.CONSTRAINED and config.routing == "released":
        raise unsupported("mode", "constrained: this cascade cannot tell placeholders from code (routing: released)")
    began = time.perf_counter()
    stops = (*config.stop, *sampling.stop)
    if mode is Mode.GENERATOR_ONLY:
        stops = (*stops, *config.generator_stop)
        return complete_alone(
            context, sampling, layout.generator, stops, Route.GENERATOR_ONLY, listener, began, config, ahead
        )
    if sampling.suffix is not None:
        raise unsupported("suffix", "is not for a cascade, which cannot sketch it; ask for mode=generator_only")
    if sampling.echo and (sampling.logprobs is not None or sampling.max_tokens == 0):
        problem = "with logprobs or max_tokens=0 needs one stage, not a cascade's two; ask for mode=generator_only"
        raise unsupported("echo", problem)
    return _Cascade(context, sampling, layout, config, listener, ahead).run(mode, began)


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
        """Build the prompts from `body`; False if documentation in it leaves no room for an answer."""
        prompts = self._layout.prompts(body, self._blanks)
        if documented and not has_room(prompts.alone, self._sampling, self._generator, stages=2):
            return False
        # Before sketching, whose cost grows with the prompt: one that is too long would be refused anyway.
        check_length(len(prompts.alone), self._generator.context_tokens)
        self._prompts = prompts
        return not documented or has_room(prompts.before_sketch, self._sampling, self._sketcher, stages=2)

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
            del drawn  # held for its `pin` until stage two has its answer; after an error, let go at once

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
            if chosen.undecided and chosen.votes < self._sampling.n:  # sketches are the answers after all: draw all
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
        known: dict[tuple[tuple[int, ...], float], Sketch] = {}  # read once, though needed at every step

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

        work = work_for(self._sampling, prompt, stops, blanks, self._config)
        work = replace(work, n=wanted, logprobs=self._sampling.logprobs, code_only=False)
        work = replace(work, stop_token_ids=work.stop_token_ids | self._layout.sketch_ends)
        work = replace(work, comes_again=self._layout.begins_alike)
        drawn = self._sketcher.draw(work, Hooks(self._listener.check, enough=None if all_of_them else enough))
        return count([(sample, 1) for sample in drawn.samples if sample is not None]), drawn

    def _fill_in(self, winner: Sketch, mode: Mode) -> tuple[list[Completion] | None, Drawn, Route]:
        """The generator's answers; None if all are empty."""
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
        work = work_for(self._sampling, prompt, stops, self._blanks, self._config)
        work = replace(work, template=template, draft=draft)
        teller = Teller(self._listener, self._sampling, self._config, holds_blanks=True)
        drawn = self._generator.draw(work, teller.hooks())
        choices = choices_of(drawn.samples, self._sampling, self._config)
        if all(not choice.text.strip() for choice in choices):
            return None, drawn, route
        teller.finish(choices)
        return choices, drawn, route

    def _template(self, winner: Sketch) -> Template | None:
        """What an answer must match; None if the generator's own stops leave nothing of the sketch.

        A sketch that was cut for its length is incomplete: what comes after it is up to the generator.
        """
        text = winner.text[: first_stop(winner.text, self._config.generator_stop)].rstrip()
        if not text:
            return None
        is_cut = text == winner.text and winner.completion.finish_reason == "length"
        held = [place for place in winner.placeholders if place.end <= len(text)]
        return Template.of(self._blanks, text, held, self._config.least_share, is_cut=is_cut)

    def _answer_with_sketches(self, answer: CascadeAnswer, ballot: Ballot, route: Route) -> CascadeAnswer:
        code_only = route is Route.SKETCHER and self._config.routing != "released"
        ranked = are_ranked(self._sampling, self._config)
        choices = ballot.samples(self._sampling.n, code_only=code_only, ranked=ranked)
        Teller(self._listener, self._sampling, self._config).finish(choices)
        tokens = sum(choice.tokens for choice in choices)
        return replace(answer, choices=tuple(choices), route=route, completion_tokens=tokens)

    def _pair(self, winner: Sketch) -> list[int] | None:
        """The generator's prompt of sketch and context; None when the window cannot hold them and an answer."""
        own = len(prompt_format.encode_sketch(self._generator.tokenizer, winner.text, winner.placeholders))
        pair = self._prompts.before_code(winner)
        # The answer fills the sketch's placeholders. Assumed: twice the sketch's tokens is room enough.
        room = min(self._sampling.max_tokens, 2 * own) + len(self._blanks)
        return pair if len(pair) + room <= self._generator.context_tokens else None
