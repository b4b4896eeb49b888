"""What can be reported of an answer while it is drawn: the winning sketch, then text, piece by piece.

Out: frozen values, in this order for each prompt: at most one `SketchChosen`, then `TextDrawn`s. Nothing is drawn or
sent in here. What was reported is never taken back: the pieces of a choice, joined, are its text.
"""

from __future__ import annotations

from dataclasses import dataclass

from cert_ray.sketching import Placeholder


@dataclass(frozen=True, slots=True)
class SketchCandidate:
    """One sketch that got votes. `mean_logprob` is that of its likeliest sample; it decides ties."""

    text: str
    placeholders: tuple[Placeholder, ...]
    votes: int
    mean_logprob: float


@dataclass(frozen=True, slots=True)
class SketchChosen:
    """The vote's result. `placeholders` are spans of `text`.

    `votes` are out of the `sketches` samples asked for. If the vote stopped early, since no other sketch could win any
    more, `undecided` samples were unfinished. `vote_share` is `votes / sketches`, the least that the winner can have,
    since undecided samples might have agreed. `candidates` are in the vote's order, the winner first; their votes add
    up to `sketches - undecided`.
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
    """More text of choice `index` (0 to n - 1 within its prompt), which no stop string can take back any more.

    `finish_reason` is None except in a choice's last event, whose `text` may be empty.
    """

    index: int
    text: str
    finish_reason: str | None = None


Event = SketchChosen | TextDrawn
