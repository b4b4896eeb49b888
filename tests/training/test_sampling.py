"""What is read at a step follows from its number: frequencies, coverage, and independence of the workers."""

from __future__ import annotations

import numpy as np
import pytest

from cert_ray.training import sampling
from cert_ray.training.sampling import (
    RowStream,
    epoch_documents,
    segment,
    segments_of_an_epoch,
    shuffled_documents,
    step_positions,
)


class _Numbered:
    """Rows that say which epoch and row they are."""

    def __init__(self, epoch: int, rows: int) -> None:
        self._epoch, self._rows = epoch, rows

    def __len__(self) -> int:
        return self._rows

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return np.array([self._epoch, index]), np.array([True, True])


def test_documents_are_drawn_in_proportion_to_their_weights():
    cumulative = np.cumsum([0.0, 1.0, 3.0, 0.0, 6.0, 0.0])
    drawn = np.concatenate([epoch_documents(cumulative, 1, epoch, slice(0, 6)) for epoch in range(5_000)])
    shares = np.bincount(drawn, minlength=6) / len(drawn)
    assert shares[[0, 3, 5]].tolist() == [0, 0, 0]
    assert shares[[1, 2, 4]] == pytest.approx([0.1, 0.3, 0.6], abs=0.015)


def test_an_epoch_is_a_function_of_seed_and_number():
    def drawn(seed: int, epoch: int) -> list[int]:
        return epoch_documents(np.cumsum(np.arange(1.0, 100)), seed, epoch, slice(0, 99)).tolist()

    assert drawn(7, 3) == drawn(7, 3)
    assert drawn(7, 3) != drawn(7, 4)
    assert drawn(7, 3) != drawn(8, 3)
    assert sorted(shuffled_documents(np.arange(50), 7, 3).tolist()) == list(range(50))


@pytest.mark.parametrize("documents", [1, 7, 10, 11, 39, 40])
def test_the_segments_of_an_epoch_have_its_draws_once_each_whatever_their_size(documents, monkeypatch):
    monkeypatch.setattr(sampling, "SEGMENT_DOCUMENTS", 10)
    cumulative = np.cumsum(np.arange(1.0, documents + 1))
    count = segments_of_an_epoch(documents)
    for epoch in (0, 3):
        parts = [segment(documents, epoch * count + place) for place in range(count)]
        assert {found for found, _ in parts} == {epoch}
        assert max(draws.stop - draws.start for _, draws in parts) <= 10
        drawn = np.concatenate([epoch_documents(cumulative, 5, epoch, draws) for _, draws in parts])
        assert drawn.tolist() == epoch_documents(cumulative, 5, epoch, slice(0, documents)).tolist()


def test_an_epoch_of_several_segments_has_the_rows_of_each_in_an_order_of_its_own():
    stream = RowStream(lambda number: _Numbered(number, 30), seed=5, per_epoch=3)
    ids, _ = stream.read(np.arange(180))
    parts = [ids[first : first + 30] for first in range(0, 180, 30)]
    assert [set(part[:, 0].tolist()) for part in parts] == [{number} for number in range(6)]
    assert all(sorted(part[:, 1].tolist()) == list(range(30)) for part in parts)
    assert len({tuple(part[:, 1].tolist()) for part in parts}) == 6
    assert [stream.epoch_of(position) for position in (0, 89, 90, 179)] == [0, 0, 1, 1]
    assert stream.rows_of_an_epoch == 90


@pytest.mark.parametrize(
    ("micro_batch", "workers", "passes"), [(12, 1, 1), (2, 2, 3), (1, 3, 4), (3, 4, 1), (5, 1, 3), (2, 5, 2), (8, 3, 1)]
)
def test_a_step_reads_the_same_rows_on_any_number_of_workers(micro_batch, workers, passes):
    """Also where twelve rows do not share out: then a rank is given some that do not count."""
    read = [step_positions(5, rank, workers, micro_batch, 12) for rank in range(workers)]
    assert all(positions.shape == counted.shape == (passes, micro_batch) for positions, counted in read)
    assert sorted(np.concatenate([positions[counted] for positions, counted in read]).tolist()) == list(range(60, 72))
    assert all(set(positions.ravel().tolist()) <= set(range(60, 72)) for positions, _ in read)


def test_rows_go_on_through_the_epochs_without_gap_or_repeat():
    stream = RowStream(lambda epoch: _Numbered(epoch, 3 + epoch), seed=5)
    ids, mask = stream.read(np.arange(3 + 4 + 5))
    assert mask.all()
    expected = [(epoch, row) for epoch in range(3) for row in range(3 + epoch)]
    assert sorted(map(tuple, ids.tolist())) == expected
    assert ids[:, 0].tolist() == [0] * 3 + [1] * 4 + [2] * 5


def test_a_row_can_be_read_without_those_before_it():
    whole = RowStream(lambda epoch: _Numbered(epoch, 10), seed=5).read(np.arange(40))[0]
    for start in (39, 17, 0, 25):
        late = RowStream(lambda epoch: _Numbered(epoch, 10), seed=5)
        assert late.read(np.array([start]))[0].tolist() == [whole[start].tolist()]


def test_known_ends_spare_the_planning_of_epochs_that_are_over():
    planned: list[int] = []

    def plan(epoch: int) -> _Numbered:
        planned.append(epoch)
        return _Numbered(epoch, 3 + epoch)

    before = RowStream(plan, seed=5)
    ids, _ = before.read(np.arange(20, 25))  # epoch 4 has rows 18 to 24
    planned.clear()
    after = RowStream(plan, seed=5, ends=before.ends)
    assert after.read(np.arange(20, 25))[0].tolist() == ids.tolist()
    assert planned == [4]
    assert after.locate(0) == (0, 0)


def test_a_run_of_an_earlier_version_goes_on_with_the_rows_that_it_would_have_read():
    """As first written down: whatever changes these, NumPy's generators too, makes unfinished runs other ones."""
    cumulative = np.cumsum(np.arange(1.0, 101))
    assert epoch_documents(cumulative, 7, 3, slice(0, 8)).tolist() == [72, 22, 88, 93, 95, 67, 45, 73]
    assert shuffled_documents(np.arange(100), 7, 3)[:8].tolist() == [71, 45, 85, 38, 49, 67, 20, 41]
    stream = RowStream(lambda number: _Numbered(number, 10), 7, per_epoch=2)
    places = [6, 8, 1, 3, 0, 9, 2, 7, 4, 5, 2, 7, 0, 6, 4, 9, 5, 1, 3, 8, 4, 1, 7, 2, 5, 3, 6, 8, 9, 0]
    assert stream.read(np.arange(30))[0].tolist() == [[row // 10, place] for row, place in enumerate(places)]
    assert sampling.SEGMENT_DOCUMENTS == 131_072
