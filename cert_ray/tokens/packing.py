"""Plans of training rows: which slices of which documents make row i.

In: a `PackedTokens` and the ordinals of an epoch's documents, in order, repeats allowed. Out: a `RowPlan` of rows of
`context_tokens + 1` tokens, read by index. A plan is a pure function of its arguments. It moves no tokens: `row`
reads the slices that it needs from the memory map. Training samples the documents.

Views without atomic pieces are one stream, cut at row borders, so only the last row is padded. The generator's pairs
must stay whole: rows are filled in order, and the gap at the end of a row takes the largest piece that fits among the
next ones (best fit with look-ahead). What is then still empty is padded.
"""

from __future__ import annotations

from array import array
from collections import deque
from dataclasses import dataclass

import numpy as np

from cert_ray.errors import ConfigError
from cert_ray.tokens.index import BoolArray, IntArray
from cert_ray.tokens.shards import PackedTokens

LOOK_AHEAD_PIECES = 256  # measured on log-normal pairs (median 120, window 1,024): 16 use 99.2%, 64 99.7%, 256 99.9%


@dataclass(frozen=True, slots=True)
class PlanStats:
    """What a plan does with its tokens."""

    rows: int
    tokens: int  # that the rows hold; each is in exactly one row
    padding: int
    cut_pairs: int  # atomic pieces split over two rows: always 0
    pairs_too_long: int  # pairs of the whole pack that were written as code alone

    @property
    def used_share(self) -> float:
        """Tokens over row positions: 1 means no padding."""
        return self.tokens / (self.tokens + self.padding) if self.tokens else 1.0


@dataclass(frozen=True, slots=True)
class _Slices:
    """Slices of tokens in row order: slices first[i] to first[i + 1] make row i."""

    first: IntArray
    start: IntArray  # address in the pack
    tokens: IntArray
    cut_pairs: int


class RowPlan:
    """Rows of `context_tokens + 1` tokens, by index."""

    def __init__(self, packed: PackedTokens, context_tokens: int, slices: _Slices) -> None:
        """Callers use `plan_rows`."""
        self.context_tokens = context_tokens
        self._packed = packed
        self._slices = slices

    def __len__(self) -> int:
        """How many rows there are."""
        return len(self._slices.first) - 1

    def row(self, index: int) -> tuple[IntArray, BoolArray]:
        """Row `index`: ids int64 [context_tokens + 1], padded at the end, and a bool mask, false where padded.

        Raises:
            IndexError: unless 0 <= index < len(self).
        """
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of a plan of {len(self)} rows")
        ids = np.full(self.context_tokens + 1, self._packed.pad_id, np.int64)
        filled = 0
        for piece in range(self._slices.first[index], self._slices.first[index + 1]):
            count = int(self._slices.tokens[piece])
            ids[filled : filled + count] = self._packed.read(int(self._slices.start[piece]), count)
            filled += count
        return ids, np.arange(self.context_tokens + 1) < filled

    def rows(self, indices: IntArray) -> tuple[IntArray, BoolArray]:
        """Several rows at once: ids int64 and mask, both [len(indices), context_tokens + 1]."""
        ids = np.empty((len(indices), self.context_tokens + 1), np.int64)
        mask = np.empty(ids.shape, np.bool_)
        for position, index in enumerate(indices):
            ids[position], mask[position] = self.row(int(index))
        return ids, mask

    @property
    def stats(self) -> PlanStats:
        """Rows, tokens and padding of the plan."""
        tokens = int(self._slices.tokens.sum())
        return PlanStats(
            rows=len(self),
            tokens=tokens,
            padding=len(self) * (self.context_tokens + 1) - tokens,
            cut_pairs=self._slices.cut_pairs,
            pairs_too_long=self._packed.manifest.counts.get("pairs_too_long", 0),
        )


def plan_rows(packed: PackedTokens, documents: IntArray, context_tokens: int, most_rows: int | None = None) -> RowPlan:
    """Plan rows over the document ordinals `documents`, in order; stop after `most_rows` if any piece is atomic.

    Raises:
        ConfigError: when `context_tokens` is not positive, or an atomic piece is longer than a row.
    """
    if context_tokens < 1:
        raise ConfigError(f"context_tokens: {context_tokens} is not positive; give the model's window in tokens.")
    row_tokens = context_tokens + 1
    pieces = _pieces_of(packed, np.asarray(documents, np.int64))
    tokens, atomic = packed.pieces.tokens[pieces].astype(np.int64), packed.pieces.atomic[pieces]
    if not atomic.any():
        return RowPlan(packed, context_tokens, _cut_stream(packed.pieces.start[pieces], tokens, row_tokens))
    longest = int(tokens[atomic].max())
    if longest > row_tokens:
        raise ConfigError(
            f"context_tokens: {context_tokens} is too small for this pack, whose longest pair has {longest} tokens and "
            f"which was made for {packed.context_tokens}; pack the view again with --context-tokens {context_tokens}."
        )
    fit = _fit_pieces(packed.pieces.start[pieces], tokens, atomic, row_tokens, most_rows)
    return RowPlan(packed, context_tokens, fit)


