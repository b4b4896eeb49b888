"""From rows of the annotated dataset to the tokens and pieces of one view.

In: a table of schemas.ANNOTATED, a tokenizer, a `PackConfig`. Out: an `EncodedShard`. It reads and writes no file.

    base, xl    the code, <|endoftext|>
    sketcher    the sketch with its placeholders as special tokens, <|endoftext|>
    generator   per segment its sketch and its code (`prompt_format.encode_pair`), or its code alone where it stands
                without a sketch; three line breaks between segments; <|endoftext|>

A document is one piece, which may be cut at a row's border. In the generator's view it is one piece per segment, with
what follows the segment; those with a sketch are atomic, unless they are longer than a row: then the code stands alone,
and is counted. base and xl make the same text: they differ by the libraries chosen and by the recipe.

With `retrieve`, documentation of the library stands ahead of a file that imports it, as comments: in the code, in the
sketch (where comments stay as they are), and in the code of the first segment, which is where serving puts it.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pydantic
from tokenizers import Tokenizer

from cert_ray import schemas
from cert_ray.config import Config
from cert_ray.libraries import uses_any
from cert_ray.python_source import code_points
from cert_ray.retrieval.retriever import RetrieveConfig, Retriever
from cert_ray.schemas import DropReason
from cert_ray.sketching import prompt_format
from cert_ray.sketching.anonymize import Placeholder
from cert_ray.tokens.dataset import uniform_of_hash
from cert_ray.tokens.shards import UNIGRAMS, BoolArray, token_dtype
from cert_ray.tokens.vocabulary import vocabulary_size

SEGMENT_JOIN = "\n\n\n"  # PAPER.md, "The generator's training text"
_BATCH_ROWS = 512  # bounds the Python integers alive at a time to a few million


class View(StrEnum):
    """Which text of a document a model is trained on."""

    BASE = "base"
    XL = "xl"
    SKETCHER = "sketcher"
    GENERATOR = "generator"


class PackConfig(Config):
    """How to turn the dataset into a view's tokens."""

    view: View
    context_tokens: int = pydantic.Field(1_024, ge=1)
    libraries: tuple[str, ...] | None = None  # only files that import one of them; None takes every file
    held_out_fraction: float = pydantic.Field(0.02, ge=0, lt=1)  # by content hash: the same files in every view
    seed: int = pydantic.Field(0, ge=0)  # of the held-out split
    limit: int | None = pydantic.Field(None, ge=1)  # read only so many documents of the dataset, the first
    retrieve: RetrieveConfig | None = None  # documentation ahead of each file


@dataclass(frozen=True, slots=True)
class EncodedShard:
    """The tokens and pieces of one shard; rows_read = documents + sum(dropped)."""

    tokens: npt.NDArray[np.unsignedinteger]
    pieces: pa.Table  # schemas.PIECES
    unigrams: pa.Table  # of the held-out documents
    rows_read: int
    documents: int
    dropped: dict[str, int]
    counts: dict[str, int]


@dataclass(frozen=True, slots=True)
class _Piece:
    ids: list[int]
    atomic: bool = False


def encode_shard(
    table: pa.Table, tokenizer: Tokenizer, config: PackConfig, retriever: Retriever | None = None
) -> EncodedShard:
    """Encode the rows of `table` that the view takes, in their order. `retriever` is the loaded `config.retrieve`."""
    kept, dropped = _kept_rows(table, config)
    hashes = kept["content_hash"].to_pylist()
    held_out = np.array([uniform_of_hash(digest, config.seed) < config.held_out_fraction for digest in hashes], bool)
    encoder = _Encoder(tokenizer, config, retriever)
    encoded = _encode_rows(kept, encoder, vocabulary_size(tokenizer))
    held_out_tokens = encoded.tokens[np.repeat(held_out[encoded.rows], encoded.lengths)]
    return EncodedShard(
        tokens=encoded.tokens,
        pieces=_pieces_table(encoded, kept["weight"].to_numpy(), held_out),
        unigrams=_unigrams(held_out_tokens),
        rows_read=table.num_rows,
        documents=kept.num_rows,
        dropped=dropped,
        counts={
            "documents": kept.num_rows,
            "held_out_documents": int(held_out.sum()),
            "tokens": len(encoded.tokens),
            "held_out_tokens": len(held_out_tokens),
            **encoder.counts,
        },
    )


