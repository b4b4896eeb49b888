"""Which rows a step reads, as pure functions of (weights, seed, epoch, step, rank): resuming replays nothing.

In: documents with weights and a plan of rows. Out: for step s and rank r, the rows to read. An epoch draws its
documents anew (PAPER "Resampling") and takes them in segments of bounded size, so that what is planned at once does not
grow with the pack. A segment's documents are laid out as rows, and the rows shuffled, so that those of a long document
do not meet in one step. Segments and rows are numbered through the epochs without a gap.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from cert_ray.tokens.index import BoolArray, FloatArray, IntArray

_DOCUMENTS, _ROWS = 1, 2  # so that the two draws of an epoch are independent
# 1 s to plan as pairs (docs/benchmarks.md, "Large packs"); 220 million tokens of documents of 1,667.
SEGMENT_DOCUMENTS = 1 << 17


class Rows(Protocol):
    """What is needed of a `tokens.packing.RowPlan`."""

    def __len__(self) -> int:
        """How many rows there are."""

    def row(self, index: int) -> tuple[IntArray, BoolArray]:
        """Token ids and loss mask of one row, both [context_tokens + 1]."""


def segments_of_an_epoch(documents: int) -> int:
    """How many segments, as equal as can be, an epoch of so many documents has."""
    return -(-documents // SEGMENT_DOCUMENTS)


def segment(documents: int, number: int) -> tuple[int, slice]:
    """The epoch that segment `number` belongs to, and which of the epoch's draws it has."""
    segments = segments_of_an_epoch(documents)
    epoch, place = divmod(number, segments)
    return epoch, slice(place * documents // segments, (place + 1) * documents // segments)


def epoch_documents(cumulative: FloatArray, seed: int, epoch: int, draws: slice) -> IntArray:
    """Indices of documents, drawn with replacement by weight, in reading order: those of an epoch's `draws` only.

    `cumulative` are the weights, finite and not negative, each with those before it; the last one is positive.
    """
    generator = np.random.default_rng([seed, epoch, _DOCUMENTS])
    generator.bit_generator.advance(draws.start)  # type: ignore[attr-defined]  # PCG64: a step for each number
    places = generator.random(draws.stop - draws.start) * cumulative[-1]
    drawn: IntArray = np.searchsorted(cumulative, places, side="right").astype(np.int64)
    # Rounding may carry a draw to the very end; documents without weight may stand there.
    last = int(np.searchsorted(cumulative, cumulative[-1], side="left"))
    drawn[drawn > last] = last
    return drawn


def shuffled_documents(documents: npt.NDArray[Any], seed: int, epoch: int) -> npt.NDArray[Any]:
    """Each of `documents` once, in an order of this epoch's own."""
    return np.random.default_rng([seed, epoch, _DOCUMENTS]).permutation(documents)


def micro_batches(rows_per_step: int, micro_batch: int, world_size: int) -> int:
    """How many micro batches each of `world_size` ranks takes to read `rows_per_step` rows."""
    return -(-rows_per_step // (micro_batch * world_size))


def step_positions(
    step: int, rank: int, world_size: int, micro_batch: int, rows_per_step: int
) -> tuple[IntArray, BoolArray]:
    """Numbers of the rows that `rank` reads in `step`, and whether each counts, both [micro_batches, micro_batch].

    Together the ranks read each row of the step once, and which rows those are depends on `step` and `rows_per_step`
    alone. Where the ranks cannot share them evenly, the step's last row stands in for what is missing, not counted.
    """
    blocks = np.arange(micro_batches(rows_per_step, micro_batch, world_size)) * world_size + rank
    places = blocks[:, None] * micro_batch + np.arange(micro_batch)[None, :]
    return step * rows_per_step + np.minimum(places, rows_per_step - 1), places < rows_per_step


class RowStream:
    """Rows numbered through all segments, each read by its number. Only the segments in use hold their plan."""

    def __init__(
        self, plan_segment: Callable[[int], Rows], seed: int, ends: Sequence[int] = (), per_epoch: int = 1
    ) -> None:
        """`plan_segment` gives the rows of a segment, the same at every call; an epoch has `per_epoch` of them.

        `ends`, of an earlier stream over the same rows, spare it the planning of segments that are over.
        """
        self._plan_segment = plan_segment
        self._seed = seed
        self._per_epoch = per_epoch
        self.ends = list(ends)  # of the rows of segments 0, 1, ..., as far as they were needed
        self._open: dict[int, tuple[Rows, IntArray]] = {}

    def locate(self, position: int) -> tuple[int, int]:
        """The segment that holds row number `position`, and its place in that segment."""
        while not self.ends or position >= self.ends[-1]:
            rows = len(self._segment(len(self.ends))[0])
            assert rows > 0, "a segment has documents, so it has rows"
            self.ends.append((self.ends[-1] if self.ends else 0) + rows)
        number = bisect_right(self.ends, position)
        return number, position - (self.ends[number - 1] if number else 0)

    def epoch_of(self, position: int) -> int:
        """The epoch of row number `position`."""
        return self.locate(position)[0] // self._per_epoch

    @property
    def rows_of_an_epoch(self) -> int:
        """How many rows an epoch has, by its first segment: others differ a little."""
        self.locate(0)
        return self.ends[0] * self._per_epoch

    def read(self, positions: IntArray) -> tuple[IntArray, BoolArray]:
        """Ids and loss mask of the rows numbered `positions` [n]: both [n, context_tokens + 1]."""
        found = [self._row(int(position)) for position in positions]
        return np.stack([ids for ids, _ in found]), np.stack([mask for _, mask in found])

    def _row(self, position: int) -> tuple[IntArray, BoolArray]:
        number, place = self.locate(position)
        plan, order = self._segment(number)
        return plan.row(int(order[place]))

    def _segment(self, number: int) -> tuple[Rows, IntArray]:
        if number not in self._open:
            self._open = {near: kept for near, kept in self._open.items() if near == number - 1}
            plan = self._plan_segment(number)
            # Of an epoch's first segment as if there were no other: a zero at the end seeds alike.
            seeds = [self._seed, number // self._per_epoch, _ROWS, number % self._per_epoch]
            self._open[number] = (plan, np.random.default_rng(seeds).permutation(len(plan)).astype(np.int64))
        return self._open[number]
