"""The JSON of OpenAI's answer to `POST /v1/completions`, whole or as a stream of chunks.

In: answers, or events as they come. Out: pydantic models. Beside OpenAI's fields there is `cert`: sketch, votes, route
and timings. A stream has it twice: early, on a chunk with empty text, with the winning sketch and its rivals; and on
the last chunk, with the usage. Clients that know only OpenAI's fields read an empty text.

With `logprobs`, choices are streamed whole at the end, since log-probabilities are known only then.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from pydantic import BaseModel, Field

from cert_ray.serving.answers import CascadeAnswer
from cert_ray.serving.engines import Completion, TokenLogprobs
from cert_ray.serving.events import Event, SketchChosen
from cert_ray.serving.sampling import Sampling


class Span(BaseModel):
    """A placeholder of a sketch: characters from `start` to `end`, and its kind."""

    start: int
    end: int
    kind: str


class Candidate(BaseModel):
    """A sketch that got votes."""

    text: str
    placeholders: list[Span]
    votes: int
    mean_logprob: float


class Vote(BaseModel):
    """The vote over `sketches` samples, the winner first; `undecided` of them were unfinished when it was decided."""

    sketches: int
    undecided: int
    candidates: list[Candidate]


class CertTrace(BaseModel):
    """How an answer came about. `timings_s` is in seconds by stage; `seed` repeats the answer."""

    route: str | None  # None while it is not known yet
    sketch: str | None
    sketch_votes: int
    vote_share: float
    seed: int
    timings_s: dict[str, float]
    vote: Vote | None = None
    model: str | None = None  # the model that answered, where the request did not name one
    sketch_tokens: int = 0
    off_sketch: int | None = None  # with mode constrained: choices that are not the sketch with its holes filled
    from_cache: bool = False
    prompt_index: int = 0
    # Traces of the second and further prompts of the request, in order.
    others: list[CertTrace] = Field(default_factory=list)


class Logprobs(BaseModel):
    """OpenAI's `logprobs` of one choice."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class Choice(BaseModel):
    """One completion, or a piece of one; `index` counts through all prompts, as OpenAI does."""

    index: int
    text: str
    logprobs: Logprobs | None = None
    finish_reason: Literal["stop", "length"] | None


class PromptTokensDetails(BaseModel):
    """How many of the prompt's tokens were not read again."""

    cached_tokens: int


class Usage(BaseModel):
    """Tokens of the prompts and of all samples drawn, without sketches (see `cert.sketch_tokens`)."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionResponse(BaseModel):
    """A response body, or a chunk of one."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | None = None
    cert: CertTrace | None = None