@dataclass(frozen=True, slots=True)
class _EncodedRows:
    """The tokens of all rows, one after the other, and per piece its row, its length and whether it is atomic."""

    tokens: npt.NDArray[np.unsignedinteger]
    rows: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int64]
    atomic: BoolArray


def _encode_rows(kept: pa.Table, encoder: _Encoder, vocab_size: int) -> _EncodedRows:
    dtype = token_dtype(vocab_size)
    tokens = array("H" if dtype.itemsize == 2 else "I")
    rows: list[int] = []
    lengths: list[int] = []
    atomic: list[bool] = []
    for start in range(0, kept.num_rows, _BATCH_ROWS):
        for row, pieces in enumerate(encoder.documents(kept.slice(start, _BATCH_ROWS)), start):
            for piece in pieces:
                tokens.fromlist(piece.ids)  # half the time of `numpy.array` over a list
                rows.append(row)
                lengths.append(len(piece.ids))
                atomic.append(piece.atomic)
    return _EncodedRows(
        np.frombuffer(tokens, dtype), np.array(rows, np.int32), np.array(lengths, np.int64), np.array(atomic, np.bool_)
    )


class _Encoder:
    """Turns batches of rows into pieces, and counts pairs on the way."""

    def __init__(self, tokenizer: Tokenizer, config: PackConfig, retriever: Retriever | None) -> None:
        self._tokenizer = tokenizer
        self._retriever = retriever
        self._row_tokens = config.context_tokens + 1
        end = tokenizer.token_to_id(prompt_format.END_OF_TEXT)
        assert end is not None, "pack checks that the tokenizer has the special tokens"
        self._end = [end]
        self._join = prompt_format.encode_code(tokenizer, SEGMENT_JOIN)
        self.counts = {"pairs": 0, "pairs_too_long": 0}
        if retriever is not None:
            self.counts["documented"] = 0
        views = {View.SKETCHER: self._sketches, View.GENERATOR: self._segments}
        self.documents = views.get(config.view, self._codes)  # from a batch of rows, the pieces of each row

    def _codes(self, rows: pa.Table) -> Iterator[list[_Piece]]:
        codes = [self._header(content) + content for content in rows["content"].to_pylist()]
        for ids in prompt_format.encode_code_batch(self._tokenizer, codes):
            ids += self._end
            yield [_Piece(ids)]

    def _sketches(self, rows: pa.Table) -> Iterator[list[_Piece]]:
        sketches = [
            _behind(
                self._header(row["content"]),
                row["sketch"],
                _code_point_placeholders(row["sketch"], row["placeholders"]),
            )
            for row in rows.select(["content", "sketch", "placeholders"]).to_pylist()
        ]
        for ids in prompt_format.encode_sketch_batch(self._tokenizer, sketches):
            ids += self._end
            yield [_Piece(ids)]

    def _segments(self, rows: pa.Table) -> Iterator[list[_Piece]]:
        """One piece per segment, each with what follows it; a file without segments is its code."""
        columns = rows.select(["content", "sketch", "placeholders", "segments"])
        blocks = [list(_blocks(row)) or [_Block(row["content"], None)] for row in columns.to_pylist()]
        for row, content in zip(blocks, columns["content"].to_pylist(), strict=True):
            row[0] = replace(row[0], code=self._header(content) + row[0].code)
        alone = [block.code for row in blocks for block in row if block.sketch is None]
        paired = [(*block.sketch, block.code) for row in blocks for block in row if block.sketch is not None]
        codes = iter(prompt_format.encode_code_batch(self._tokenizer, alone))
        pairs = iter(prompt_format.encode_pair_batch(self._tokenizer, paired))
        for row in blocks:
            after = [self._join] * (len(row) - 1) + [self._end]
            yield [
                _Piece(next(codes) + follows) if block.sketch is None else self._pair(next(pairs), block.code, follows)
                for block, follows in zip(row, after, strict=True)
            ]

    def _header(self, content: str) -> str:
        header = "" if self._retriever is None else self._retriever.header_of_file(content)
        if header:
            self.counts["documented"] += 1
        return header

    def _pair(self, ids: list[int], code: str, after: list[int]) -> _Piece:
        """A sketch and its code, never parted; the code alone where both do not fit a row."""
        self.counts["pairs"] += 1
        if len(ids) + len(after) <= self._row_tokens:
            return _Piece(ids + after, atomic=True)
        self.counts["pairs_too_long"] += 1
        return _Piece(prompt_format.encode_code(self._tokenizer, code) + after)


