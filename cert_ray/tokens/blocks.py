"""Documents as the blocks that views are made of: code, sketch and placeholders.

In: rows of schemas.ANNOTATED as Python objects; their offsets are UTF-8 bytes. Out: `Block`s, offsets in code points.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from cert_ray.python_source import code_points
from cert_ray.sketching.anonymize import Placeholder, moved

PlacedSketch = tuple[str, list[Placeholder]]  # a sketch, and its placeholders counted from its start


@dataclass(frozen=True, slots=True)
class Block:
    """The code of a segment and its sketch, which is None if the code stands alone."""

    code: str
    sketch: PlacedSketch | None
    gap: str = ""  # blank lines between the previous block and this one


def blocks_of(row: dict[str, Any]) -> list[Block]:
    """The blocks of one row. A file without segments is one block of code."""
    return list(_blocks(row)) or [Block(row["content"], None)]


def sketch_of(row: dict[str, Any]) -> PlacedSketch:
    """The sketch of a whole row."""
    placeholders = row["placeholders"]
    starts = code_points(row["sketch"], [spot["start"] for spot in placeholders])
    ends = code_points(row["sketch"], [spot["end"] for spot in placeholders])
    kinds = [spot["kind"] for spot in placeholders]
    return row["sketch"], [Placeholder(*place) for place in zip(starts, ends, kinds, strict=True)]


def parts_of(sketch: PlacedSketch, spans: Iterable[tuple[int, int]]) -> Iterator[PlacedSketch]:
    """The part of `sketch` between each start and end."""
    text, placeholders = sketch
    starts = [placeholder.start for placeholder in placeholders]
    for start, end in spans:
        inside = placeholders[bisect_left(starts, start) : bisect_left(starts, end)]
        yield text[start:end], moved(inside, -start)


def _blocks(row: dict[str, Any]) -> Iterator[Block]:
    segments, content = row["segments"], row["content"]
    codes = _slices(content, segments, "code")
    sketches = parts_of(sketch_of(row), _slices(row["sketch"], segments, "sketch"))
    last = 0
    for segment, (code_start, code_end), sketch in zip(segments, codes, sketches, strict=True):
        placed = sketch if segment["with_sketch"] else None
        yield Block(content[code_start:code_end], placed, content[last:code_start])
        last = code_end


def _slices(text: str, segments: Sequence[dict[str, Any]], side: str) -> list[tuple[int, int]]:
    starts = code_points(text, [segment[f"{side}_start"] for segment in segments])
    ends = code_points(text, [segment[f"{side}_end"] for segment in segments])
    return list(zip(starts, ends, strict=True))
