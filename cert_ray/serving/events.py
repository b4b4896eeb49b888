"""What can be told of an answer while it is being drawn: the sketch that won, then text, piece by piece.

Out: frozen values, in this order for each prompt: at most one `SketchChosen`, then `TextDrawn`s. Nothing is drawn and
nothing is sent in here. What is told is never taken back: the pieces of a choice, joined, are its text.
"""

from __future__ import annotations

from dataclasses import dataclass

from cert_ray.sketching import Placeholder


@dataclass(frozen=True, slots=True)
class SketchCandidate:
    """One sketch that got votes. `mean_logprob` is that of its likeliest sample, which decides ties."""

    text: str
    placeholders: tuple[Placeholder, ...]
    votes: int
    mean_logprob: float


@dataclass(frozen=True, slots=True)
class SketchChosen:
    """The vote's result. `placeholders` are spans of `text`.

    `votes` are of `sketches` samples asked for. Where the vote stopped early, since no other sketch could win any
    more, `undecided` samples had not ended. `vote_share` is `votes / sketches`: the least that the winner has, since
    the undecided might have agreed. `candidates` are ordered as the vote orders them, the winner first, and their votes
    add up to `sketches - undecided`.
    """

    text: str
    placeholders: tuple[Placeholder, ...]
    votes: int
    vote_share: float
    sketches: int
    candidates: tuple[SketchCandidate, ...]
    undecided: int = 0


@dataclass(frozen=True, slots=True)
class TextDrawn:
    """More text of choice `index` (0 to n - 1 within its prompt) that no stop string can take back any more.

    `finish_reason` is None but in the last event of a choice, whose `text` may be empty.
    """

    index: int
    text: str
    finish_reason: str | None = None


Event = SketchChosen | TextDrawn
