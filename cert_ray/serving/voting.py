"""The vote over sketches: which sketch most samples agree on, and from when on no other can win.

In: samples of the sketcher, and what is known of those that have not ended. Out: the winner, and a `SketchChosen` that
tells the whole vote. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tokenizers import Tokenizer

from cert_ray.serving.boundaries import drop_start, first_stop, settled
from cert_ray.serving.engines import Completion
from cert_ray.serving.events import SketchCandidate, SketchChosen
from cert_ray.sketching import Placeholder, moved, prompt_format

_Key = tuple[str, tuple[Placeholder, ...]]


@dataclass(frozen=True, slots=True)
class Sketch:
    """One sample of the sketcher, read: its text as a vote counts it, and the sample with its text cut."""

    text: str
    placeholders: tuple[Placeholder, ...]
    completion: Completion

    @property
    def key(self) -> _Key:
        """What makes two sketches the same: a placeholder is not the word that spells it."""
        return self.text, self.placeholders

    @property
    def is_code(self) -> bool:
        """Whether it is an answer as it stands."""
        return bool(self.text.strip()) and not self.placeholders


def read_sketch(tokenizer: Tokenizer, sample: Completion, blanks: str, stops: Sequence[str]) -> Sketch:
    """The sample's tokens as text and placeholder spans, cut; the blanks that the prompt ended in are not its own.

    Stop strings are looked for in the code between placeholders, as while it was drawn: a placeholder is never cut.
    """
    decoded = prompt_format.decode_sketch(tokenizer, sample.ids)
    start = len(decoded.text) - len(drop_start(decoded.text, blanks))
    shown, places = decoded.text[start:], moved(decoded.placeholders, -start)
    shown = shown[: first_stop(_hidden(shown, places), stops)]
    text = shown.rstrip()  # trailing blanks make no other sketch
    placeholders = tuple(place for place in places if place.end <= len(text))
    return Sketch(text, placeholders, replace(sample, text=shown))


def read_beginning(tokenizer: Tokenizer, ids: Sequence[int], blanks: str, stops: Sequence[str]) -> str:
    """The text that a sample's sketch begins with, whatever is drawn behind these first tokens of it."""
    decoded = prompt_format.decode_sketch(tokenizer, ids)
    text = drop_start(decoded.text, blanks)
    hidden = _hidden(text, moved(decoded.placeholders, len(text) - len(decoded.text)))
    return text[: len(settled(hidden, stops))].rstrip()


def _hidden(text: str, placeholders: Sequence[Placeholder]) -> str:
    """`text` with a character that no code holds in place of each one of a placeholder's word."""
    parts, behind = [], 0
    for place in placeholders:
        parts += [text[behind : place.start], "\0" * (place.end - place.start)]
        behind = place.end
    return "".join([*parts, text[behind:]])


class Ballot:
    """Votes of `wanted` samples, of which some may still be drawn. Ask for a winner once there is a vote."""

    def __init__(self, wanted: int) -> None:
        self._wanted = wanted
        self._sketches: list[tuple[Sketch, int]] = []
        self._votes: dict[_Key, int] = {}
        self._best: dict[_Key, Sketch] = {}  # the likeliest sample of each sketch

    def add(self, sketch: Sketch, votes: int = 1) -> None:
        """Count a sketch that so many samples drew."""
        self._sketches.append((sketch, votes))
        self._votes[sketch.key] = self._votes.get(sketch.key, 0) + votes
        best = self._best.get(sketch.key)
        if best is None or sketch.completion.mean_logprob > best.completion.mean_logprob:
            self._best[sketch.key] = sketch

    def votes_of(self, sketch: Sketch) -> int:
        """Samples that agree on `sketch`."""
        return self._votes[sketch.key]

    @property
    def _counted(self) -> int:
        return sum(self._votes.values())

    def _ordered(self) -> list[Sketch]:
        """The sketches, most votes first; among equals the likeliest by its best sample, then the first drawn."""
        return sorted(self._best.values(), key=lambda best: (-self._votes[best.key], -best.completion.mean_logprob))

    @property
    def winner(self) -> Sketch:
        """The sketch that wins as things stand."""
        return self._ordered()[0]

    def may_be_decided(self, begun: Sequence[int]) -> bool:
        """Whether `is_decided_for` can hold, by how many samples began alike: that costs no reading of them."""
        first, *others = sorted(self._votes.values(), reverse=True)
        return first > max((*others[:1], *begun), default=0) + self._wanted - self._counted - sum(begun)

    def is_decided_for(self, begun: Sequence[tuple[str, int]]) -> bool:
        """Whether the winner wins whatever the samples that were not counted yet will say.

        Of those in `begun` it is known how their sketches begin, and of how many samples; of the others nothing.
        A sample adds a vote only to a sketch that begins as its own does: one that has votes, or one that is as long as
        the longest of those that begin alike.
        """
        if not self._votes:
            return False
        first = self.winner.key
        rivals = [(text, votes) for (text, places), votes in self._votes.items() if (text, places) != first]
        rivals += [(text, 0) for text, _ in begun]
        joined = [votes + sum(more for start, more in begun if text.startswith(start)) for text, votes in rivals]
        unknown = self._wanted - self._counted - sum(more for _, more in begun)
        return self._votes[first] > max(joined, default=0) + unknown

    def result(self) -> SketchChosen:
        """The vote, told whole."""
        candidates = tuple(
            SketchCandidate(best.text, best.placeholders, self._votes[best.key], best.completion.mean_logprob)
            for best in self._ordered()
        )
        first = candidates[0]
        return SketchChosen(
            first.text,
            first.placeholders,
            first.votes,
            first.votes / self._wanted,
            self._wanted,
            candidates,
            self._wanted - self._counted,
        )

    def samples(self, n: int, *, code_only: bool = False, ranked: bool = False) -> list[Completion]:
        """`n` of the samples: the winner's, then the others as they were drawn, or `ranked` the likeliest first.

        With `code_only` no sample is given that holds a placeholder or nothing, for a winner that holds neither. Where
        there are fewer than `n`, the winner's come again, or without `code_only` all of them.
        """
        elected = self.winner.key
        known = [entry for entry in self._sketches if not code_only or entry[0].is_code]
        known.sort(key=lambda one: (one[0].key != elected, -one[0].completion.mean_logprob if ranked else 0.0))
        drawn = [sketch.completion for sketch, votes in known for _ in range(votes)]
        again = drawn[: self._votes[elected]] if code_only else drawn
        assert again, "only a winner that is code is given as code"
        return [*drawn, *(again[place % len(again)] for place in range(n - len(drawn)))][:n]
