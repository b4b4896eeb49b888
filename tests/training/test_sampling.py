"""What is read at a step follows from its number: frequencies, coverage, and independence of the workers."""

from __future__ import annotations

import numpy as np
import pytest

from cert_ray.training.sampling import RowStream, epoch_documents, shuffled_documents, step_positions


class _Numbered:
    """Rows that say which epoch and row they are."""

    def __init__(self, epoch: int, rows: int) -> None:
        self._epoch, self._rows = epoch, rows

    def __len__(self) -> int:
        return self._rows

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return np.array([self._epoch, index]), np.array([True, True])


def test_documents_are_drawn_in_proportion_to_their_weights():
    weights = np.array([0.0, 1.0, 3.0, 0.0, 6.0, 0.0])
    drawn = np.concatenate([epoch_documents(weights, 1, epoch) for epoch in range(5_000)])
    shares = np.bincount(drawn, minlength=6) / len(drawn)
    assert shares[[0, 3, 5]].tolist() == [0, 0, 0]
    assert shares[[1, 2, 4]] == pytest.approx([0.1, 0.3, 0.6], abs=0.015)


def test_an_epoch_is_a_function_of_seed_and_number():
    weights = np.arange(1.0, 100)
    assert epoch_documents(weights, 7, 3).tolist() == epoch_documents(weights, 7, 3).tolist()
    assert epoch_documents(weights, 7, 3).tolist() != epoch_documents(weights, 7, 4).tolist()
    assert epoch_documents(weights, 7, 3).tolist() != epoch_documents(weights, 8, 3).tolist()
    assert sorted(shuffled_documents(50, 7, 3).tolist()) == list(range(50))


@pytest.mark.parametrize("weights", [[0.0, 0.0], [1.0, -1.0], [1.0, np.nan], []])
def test_refuses_weights_that_cannot_be_drawn_from(weights):
    with pytest.raises(ValueError, match="weights"):
        epoch_documents(np.array(weights), 0, 0)


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