@dataclass(frozen=True, slots=True)
class _Block:
    """A segment's code, and its sketch with placeholders counted from its start, or None where it stands alone."""

    code: str
    sketch: tuple[str, list[Placeholder]] | None


def _blocks(row: dict[str, Any]) -> Iterator[_Block]:
    """The segments of one row of the dataset."""
    segments = row["segments"]
    codes = _slices(row["content"], segments, "code")
    sketches = _slices(row["sketch"], segments, "sketch")
    placeholders = _code_point_placeholders(row["sketch"], row["placeholders"])
    starts = [placeholder.start for placeholder in placeholders]
    for segment, (code_start, code_end), (start, end) in zip(segments, codes, sketches, strict=True):
        sketch = None
        if segment["with_sketch"]:
            inside = placeholders[bisect_left(starts, start) : bisect_left(starts, end)]
            moved = [Placeholder(spot.start - start, spot.end - start, spot.kind) for spot in inside]
            sketch = (row["sketch"][start:end], moved)
        yield _Block(row["content"][code_start:code_end], sketch)


def _behind(header: str, sketch: str, placeholders: list[Placeholder]) -> tuple[str, list[Placeholder]]:
    """The sketch of a file behind `header`, whose sketch is itself."""
    moved = [Placeholder(spot.start + len(header), spot.end + len(header), spot.kind) for spot in placeholders]
    return header + sketch, moved


def _slices(text: str, segments: Sequence[dict[str, Any]], side: str) -> list[tuple[int, int]]:
    starts = code_points(text, [segment[f"{side}_start"] for segment in segments])
    ends = code_points(text, [segment[f"{side}_end"] for segment in segments])
    return list(zip(starts, ends, strict=True))


def _code_point_placeholders(sketch: str, placeholders: Sequence[dict[str, Any]]) -> list[Placeholder]:
    starts = code_points(sketch, [spot["start"] for spot in placeholders])
    ends = code_points(sketch, [spot["end"] for spot in placeholders])
    kinds = [spot["kind"] for spot in placeholders]
    return [Placeholder(start, end, kind) for start, end, kind in zip(starts, ends, kinds, strict=True)]


def unigram_entropy_nats(counts: npt.NDArray[np.int64]) -> float | None:
    """Entropy of the tokens' own distribution, in nats per token: the loss of the best model without context."""
    total = counts.sum()
    if not total:
        return None
    shares = counts[counts > 0] / total
    return float(-(shares * np.log(shares)).sum())


def _kept_rows(table: pa.Table, config: PackConfig) -> tuple[pa.Table, dict[str, int]]:
    """The rows that the view takes, and how many were dropped for which reason."""
    dropped: dict[str, int] = {}
    if config.libraries is not None:
        kept = table.filter(uses_any(table["libraries"], config.libraries))
        dropped[DropReason.OTHER_LIBRARY.value] = table.num_rows - kept.num_rows
        table = kept
    if config.view in (View.SKETCHER, View.GENERATOR):
        kept = table.filter(table["sketch"].is_valid())
        dropped[DropReason.UNSKETCHABLE.value] = table.num_rows - kept.num_rows
        table = kept
    return table, {reason: count for reason, count in dropped.items() if count}


def _pieces_table(encoded: _EncodedRows, weight: npt.NDArray[np.float64], held_out: BoolArray) -> pa.Table:
    rows, lengths = encoded.rows, encoded.lengths
    starts = np.cumsum(lengths) - lengths
    columns = [rows, starts, lengths.astype(np.int32), weight[rows], held_out[rows], encoded.atomic]
    return pa.Table.from_arrays([pa.array(column) for column in columns], schema=schemas.PIECES)


def _unigrams(tokens: npt.NDArray[np.unsignedinteger]) -> pa.Table:
    counts = np.bincount(tokens)
    found = np.flatnonzero(counts)
    return pa.Table.from_arrays([pa.array(found.astype(np.int32)), pa.array(counts[found])], schema=UNIGRAMS)
