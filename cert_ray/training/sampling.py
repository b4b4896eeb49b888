"""Which rows a step reads, as pure functions of (weights, seed, epoch, step, rank): resuming replays nothing.

In: documents with weights and a plan of rows. Out: for step s and rank r, the rows to read. Each epoch draws its
documents anew, as in the paper, and takes them in segments of bounded size, so that what is planned at once does not
grow with the pack. A segment's documents are laid out as rows, and the rows are shuffled, so that the rows of a long
document do not all come in one step. Segments and rows are numbered continuously through the epochs.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from cert_ray.tokens.index import BoolArray, FloatArray, IntArray

_DOCUMENTS, _ROWS = 1, 2  # so that the two draws of an epoch are independent
# Planning these as pairs takes 1 s (docs/benchmarks.md, "Large packs"): 220 million tokens, at 1,667 per document.
SEGMENT_DOCUMENTS = 1 << 17


class Rows(Protocol):
    """The part of a `tokens.packing.RowPlan` that is needed here."""

    def __len__(self) -> int:
        """How many rows there are."""

    def row(self, index: int) -> tuple[IntArray, BoolArray]:
        """Token ids and loss mask of one row, both [context_tokens + 1]."""


def segments_of_an_epoch(documents: int) -> int:
    """How many segments, as equal as possible, an epoch of `documents` has."""
    return -(-documents // SEGMENT_DOCUMENTS)


def segment(documents: int, number: int) -> tuple[int, slice]:
    """The epoch that segment `number` belongs to, and which of the epoch's draws it takes."""
    segments = segments_of_an_epoch(documents)
    epoch, place = divmod(number, segments)
    return epoch, slice(place * documents // segments, (place + 1) * documents // segments)


def epoch_documents(cumulative: FloatArray, seed: int, epoch: int, draws: slice) -> IntArray:
    """Indices of documents, drawn with replacement by weight, in reading order; only the slice `draws` of an epoch.

    `cumulative` holds the running sums of weights that are finite and not negative; the last sum is positive.
    """
    generator = np.random.default_rng([seed, epoch, _DOCUMENTS])
    generator.bit_generator.advance(draws.start)  # type: ignore[attr-defined]  # PCG64: one step per number
    places = generator.random(draws.stop - draws.start) * cumulative[-1]
    drawn: IntArray = np.searchsorted(cumulative, places, side="right").astype(np.int64)
    # Rounding may move a draw to the very end, where documents without weight may be.
    last = int(np.searchsorted(cumulative, cumulative[-1], side="left"))
    drawn[drawn > last] = last
    return drawn


def shuffled_documents(documents: npt.NDArray[Any], seed: int, epoch: int) -> npt.NDArray[Any]:
    """Each of `documents` once, in this epoch's own order."""
    return np.random.default_rng([seed, epoch, _DOCUMENTS]).permutation(documents)


def micro_batches(rows_per_step: int, micro_batch: int, world_size: int) -> int:
    """How many micro batches each of `world_size` ranks needs to read `rows_per_step` rows."""
    return -(-rows_per_step // (micro_batch * world_size))


def step_positions(
    step: int, rank: int, world_size: int, micro_batch: int, rows_per_step: int
) -> tuple[IntArray, BoolArray]:
    """Numbers of the rows that `rank` reads in `step`, and whether each counts, both [micro_batches, micro_batch].

    Together, the ranks read each row of the step once; which rows these are depends only on `step` and `rows_per_step`.
    If the ranks cannot share them evenly, the step's last row fills the gaps, without being counted.
    """
    blocks = np.arange(micro_batches(rows_per_step, micro_batch, world_size)) * world_size + rank
    places = blocks[:, None] * micro_batch + np.arange(micro_batch)[None, :]
    return step * rows_per_step + np.minimum(places, rows_per_step - 1), places < rows_per_step


class RowStream:
    """Rows numbered through all segments, each read by its number. Only segments in use keep their plan."""

    def __init__(
        self, plan_segment: Callable[[int], Rows], seed: int, ends: Sequence[int] = (), per_epoch: int = 1
    ) -> None:
        """`plan_segment` returns the rows of a segment, the same at every call; an epoch has `per_epoch` segments.

        `ends`, from an earlier stream over the same rows, saves planning segments that are over.
        """
        self._plan_segment = plan_segment
        self._seed = seed
        self._per_epoch = per_epoch
        self.ends = list(ends)  # where the rows of segments 0, 1, ... end, as far as was needed
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
        """How many rows an epoch has, estimated from its first segment; others differ a little."""
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
            # An epoch's first segment is seeded as if there were no other: a trailing zero does not change the seed.
            seeds = [self._seed, number // self._per_epoch, _ROWS, number % self._per_epoch]
            self._open[number] = (plan, np.random.default_rng(seeds).permutation(len(plan)).astype(np.int64))
        return self._open[number]
