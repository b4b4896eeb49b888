"""From rows of the annotated dataset to the tokens and pieces of one view.

In: a table of schemas.ANNOTATED, a tokenizer, a `PackConfig`. Out: an `EncodedShard`. It reads and writes no files.

    base, xl    the code, <|endoftext|>
    sketcher    the sketch with its placeholders as special tokens, <|endoftext|>
    generator   per segment its sketch and its code (`prompt_format.encode_pair`), or its code alone where it has no
                sketch; three line breaks between segments; <|endoftext|>
    context_first   the code in runs (`context_first`), each with the sketch of its last part before that part
                (`prompt_format.encode_context_first`); three line breaks between runs; <|endoftext|>

A piece is a stretch of tokens; unless it is atomic, it may be cut at the end of a row. In base, xl and sketcher, a
document is one piece. In generator, each segment is one piece, including the line breaks or end token after it. A
segment with a sketch is atomic; if it is longer than a row, its code stands alone instead, and is counted. The same
holds for each run of context_first. If a run's context does not fit into the row with its pair, the end of the context
stays with the pair and the rest is a piece that may be cut. base and xl have the same text: they differ in the
libraries chosen and in the recipe.

With `retrieve`, a file that imports the library is preceded by the library's documentation, as comments: in the code,
in the sketch (which keeps comments as they are), in the code of the first segment, and in the context of the first run,
which is where serving puts it.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
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
from cert_ray.retrieval.retriever import RetrieveConfig, Retriever
from cert_ray.schemas import DropReason
from cert_ray.sketching import prompt_format
from cert_ray.sketching.anonymize import Placeholder, moved
from cert_ray.tokens.blocks import PlacedSketch, blocks_of, sketch_of
from cert_ray.tokens.context_first import Example, examples_of
from cert_ray.tokens.dataset import uniform_of_hash
from cert_ray.tokens.index import BoolArray
from cert_ray.tokens.shards import UNIGRAMS, token_dtype
from cert_ray.tokens.vocabulary import vocabulary_size

SEGMENT_JOIN = "\n\n\n"  # as in the paper
_BATCH_ROWS = 64  # measured: 512 are 2% slower, and the library keeps 100 bytes or more per token, which adds up


class View(StrEnum):
    """Which text of a document a model is trained on."""

    BASE = "base"
    XL = "xl"
    SKETCHER = "sketcher"
    GENERATOR = "generator"
    CONTEXT_FIRST = "context_first"  # both stages in one model


SKETCH_VIEWS = frozenset({View.SKETCHER, View.GENERATOR, View.CONTEXT_FIRST})
MODEL_VIEW = "cert_ray_view"  # in a trained model's config.json: the view that it was last trained on


class PackConfig(Config):
    """How to turn the dataset into a view's tokens."""

    view: View
    context_tokens: int = pydantic.Field(1_024, ge=1)
    libraries: tuple[str, ...] | None = None  # only files that import one of them; None takes every file
    held_out_fraction: float = pydantic.Field(0.02, ge=0, lt=1)  # by content hash: the same files in every view
    seed: int = pydantic.Field(0, ge=0)  # of the held-out split
    limit: int | None = pydantic.Field(None, ge=1)  # read only the first so many documents of the dataset
    retrieve: RetrieveConfig | None = None  # documentation before each file

    @pydantic.field_serializer("retrieve")
    def _describe_retrieve(self, retrieve: RetrieveConfig | None) -> dict[str, Any] | None:
        """Identify a pinned file by its checksum, not by its path: a job's files end up in another folder."""
        if retrieve is None:
            return None
        return retrieve.model_dump(mode="json", exclude=None if retrieve.checksum is None else {"docs"})


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
    kept, dropped = kept_rows(table, config)
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
    """The tokens of all rows, one after the other; for each piece its row, its length and whether it is atomic."""

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
                tokens.fromlist(piece.ids)  # takes half the time of `numpy.array` over a list
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
        views = {
            View.SKETCHER: self._sketches,
            View.GENERATOR: self._segments,
            View.CONTEXT_FIRST: self._examples,
        }
        self.documents = views.get(config.view, self._codes)  # takes a batch of rows, yields the pieces of each row

    def _codes(self, rows: pa.Table) -> Iterator[list[_Piece]]:
        codes = [self._header(content) + content for content in rows["content"].to_pylist()]
        for ids in prompt_format.encode_code_batch(self._tokenizer, codes):
            ids += self._end
            yield [_Piece(ids)]

    def _sketches(self, rows: pa.Table) -> Iterator[list[_Piece]]:
        sketches = [
            _behind(
                self._header(row["content"]),
                *sketch_of(row),
            )
            for row in rows.select(["content", "sketch", "placeholders"]).to_pylist()
        ]
        for ids in prompt_format.encode_sketch_batch(self._tokenizer, sketches):
            ids += self._end
            yield [_Piece(ids)]

    def _segments(self, rows: pa.Table) -> Iterator[list[_Piece]]:
        """One piece per segment, with the tokens that follow it; a file without segments is one piece of code."""
        columns = rows.select(["content", "sketch", "placeholders", "segments"])
        blocks = [blocks_of(row) for row in columns.to_pylist()]
        for row, content in zip(blocks, columns["content"].to_pylist(), strict=True):
            row[0] = replace(row[0], code=self._header(content) + row[0].code)
        alone = [block.code for row in blocks for block in row if block.sketch is None]
        paired = [(*block.sketch, block.code) for row in blocks for block in row if block.sketch is not None]
        codes = prompt_format.encode_code_batch(self._tokenizer, alone)
        pairs = prompt_format.encode_pair_batch(self._tokenizer, paired)
        for row in blocks:
            after = [self._join] * (len(row) - 1) + [self._end]
            yield [
                _Piece(next(codes) + follows) if block.sketch is None else self._pair(next(pairs), block.code, follows)
                for block, follows in zip(row, after, strict=True)
            ]

    def _examples(self, rows: pa.Table) -> Iterator[list[_Piece]]:
        """One or two pieces per run, with the tokens that follow it."""
        columns = rows.select(["content", "content_hash", "sketch", "placeholders", "segments"]).to_pylist()
        documents = [
            list(examples_of(blocks_of(row), row["content_hash"], self._header(row["content"]))) or [Example("")]
            for row in columns
        ]
        alone = [one.context for examples in documents for one in examples if one.sketch is None]
        paired = [
            (one.context, *one.sketch, one.code) for examples in documents for one in examples if one.sketch is not None
        ]
        codes = prompt_format.encode_code_batch(self._tokenizer, alone)
        pairs = prompt_format.encode_context_first_batch(self._tokenizer, paired)
        for examples in documents:
            after = [self._join] * (len(examples) - 1) + [self._end]
            yield [
                piece
                for one, follows in zip(examples, after, strict=True)
                for piece in (
                    [_Piece(next(codes) + follows)] if one.sketch is None else self._run(next(pairs), one, follows)
                )
            ]

    def _run(self, ids: list[int], example: Example, after: list[int]) -> list[_Piece]:
        """Context and pair, the pair never cut; context and code alone if the pair does not fit into a row."""
        self.counts["pairs"] += 1
        context_tokens = ids.index(prompt_format.separator_id(self._tokenizer))
        room = self._row_tokens - (len(ids) - context_tokens) - len(after)
        if room < 0:
            self.counts["pairs_too_long"] += 1
            return [_Piece(prompt_format.encode_code(self._tokenizer, example.context + example.code) + after)]
        far = max(0, context_tokens - room)
        near = _Piece(ids[far:] + after, atomic=True)
        return [_Piece(ids[:far]), near] if far else [near]

    def _header(self, content: str) -> str:
        header = "" if self._retriever is None else self._retriever.header_of_file(content)
        if header:
            self.counts["documented"] += 1
        return header

    def _pair(self, ids: list[int], code: str, after: list[int]) -> _Piece:
        """A sketch and its code, never cut; the code alone if the two do not fit into a row."""
        self.counts["pairs"] += 1
        if len(ids) + len(after) <= self._row_tokens:
            return _Piece(ids + after, atomic=True)
        self.counts["pairs_too_long"] += 1
        return _Piece(prompt_format.encode_code(self._tokenizer, code) + after)


def _behind(header: str, sketch: str, placeholders: list[Placeholder]) -> PlacedSketch:
    """The sketch of a file with `header` before it; a header is its own sketch."""
    return header + sketch, moved(placeholders, len(header))


def unigram_entropy_nats(counts: npt.NDArray[np.int64]) -> float | None:
    """Entropy of the tokens' frequencies, in nats per token: the loss of the best model without context."""
    total = counts.sum()
    if not total:
        return None
    shares = counts[counts > 0] / total
    return float(-(shares * np.log(shares)).sum())


def kept_rows(table: pa.Table, config: PackConfig) -> tuple[pa.Table, dict[str, int]]:
    """The rows that the view takes, and how many were dropped, by reason."""
    dropped: dict[str, int] = {}
    if config.libraries is not None:
        kept = table.filter(uses_any(table["libraries"], config.libraries))
        dropped[DropReason.OTHER_LIBRARY.value] = table.num_rows - kept.num_rows
        table = kept
    if config.view in SKETCH_VIEWS:
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
