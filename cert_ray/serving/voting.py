"""The vote over sketches: which sketch most samples agree on, and when no other can win any more.

In: samples of the sketcher, and what is known of those still being drawn. Out: the winner, and a `SketchChosen` that
reports the whole vote. Pure.
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
    """One sample of the sketcher, read: its text as the vote counts it, and the sample with its text cut."""

    text: str
    placeholders: tuple[Placeholder, ...]
    completion: Completion

    @property
    def key(self) -> _Key:
        """What makes two sketches the same. A placeholder differs from the same word written as code."""
        return self.text, self.placeholders

    @property
    def is_code(self) -> bool:
        """Whether it is an answer as it stands: not blank, and without placeholders."""
        return bool(self.text.strip()) and not self.placeholders


def read_sketch(tokenizer: Tokenizer, sample: Completion, blanks: str, stops: Sequence[str]) -> Sketch:
    """The sample's tokens as text and placeholder spans, cut at the first stop string.

    The blanks that the prompt ended in are removed from its start. As during drawing, stop strings are looked for only
    in the code between placeholders: a placeholder is never cut.
    """
    decoded = prompt_format.decode_sketch(tokenizer, sample.ids)
    start = len(decoded.text) - len(drop_start(decoded.text, blanks))
    shown, places = decoded.text[start:], moved(decoded.placeholders, -start)
    shown = shown[: first_stop(_hidden(shown, places), stops)]
    text = shown.rstrip()  # trailing blanks do not make another sketch
    placeholders = tuple(place for place in places if place.end <= len(text))
    return Sketch(text, placeholders, replace(sample, text=shown))


def read_beginning(tokenizer: Tokenizer, ids: Sequence[int], blanks: str, stops: Sequence[str]) -> str:
    """The text that a sample's sketch is sure to begin with, whatever is drawn after these first tokens."""
    decoded = prompt_format.decode_sketch(tokenizer, ids)
    text = drop_start(decoded.text, blanks)
    hidden = _hidden(text, moved(decoded.placeholders, len(text) - len(decoded.text)))
    return text[: len(settled(hidden, stops))].rstrip()


def _hidden(text: str, placeholders: Sequence[Placeholder]) -> str:
    """`text` with each character of a placeholder replaced by one that no code holds."""
    parts, behind = [], 0
    for place in placeholders:
        parts += [text[behind : place.start], "\0" * (place.end - place.start)]
        behind = place.end
    return "".join([*parts, text[behind:]])


class Ballot:
    """Votes of `wanted` samples, some of which may still be undrawn. Ask for a winner only once there is a vote."""

    def __init__(self, wanted: int) -> None:
        self._wanted = wanted
        self._sketches: list[tuple[Sketch, int]] = []
        self._votes: dict[_Key, int] = {}
        self._best: dict[_Key, Sketch] = {}  # the likeliest sample of each sketch

    def add(self, sketch: Sketch, votes: int = 1) -> None:
        """Count a sketch that `votes` samples drew."""
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
        """The sketches, most votes first. Ties go to the likelier best sample, then to the one drawn first."""
        return sorted(self._best.values(), key=lambda best: (-self._votes[best.key], -best.completion.mean_logprob))

    @property
    def winner(self) -> Sketch:
        """The sketch that leads now."""
        return self._ordered()[0]

    def may_be_decided(self, begun: Sequence[int]) -> bool:
        """Whether `is_decided_for` can hold, judged by how many samples began alike: cheap, as it reads no sample."""
        first, *others = sorted(self._votes.values(), reverse=True)
        return first > max((*others[:1], *begun), default=0) + self._wanted - self._counted - sum(begun)

    def is_decided_for(self, begun: Sequence[tuple[str, int]]) -> bool:
        """Whether the winner wins whatever the samples not yet counted turn out to be.

        `begun` holds the known beginnings of unfinished sketches, each with its number of samples; nothing is known of
        the remaining samples. A sample can only vote for a sketch that starts with its own beginning: one that already
        has votes, or a new one, which all samples with a matching beginning may share.
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
        """The whole vote."""
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
        """`n` of the samples: the winner's first, then the others in the order drawn or, if `ranked`, likeliest first.

        `code_only`, for a winner that is code, leaves out samples that are blank or hold a placeholder. If there are
        fewer than `n`, they are repeated: with `code_only` the winner's, else all of them.
        """
        elected = self.winner.key
        known = [entry for entry in self._sketches if not code_only or entry[0].is_code]
        known.sort(key=lambda one: (one[0].key != elected, -one[0].completion.mean_logprob if ranked else 0.0))
        drawn = [sketch.completion for sketch, votes in known for _ in range(votes)]
        again = drawn[: self._votes[elected]] if code_only else drawn
        assert again, "only a winner that is code is given as code"
        return [*drawn, *(again[place % len(again)] for place in range(n - len(drawn)))][:n]
