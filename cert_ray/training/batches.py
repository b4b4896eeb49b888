"""The rows that one rank reads, as tensors. In: a pack, a `TrainConfig`, a rank. Out: micro batches by step number.

`sampling` and `tokens.packing` decide which rows these are. They are pure functions, so a step's rows can be read
without earlier ones, and are the same on any number of ranks.
"""

from __future__ import annotations

import functools
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from cert_ray.errors import InputError
from cert_ray.tokens.index import IntArray
from cert_ray.tokens.packing import LOOK_AHEAD_PIECES, plan_rows
from cert_ray.tokens.shards import PackedTokens
from cert_ray.training.config import TrainConfig
from cert_ray.training.sampling import (
    Rows,
    RowStream,
    epoch_documents,
    segment,
    segments_of_an_epoch,
    shuffled_documents,
    step_positions,
)

Batch = tuple[torch.Tensor, torch.Tensor]  # ids and mask, [B, T + 1]


class Batches:
    """What one rank of a run reads."""

    def __init__(
        self, packed: PackedTokens, config: TrainConfig, rank: int, world_size: int, ends: Sequence[int] = ()
    ) -> None:
        """`ends` come from an earlier part of the run, as in `RowStream`.

        Raises:
            InputError: see `training_rows`.
        """
        self._config, self._rank, self._world_size = config, rank, world_size
        self._rows = training_rows(packed, config, ends)
        self._held_out = held_out_rows(packed, config.eval_rows)

    @property
    def ends(self) -> list[int]:
        """Where in the run's rows each segment ends, as far as was needed."""
        return self._rows.ends

    @property
    def rows_of_an_epoch(self) -> int:
        """About how many rows the first epoch has; others differ a little, since documents are drawn anew."""
        return self._rows.rows_of_an_epoch

    def of_step(self, step: int) -> list[Batch]:
        """This rank's micro batches of `step`. All ranks have the same number; rows that fill it up are masked."""
        config = self._config
        positions, counted = step_positions(
            step, self._rank, self._world_size, config.micro_batch, config.rows_per_step
        )
        batches = []
        for row, of_step in zip(positions, counted, strict=True):
            ids, mask = self._rows.read(row)
            batches.append(_tensors(ids, mask & of_step[:, None]))
        return batches

    def read_ahead(self, first: int, last: int) -> Generator[tuple[int, list[Batch]]]:
        """Epoch and `of_step` of each step from `first` up to, but not including, `last`. Closing it ends its thread.

        While the caller works on a step, the thread reads the next step's rows; an error there is raised at that step.
        """
        with ThreadPoolExecutor(1, "rows") as reader:
            coming: Future[list[Batch]] | None = None
            for step in range(first, last):
                batches = self.of_step(step) if coming is None else coming.result()
                epoch = self.epoch_of(step)  # before the thread continues, since both may plan a segment
                coming = reader.submit(self.of_step, step + 1) if step + 1 < last else None
                yield epoch, batches

    def epoch_of(self, step: int) -> int:
        """The epoch of the first row of `step`."""
        return self._rows.epoch_of(step * self._config.rows_per_step)

    def held_out(self) -> Iterator[Batch]:
        """This rank's share of the held-out rows, read lazily. All ranks have as many batches, some of them masked."""
        size, available = self._config.micro_batch, len(self._held_out)
        count = min(available, self._config.eval_rows or available)
        for first in range(self._rank * size, _round_up(count, size * self._world_size), size * self._world_size):
            indices = np.arange(first, first + size)
            ids, mask = _read(self._held_out, np.minimum(indices, count - 1))
            mask[indices >= count] = False
            yield _tensors(ids, mask)


def training_rows(packed: PackedTokens, config: TrainConfig, ends: Sequence[int] = ()) -> RowStream:
    """The rows to train on, from the documents that are not held out; `ends` as in `RowStream`.

    Raises:
        InputError: when there is no such document, or all weights are 0 although documents are drawn by weight.
    """
    held_out, cumulative = packed.documents.held_out, packed.documents.cumulative
    count = len(packed) - int(np.count_nonzero(held_out))
    if count == 0 or (config.resampling == "weighted" and not cumulative[-1] > 0):
        raise InputError(
            config.tokens,
            f"none of its {len(packed)} documents can be trained on (held out, or without weight)",
            "Pack more documents, or lower the held-out fraction.",
        )

    @functools.lru_cache(maxsize=1)
    def shuffled(epoch: int) -> Any:
        return shuffled_documents(np.flatnonzero(~held_out).astype(np.uint32), config.seed, epoch)

    def plan_segment(number: int) -> Rows:
        epoch, draws = segment(count, number)
        if config.resampling == "weighted":
            documents = epoch_documents(cumulative, config.seed, epoch, draws)
        else:
            documents = shuffled(epoch)[draws]
        return plan_rows(packed, documents, packed.context_tokens)

    return RowStream(plan_segment, config.seed, ends, segments_of_an_epoch(count))


def held_out_rows(packed: PackedTokens, most_rows: int | None = None) -> Rows:
    """The rows of the held-out documents, each document once, in order; at least the first `most_rows`, if given."""
    documents = np.flatnonzero(packed.documents.held_out)
    if most_rows is not None:  # enough documents to fill them, plus the look-ahead of the fit
        enough = most_rows * (packed.context_tokens + 1)
        sizes = np.cumsum(packed.documents.tokens[documents])
        documents = documents[: int(np.searchsorted(sizes, enough)) + 1 + LOOK_AHEAD_PIECES]
    return plan_rows(packed, documents, packed.context_tokens, most_rows)


def _read(rows: Rows, indices: IntArray) -> tuple[IntArray, Any]:
    found = [rows.row(int(index)) for index in indices]
    return np.stack([ids for ids, _ in found]), np.stack([mask for _, mask in found])


def _tensors(ids: Any, mask: Any) -> Batch:
    return torch.from_numpy(ids), torch.from_numpy(mask)


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