class ResponseWriter:
    """Writes one request's response. `models` are the models that answer, one per prompt."""

    def __init__(self, model: str, models: Sequence[str], prompts: Sequence[str], sampling: Sampling) -> None:
        self._model, self._models, self._prompts, self._sampling = model, models, prompts, sampling
        self._id, self._created = f"cmpl-{uuid.uuid4().hex}", int(time.time())
        self._begun: set[int] = set()

    def whole(self, answers: Sequence[CascadeAnswer]) -> CompletionResponse:
        """The response body for `answers`, one per prompt, in order."""
        choices = list(self._choices(answers))
        return self._chunk(choices, usage=write_usage(answers), cert=self._trace(answers))

    def chunks(self, prompt: int, event: Event) -> Iterator[CompletionResponse]:
        """The chunks that report `event` of prompt number `prompt`."""
        if isinstance(event, SketchChosen):
            empty = Choice(index=prompt * self._sampling.n, text="", finish_reason=None)
            yield self._chunk([empty], cert=self._early_trace(prompt, event))
        elif self._sampling.logprobs is None:
            index = prompt * self._sampling.n + event.index
            text = self._echo(prompt, index) + event.text
            if text or event.finish_reason is not None:
                reason: Any = event.finish_reason
                yield self._chunk([Choice(index=index, text=text, finish_reason=reason)])

    def last_chunks(self, answers: Sequence[CascadeAnswer], include_usage: bool) -> Iterator[CompletionResponse]:
        """What is known only at the end: choices with log-probabilities, and the usage if asked for."""
        if self._sampling.logprobs is not None:
            yield from (self._chunk([choice]) for choice in self._choices(answers))
        if include_usage:
            yield self._chunk([], usage=write_usage(answers), cert=self._trace(answers))

    def _chunk(
        self, choices: list[Choice], usage: Usage | None = None, cert: CertTrace | None = None
    ) -> CompletionResponse:
        return CompletionResponse(
            id=self._id, created=self._created, model=self._model, choices=choices, usage=usage, cert=cert
        )

    def _echo(self, prompt: int, index: int) -> str:
        """The prompt, if it is wanted and choice `index` has just begun."""
        if not self._sampling.echo or index in self._begun:
            return ""
        self._begun.add(index)
        return self._prompts[prompt]

    def _choices(self, answers: Sequence[CascadeAnswer]) -> Iterator[Choice]:
        for prompt, answer in enumerate(answers):
            shown = self._prompts[prompt] if self._sampling.echo else ""
            for place, completion in enumerate(answer.choices):
                yield Choice(
                    index=prompt * self._sampling.n + place,
                    text=shown + completion.text,
                    logprobs=self._logprobs(shown, answer.prompt_logprobs, completion),
                    finish_reason=completion.finish_reason,
                )

    def _logprobs(self, shown: str, of_prompt: TokenLogprobs | None, completion: Completion) -> Logprobs | None:
        if completion.logprobs is None:
            return None
        parts = [(of_prompt, 0)] if of_prompt is not None and shown else []
        parts.append((completion.logprobs, len(shown)))
        return Logprobs(
            tokens=[token for part, _ in parts for token in part.tokens],
            token_logprobs=[number for part, _ in parts for number in part.token_logprobs],
            top_logprobs=[top for part, _ in parts for top in part.top_logprobs],
            text_offset=[offset + shift for part, shift in parts for offset in part.text_offset],
        )

    def _early_trace(self, prompt: int, chosen: SketchChosen) -> CertTrace:
        return CertTrace(
            route=None,
            sketch=chosen.text,
            sketch_votes=chosen.votes,
            vote_share=chosen.vote_share,
            seed=self._sampling.seed,
            timings_s={},
            vote=_vote(chosen),
            model=self._models[prompt],
            prompt_index=prompt,
        )

    def _trace(self, answers: Sequence[CascadeAnswer]) -> CertTrace:
        first, *others = [
            CertTrace(
                route=answer.route.value,
                sketch=answer.sketch,
                sketch_votes=answer.sketch_votes,
                vote_share=answer.vote_share,
                seed=self._sampling.seed,
                timings_s={stage: round(seconds, 6) for stage, seconds in answer.timings_s.items()},
                vote=_vote(answer.chosen) if answer.chosen is not None else None,
                model=self._models[prompt],
                sketch_tokens=answer.sketch_tokens,
                off_sketch=answer.off_sketch,
                from_cache=answer.from_cache,
                prompt_index=prompt,
            )
            for prompt, answer in enumerate(answers)
        ]
        return first.model_copy(update={"others": others})


def _vote(chosen: SketchChosen) -> Vote:
    candidates = [
        Candidate(
            text=candidate.text,
            placeholders=[Span(start=span.start, end=span.end, kind=span.kind) for span in candidate.placeholders],
            votes=candidate.votes,
            mean_logprob=candidate.mean_logprob,
        )
        for candidate in chosen.candidates
    ]
    return Vote(sketches=chosen.sketches, undecided=chosen.undecided, candidates=candidates)


def write_usage(answers: Sequence[CascadeAnswer]) -> Usage:
    """The tokens of `answers` together."""
    prompt_tokens = sum(answer.prompt_tokens for answer in answers)
    completion_tokens = 0
    for answer in answers:
        drawn = answer.completion_tokens
        completion_tokens += sum(choice.tokens for choice in answer.choices) if drawn is None else drawn
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(answer.cached_tokens for answer in answers)),
    )