def _pieces_of(packed: PackedTokens, documents: IntArray) -> IntArray:
    """The pieces of `documents`, one after the other."""
    first = packed.pieces.first[documents]
    counts = packed.pieces.first[documents + 1] - first
    ends = np.cumsum(counts)
    pieces: IntArray = np.repeat(first - (ends - counts), counts)
    pieces += np.arange(len(pieces))
    return pieces


def _cut_stream(start: IntArray, tokens: IntArray, row_tokens: int) -> _Slices:
    """Lay the pieces end to end and cut the stream every `row_tokens`."""
    ends = np.cumsum(tokens)
    total = int(ends[-1]) if len(ends) else 0
    borders = np.arange(0, total, row_tokens)
    begins = np.union1d(ends - tokens, borders)
    piece = np.searchsorted(ends, begins, side="right")
    return _Slices(
        first=np.append(np.searchsorted(begins, borders), len(begins)),
        start=start[piece] + begins - (ends - tokens)[piece],
        tokens=np.diff(begins, append=total),
        cut_pairs=0,
    )


def _fit_pieces(
    start: IntArray, tokens: IntArray, atomic: BoolArray, row_tokens: int, most_rows: int | None
) -> _Slices:
    """Fill rows in order. If the next piece is atomic and too long for the gap, look ahead for the best fit."""
    fitter = _Fitter(tokens, atomic, row_tokens)
    while len(fitter.row_first) - 1 != most_rows and fitter.fill_row():
        pass
    piece = np.frombuffer(fitter.piece, np.int64)
    count = np.frombuffer(fitter.count, np.int64)
    return _Slices(
        first=np.frombuffer(fitter.row_first, np.int64),
        start=start[piece] + np.frombuffer(fitter.offset, np.int64),
        tokens=count,
        cut_pairs=int(np.count_nonzero(atomic[piece] & (count < tokens[piece]))),
    )


class _Fitter:
    """The state of a fit: which pieces are placed, and the pieces ahead by length.

    `_ahead` holds, per length, the waiting pieces of the window in order. `_lengths` has bit L set when a piece of
    length L waits, so the best fit for a gap is the highest bit up to it: one operation on a `row_tokens` bit integer.
    A piece that leaves the window, in order or as a best fit, is always the first of its length.
    """

    def __init__(self, tokens: IntArray, atomic: BoolArray, row_tokens: int) -> None:
        self.piece, self.offset, self.count, self.row_first = array("q"), array("q"), array("q"), array("q", [0])
        self._tokens = np.ascontiguousarray(tokens, np.int64).data
        self._atomic = np.ascontiguousarray(atomic).data
        self._row_tokens = row_tokens
        self._placed = bytearray(len(tokens))
        self._next = 0  # every earlier piece is placed
        self._seen = 0  # every earlier piece has entered the window
        self._carry: tuple[int, int] | None = None  # a piece that was cut, and how many of its tokens are placed
        self._ahead: list[deque[int]] = [deque() for _ in range(row_tokens + 1)]
        self._lengths = 0

    def fill_row(self) -> bool:
        """Fill the next row; false when nothing is left."""
        gap = self._place_carry(self._row_tokens)
        gap = self._place_in_order(gap)
        if gap and self._next < len(self._tokens):
            self._place_best_fits(gap)
        if len(self.piece) == self.row_first[-1]:
            return False
        self.row_first.append(len(self.piece))
        return True

    def _record(self, piece: int, offset: int, count: int) -> None:
        self.piece.append(piece)
        self.offset.append(offset)
        self.count.append(count)

    def _place_carry(self, gap: int) -> int:
        if self._carry is None:
            return gap
        piece, offset = self._carry
        count = min(self._tokens[piece] - offset, gap)
        self._record(piece, offset, count)
        self._carry = (piece, offset + count) if offset + count < self._tokens[piece] else None
        return gap - count

    def _place_in_order(self, gap: int) -> int:
        tokens, placed, piece, pieces = self._tokens, self._placed, self._next, len(self._tokens)
        while gap and piece < pieces:
            if not placed[piece]:
                count = tokens[piece]
                if count > gap:
                    if self._atomic[piece]:
                        break
                    self._carry = (piece, gap)
                    count = gap
                self._record(piece, 0, count)
                placed[piece] = 1
                if piece < self._seen:
                    self._leave_window(tokens[piece])
                gap -= count
            piece += 1
        self._next = piece
        return gap

    def _place_best_fits(self, gap: int) -> None:
        self._extend_window()
        while fitting := self._lengths & ((1 << (gap + 1)) - 1):
            count = fitting.bit_length() - 1
            piece = self._leave_window(count)
            self._record(piece, 0, count)
            self._placed[piece] = 1
            gap -= count

    def _extend_window(self) -> None:
        end = min(self._next + LOOK_AHEAD_PIECES, len(self._tokens))
        for piece in range(max(self._seen, self._next), end):
            count = self._tokens[piece]
            if count <= self._row_tokens:
                self._ahead[count].append(piece)
                self._lengths |= 1 << count
        self._seen = max(self._seen, end)

    def _leave_window(self, count: int) -> int:
        """Take the first waiting piece of `count` tokens out of the window. Pieces longer than a row never enter it."""
        if count > self._row_tokens:
            return -1
        queue = self._ahead[count]
        piece = queue.popleft()
        if not queue:
            self._lengths &= ~(1 << count)
        return piece
