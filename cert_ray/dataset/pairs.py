"""A file beside its sketch, block by block; replaced code and its placeholders are marked.

In: one row of the annotated dataset. Out: `Block`s whose sides start at the same statement, shown by the card and by
`cert-ray inspect`. The dataset stores only the spans of placeholders; the ranges of code are found by sketching the row
again. They stay unmarked if another version of cert-ray wrote the row and the sketches differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from cert_ray.python_source import byte_offsets
from cert_ray.sketching.anonymize import Sketched, SketchKind, sketch_source

Span = tuple[int, int, str]  # [start, end) in UTF-8 bytes, kind of placeholder

COLUMNS = ["doc_id", "path", "repository", "content", "sketch", "placeholders", "segments"]


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of text; `kind` is the kind of placeholder, or None between placeholders."""

    text: str
    kind: str | None = None


@dataclass(frozen=True, slots=True)
class Block:
    """The two sides of a run of top-level statements, without the blank lines around it."""

    code: tuple[Piece, ...]
    sketch: tuple[Piece, ...]


def blocks_of(row: Mapping[str, Any], kind: SketchKind) -> list[Block]:
    """The blocks of `row`, which has `COLUMNS` and was sketched as `kind`."""
    code, sketch = row["content"].encode(), row["sketch"].encode()
    sketch_spans = [(p["start"], p["end"], p["kind"]) for p in row["placeholders"]]
    code_spans = _code_spans(row["content"], row["sketch"], kind)
    borders = [(0, 0), *((s["code_start"], s["sketch_start"]) for s in row["segments"][1:]), (len(code), len(sketch))]
    blocks = (
        Block(_pieces(code, code_spans, left[0], right[0]), _pieces(sketch, sketch_spans, left[1], right[1]))
        for left, right in pairwise(borders)
    )
    return [block for block in blocks if block.code or block.sketch]


def _code_spans(content: str, sketch: str, kind: SketchKind) -> list[Span]:
    sketched = sketch_source(content, kind)
    if not isinstance(sketched, Sketched) or sketched.text != sketch:
        return []
    flat = byte_offsets(content, [offset for start_end in sketched.replaced for offset in start_end])
    kinds = (placeholder.kind for placeholder in sketched.placeholders)
    return list(zip(flat[::2], flat[1::2], kinds, strict=True))


def _pieces(text: bytes, spans: Sequence[Span], start: int, end: int) -> tuple[Piece, ...]:
    start += len(text[start:end]) - len(text[start:end].lstrip(b"\n"))
    end = start + len(text[start:end].rstrip())
    return tuple(_cut(text, spans, start, end))


def _cut(text: bytes, spans: Sequence[Span], start: int, end: int) -> Iterator[Piece]:
    at = start
    for first, last, kind in spans:
        if first >= start and last <= end:
            if first > at:
                yield Piece(text[at:first].decode())
            yield Piece(text[first:last].decode(), kind)
            at = last
    if at < end:
        yield Piece(text[at:end].decode())
