"""Blocks of code aligned with the blocks of their sketch, from which the generator's text is built.

In: a source, its sketch, and its blocks (`python_source`). Out: one `Segment` per block. No text is formatted or split:
placeholders are inside blocks, so a block's borders in the sketch follow from the placeholders before them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from cert_ray.python_source import Statement
from cert_ray.schemas import StatementKind
from cert_ray.sketching.anonymize import Sketched, without_form_feeds


@dataclass(frozen=True, slots=True)
class Segment:
    """A block of code and its sketch: half-open ranges of code points in source and sketch.

    `with_sketch` is false for code that stands alone in the generator's text: imports, and blocks with `__name__`, as
    in the paper.
    """

    code_start: int
    code_end: int
    sketch_start: int
    sketch_end: int
    with_sketch: bool


def align_segments(source: str, sketched: Sketched, statements: Sequence[Statement]) -> tuple[Segment, ...]:
    """One segment per block, in order."""
    ends = [end for _, end in sketched.replaced]
    return tuple(
        Segment(
            block.start,
            block.end,
            _sketch_offset(source, sketched, ends, block.start),
            _sketch_offset(source, sketched, ends, block.end),
            block.kind is StatementKind.CODE,
        )
        for block in statements
    )


def _sketch_offset(source: str, sketched: Sketched, ends: Sequence[int], offset: int) -> int:
    """Where a line border outside all placeholders is in the sketch."""
    index = bisect_right(ends, offset)  # how many placeholders precede it
    code_at = ends[index - 1] if index else 0
    sketch_at = sketched.placeholders[index - 1].end if index else 0
    more = index < len(ends)
    code_gap = (sketched.replaced[index][0] if more else len(source)) - code_at
    sketch_gap = (sketched.placeholders[index].start if more else len(sketched.text)) - sketch_at
    if sketch_gap > code_gap and offset > code_at and sketched.text[sketch_at] != source[code_at]:
        return sketch_at + 1 + offset - code_at  # a space was added after the placeholder
    if sketch_gap < code_gap:
        return sketch_at + len(without_form_feeds(source[code_at:offset]))
    return sketch_at + offset - code_at
