"""Which tokens a sample may draw next, guessed from the sketch it was given: prompt lookup.

In: the sketch, and the tokens of a sample so far. Out: tokens to feed after the last one, in case they are drawn.
`joint.py` decides whether they are, and no sample depends on the guess. Pure.

A sketch is represented by the tokens of the code it may become: with a number or a string in each placeholder, once in
single and once in double quotes, so that its tokens are split where those of code are (`['`, `']`). Tokens inside a
placeholder are holes; nothing is drafted for them. To draft, the sample's last tokens (three, else two, else one) are
looked up, and the tokens after their first occurrence are drafted. A sample in a hole is expected to go on after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Final

from tokenizers import Tokenizer

from cert_ray.sketching import Placeholder, prompt_format

HOLE: Final = -1  # stands for the tokens of a placeholder
_BREAK: Final = -2  # stands between two spellings of one sketch

_LONGEST_MATCH: Final = 3  # tokens; assumed
_LONGEST_HOLE: Final = 6  # up to this many tokens in a hole, its end is still expected; assumed

_FILLERS: Final = {"number": "0", "float": "0.5", "floatexponant": "1e-5", "complex": "1j"}
_PREFIXES: Final = {
    "string": "",
    "rawstring": "r",
    "interstring": "f",
    "interrawstring": "fr",
    "binarystring": "b",
    "unicodestring": "u",
}


def source(tokenizer: Tokenizer, start: str, text: str, placeholders: Sequence[Placeholder]) -> tuple[int, ...]:
    """The tokens to draft from, for the sketch `text` that follows `start`."""
    spelled = dict.fromkeys(_spell(tokenizer, start + text, len(start), placeholders, quote) for quote in "'\"")
    return tuple(token for ids in spelled for token in (*ids, _BREAK))


def _spell(
    tokenizer: Tokenizer, text: str, shift: int, placeholders: Sequence[Placeholder], quote: str
) -> tuple[int, ...]:
    pieces: list[str] = []
    holes: list[tuple[int, int]] = []
    size = last = 0
    for place in placeholders:
        fixed = text[last : place.start + shift]
        if place.kind in _PREFIXES:
            opening, inside, closing = _PREFIXES[place.kind] + quote, "x", quote
        else:
            opening, inside, closing = "", _FILLERS.get(place.kind, "x"), ""
        pieces += [fixed, opening, inside, closing]
        begin = size + len(fixed) + len(opening)
        holes.append((begin, begin + len(inside)))
        size, last = begin + len(inside) + len(closing), place.end + shift
    pieces.append(text[last:])
    return _with_holes(prompt_format.encode_code_spans(tokenizer, "".join(pieces)), holes)


def _with_holes(tokens: Sequence[tuple[int, int, int]], holes: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    """Token ids, in which adjacent tokens that touch a hole become one HOLE."""
    ids: list[int] = []
    for token, start, end in tokens:
        if not any(start < hole_end and hole_start < end for hole_start, hole_end in holes):
            ids.append(token)
        elif not ids or ids[-1] != HOLE:
            ids.append(HOLE)
    return tuple(ids)


class Expected:
    """The result of `source`, indexed so that a sample's last tokens are found in it at once."""

    def __init__(self, drafts: Sequence[int]) -> None:
        self._drafts = tuple(drafts)
        self._behind: dict[tuple[int, ...], int] = {}  # for each run of tokens, the place after its first occurrence
        for size in range(1, _LONGEST_MATCH + 1):
            for place in range(size, len(self._drafts)):
                self._behind.setdefault(self._drafts[place - size : place], place)

    def following(self, ids: Sequence[int], most: int) -> list[int]:
        """At most `most` tokens that may follow the sample's tokens `ids`."""
        drafts = self._drafts
        if not drafts or most <= 0:
            return []
        if not ids:
            return self._until_hole(0, most)
        place = self._place_behind(ids, len(ids))
        if place is not None:
            return self._until_hole(place, most)
        for drawn in range(1, min(_LONGEST_HOLE, len(ids) - 1) + 1):
            place = self._place_behind(ids, len(ids) - drawn)
            if place is not None:
                return self._until_hole(place + 1, most) if drafts[place] == HOLE else []
        return self._until_hole(1, most) if drafts[0] == HOLE and len(ids) <= _LONGEST_HOLE else []

    def _place_behind(self, ids: Sequence[int], end: int) -> int | None:
        """The place after the first occurrence of the longest known tail of `ids[:end]`."""
        for size in range(min(_LONGEST_MATCH, end), 0, -1):
            place = self._behind.get(tuple(ids[end - size : end]))
            if place is not None:
                return place
        return None

    def _until_hole(self, place: int, most: int) -> list[int]:
        return list(takewhile(lambda token: token >= 0, self._drafts[place : place + most]))
