"""Which rows a step reads, as pure functions of (weights, seed, epoch, step, rank): resuming replays nothing.

In: documents with weights and a plan of rows per epoch. Out: for step s and rank r, the rows to read. An epoch draws
its documents anew (PAPER "Resampling"), lays them out as rows, and shuffles the rows, so that the rows of a long
document do not meet in one step. Rows are numbered through the epochs without a gap.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

_DOCUMENTS, _ROWS = 1, 2  # so that the two draws of an epoch are independent


class Rows(Protocol):
    """What is needed of a `tokens.packing.RowPlan`."""

    def __len__(self) -> int:
        """How many rows there are."""

    def row(self, index: int) -> tuple[IntArray, BoolArray]:
        """Token ids and loss mask of one row, both [context_tokens + 1]."""


def epoch_documents(weights: FloatArray, seed: int, epoch: int) -> IntArray:
    """Indices of `len(weights)` documents, drawn with replacement in proportion to `weights`, in reading order.

    Raises:
        ValueError: when a weight is negative or not finite, or none is positive.
    """
    if not np.all(np.isfinite(weights)) or np.any(weights < 0) or not np.any(weights > 0):
        raise ValueError(f"weights must be finite, not negative, and not all zero (of {len(weights)})")
    ends = np.cumsum(weights)
    draws = np.random.default_rng([seed, epoch, _DOCUMENTS]).random(len(weights)) * ends[-1]
    drawn: IntArray = np.searchsorted(ends, draws, side="right").astype(np.int64)
    last = int(np.flatnonzero(weights)[-1])
    drawn[drawn > last] = last  # rounding may carry a draw to the very end
    return drawn


def shuffled_documents(count: int, seed: int, epoch: int) -> IntArray:
    """Every index below `count` once, in an order of this epoch's own."""
    return np.random.default_rng([seed, epoch, _DOCUMENTS]).permutation(count).astype(np.int64)


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
    """Rows numbered through all epochs, each read by its number. Only the epochs in use hold their plan."""

    def __init__(self, plan_epoch: Callable[[int], Rows], seed: int, ends: Sequence[int] = ()) -> None:
        """`plan_epoch` gives the rows of an epoch, the same at every call.

        `ends`, of an earlier stream over the same rows, spare it the planning of epochs that are over.
        """
        self._plan_epoch = plan_epoch
        self._seed = seed
        self.ends = list(ends)  # of the rows of epochs 0, 1, ..., as far as they were needed
        self._open: dict[int, tuple[Rows, IntArray]] = {}

    def locate(self, position: int) -> tuple[int, int]:
        """The epoch that holds row number `position`, and its place in that epoch."""
        while not self.ends or position >= self.ends[-1]:
            rows = len(self._epoch(len(self.ends))[0])
            assert rows > 0, "an epoch has documents, so it has rows"
            self.ends.append((self.ends[-1] if self.ends else 0) + rows)
        epoch = bisect_right(self.ends, position)
        return epoch, position - (self.ends[epoch - 1] if epoch else 0)

    def read(self, positions: IntArray) -> tuple[IntArray, BoolArray]:
        """Ids and loss mask of the rows numbered `positions` [n]: both [n, context_tokens + 1]."""
        found = [self._row(int(position)) for position in positions]
        return np.stack([ids for ids, _ in found]), np.stack([mask for _, mask in found])

    def _row(self, position: int) -> tuple[IntArray, BoolArray]:
        epoch, place = self.locate(position)
        plan, order = self._epoch(epoch)
        return plan.row(int(order[place]))

    def _epoch(self, epoch: int) -> tuple[Rows, IntArray]:
        if epoch not in self._open:
            self._open = {near: kept for near, kept in self._open.items() if near == epoch - 1}
            plan = self._plan_epoch(epoch)
            order = np.random.default_rng([self._seed, epoch, _ROWS]).permutation(len(plan)).astype(np.int64)
            self._open[epoch] = (plan, order)
        return self._open[epoch]
