"""From a request to an engine's work, and from the engine's samples to the choices given: which ones, in what order.

In: sampling options and a prompt's tokens; samples. Out: `Work`; choices, passed to a `Listener` as they become final.
The same code serves a plain model and each stage of a cascade. Nothing is drawn in here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from cert_ray.serving.answers import Listener
from cert_ray.serving.cascade_config import CascadeConfig
from cert_ray.serving.engines import Completion, Engine, Hooks, Work
from cert_ray.serving.events import TextDrawn
from cert_ray.serving.sampling import Sampling

# Share of the window reserved for a long answer: editors ask for up to 2,048 tokens, but few are drawn. Assumed.
_ANSWER_SHARE: Final = 0.5


def has_room(prompt: Sequence[int], sampling: Sampling, engine: Engine, stages: int) -> bool:
    """Whether a prompt with documentation leaves room. A second stage's also holds the sketch, about an answer long."""
    wanted = sampling.max_tokens * (2 * stages - 1)
    return len(prompt) + min(wanted, int(engine.context_tokens * _ANSWER_SHARE)) <= engine.context_tokens


def work_for(
    sampling: Sampling, prompt: Sequence[int], stops: Sequence[str], blanks: str, config: CascadeConfig | None
) -> Work:
    """The work that a request asks of an engine: samples of code after `prompt`, which must begin with `blanks`."""
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


def choices_of(
    samples: Sequence[Completion | None], sampling: Sampling, config: CascadeConfig | None
) -> list[Completion]:
    """The samples that are given: the `n` likeliest if more were drawn, in the order that the operator chose."""
    drawn = [sample for sample in samples if sample is not None]
    assert len(drawn) == len(samples), "only a vote may leave samples undrawn"
    if are_ranked(sampling, config):
        return sorted(drawn, key=lambda sample: -sample.mean_logprob)[: sampling.n]
    return drawn


def are_ranked(sampling: Sampling, config: CascadeConfig | None) -> bool:
    """Whether the likeliest choices come first, so that their order is known only at the end."""
    return sampling.drawn > sampling.n or (config is not None and config.rank == "likelihood")


class Teller:
    """Passes the text of choices on as events: as it is drawn where possible, and the rest at the end."""

    def __init__(
        self, listener: Listener, sampling: Sampling, config: CascadeConfig | None, *, holds_blanks: bool = False
    ) -> None:
        """With `holds_blanks`, nothing is passed on until some text is more than blanks."""
        self._listener = listener
        self._streams = listener.tell is not None and not are_ranked(sampling, config)
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
        """Pass on what is still missing of `choices`, which are final."""
        if self._listener.tell is None:
            return
        self._flush()
        for index, choice in enumerate(choices):
            if index not in self._ended:
                self._listener.tell(TextDrawn(index, choice.text, choice.finish_reason))
