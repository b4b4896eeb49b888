"""Training text in which the context comes first: code, then the sketch of the code that follows, then that code.

In: the blocks of a document. Out: `Example`s, which together hold its code once, in order. `prompt_format` spells them.
At serving, one model for both stages reads the same: the prompt, its own sketch of the rest, the rest. So the context
of an example is code without sketches in it, and ends where prompts end. (Packed into one row, earlier examples of the
same document precede it, sketches included.)

A class is split into its methods, and so is any block that has definitions one level in, after blank lines. Prompts end
inside a block more often than before one. So the sketched part of a block begins at a random place where a word ends
and blanks follow: serving ends prompts there (`serving.boundaries`), and code and sketch agree, since a sketch keeps
its code's lines. (Where it does not, the part is the whole block, however long.) No part begins after `np.` or `(`,
although prompts end there, too. Answers are short: a part is at most the last `_PART_LINES` lines of a block, preceded
by the blanks that its context would have ended in. About half of the blocks with a sketch, chosen at random, become
context of a later one; the last such block of a document never does. Random choices depend only on the content's hash
and the block's number.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import xxhash

from cert_ray.possessive import compile_pattern
from cert_ray.sketching.anonymize import moved
from cert_ray.sketching.literals import COMMENT, STRING_KINDS, scan
from cert_ray.tokens.blocks import Block, PlacedSketch, parts_of

_PART_LINES: Final = 8  # assumed: an answer is a line or a few
_BLANKS: Final = " \t\r\n"
_WORD_END: Final = re.compile(r"(?<=\S)[ \t]")
# A run of blank lines is matched only after text and never backtracked into, so time is linear in its length.
_BEFORE_METHOD: Final = compile_pattern(r"(?<=[^ \t\n])[ \t]*+\n(?:[ \t]*+\n)++(?=(?: {4}|\t)(?:@|def |async def ))")


@dataclass(frozen=True, slots=True)
class Example:
    """Context, then a part as sketch and as code. The last example of a document may be context alone."""

    context: str
    sketch: PlacedSketch | None = None
    code: str = ""


def examples_of(blocks: Sequence[Block], content_hash: str, ahead: str = "") -> Iterator[Example]:
    """The examples of one document. `ahead` is documentation; it becomes context of the first."""
    context = ahead
    smaller = [part for block in blocks for part in _methods(block)]
    last = max((number for number, block in enumerate(smaller) if block.sketch is not None), default=-1)
    for number, block in enumerate(smaller):
        context += block.gap if context else ""
        drawn = xxhash.xxh3_64_intdigest(f"{content_hash} {number}".encode())
        if block.sketch is None or (drawn & 1 and number != last):
            context += block.code
            continue
        yield _example(context, block.code, block.sketch, drawn >> 1)
        context = ""
    if context:
        yield Example(context)


def _methods(block: Block) -> Iterator[Block]:
    """The block, cut before each definition one level in; uncut if code and sketch have different numbers of them."""
    if block.sketch is None:
        yield block
        return
    text, _ = block.sketch
    in_code, in_sketch = (_before_methods(side) for side in (block.code, text))
    if len(in_code) != len(in_sketch):
        in_code, in_sketch = [], []
    gaps = [block.gap, *(found.group() for found in in_code)]
    sketches = parts_of(block.sketch, _between(in_sketch, len(text)))
    for gap, (start, end), sketch in zip(gaps, _between(in_code, len(block.code)), sketches, strict=True):
        yield Block(block.code[start:end], sketch, gap)


def _between(cuts: Sequence[re.Match[str]], length: int) -> list[tuple[int, int]]:
    """Start and end of each stretch of text between the matches."""
    starts = [0, *(cut.end() for cut in cuts)]
    return list(zip(starts, [*(cut.start() for cut in cuts), length], strict=True))


def _before_methods(text: str) -> list[re.Match[str]]:
    """The blank lines before definitions one level in, except those inside a string."""
    found = list(_BEFORE_METHOD.finditer(text))
    if not found:  # most texts: no need to scan them
        return []
    uncut = _Uncut(text)
    return [one for one in found if one.start() not in uncut]


class _Uncut:
    """The strings and comments of some code. A place inside one is `in` this set; its start and end are not."""

    def __init__(self, code: str) -> None:
        spans = [
            (start, start + len(code[start:end].rstrip(_BLANKS)) if kind == COMMENT else end)
            for start, end, kind in scan(code)
            if kind == COMMENT or kind in STRING_KINDS
        ]
        self._starts, self._ends = [start for start, _ in spans], [end for _, end in spans]

    def __contains__(self, place: int) -> bool:
        last = bisect_left(self._starts, place) - 1
        return last >= 0 and place < self._ends[last]


def _example(context: str, code: str, sketch: PlacedSketch, drawn: int) -> Example:
    text, placeholders = sketch
    places = places_of(code, text)
    code_from, sketch_from = places[drawn % len(places)]
    whole = context + code[:code_from]
    context = whole.rstrip(_BLANKS)
    blanks = whole[len(context) :]
    inside = [spot for spot in placeholders if spot.start >= sketch_from]
    part = (blanks + text[sketch_from:], moved(inside, len(blanks) - sketch_from))
    return Example(context, part, blanks + code[code_from:])


def places_of(code: str, sketch: str) -> list[tuple[int, int]]:
    """Where the sketched part of a block may begin, in its code and in its sketch; at least one place.

    If both have the same number of lines, no placeholder removed a line break, so line n of one is line n of the other.
    Comments and strings are never cut.
    """
    code_lines, sketch_lines = code.split("\n"), sketch.split("\n")
    if len(code_lines) != len(sketch_lines):
        return [(0, 0)]
    first = max(0, len(code_lines) - _PART_LINES)
    places = [(0, 0)] if first == 0 else []
    code_at = sketch_at = 0
    uncut = _Uncut(code)
    for number, (line, sketched) in enumerate(zip(code_lines, sketch_lines, strict=True)):
        if number >= first:
            ends = [found.start() for found in _WORD_END.finditer(_common_beginning(line, sketched))]
            inside = [(code_at + end, sketch_at + end) for end in ends]
            if line.strip():
                inside.append((code_at + len(line.rstrip(_BLANKS)), sketch_at + len(sketched.rstrip(_BLANKS))))
            places += [place for place in inside if place[0] not in uncut]
        code_at, sketch_at = code_at + len(line) + 1, sketch_at + len(sketched) + 1
    return [place for place in dict.fromkeys(places) if code[place[0] :].strip()] or [(0, 0)]


def _common_beginning(one: str, other: str) -> str:
    differs = (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return one[: next(differs, min(len(one), len(other)))]
