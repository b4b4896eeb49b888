"""What a run reads of a pack, counted by hand: which documents, how often, and never the held-out ones."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from cert_ray.tokens.shards import PackedTokens
from cert_ray.tokens.vocabulary import load_tokenizer
from cert_ray.training import batches as batches_module
from cert_ray.training import sampling
from cert_ray.training.batches import Batches, held_out_rows
from tests.tokens import packs
from tests.training.conftest import write_documents

EPOCHS = 400
FIRST_WORD = 2  # ids 0 and 1 are the end of a document and padding
WEIGHTS = [5.0, 1.0, 9.0, 0.0, 3.0, 6.0]
HELD_OUT = [True, False, True, False, False, False]
LENGTHS = [5, 6, 7, 8, 9, 10]


@pytest.fixture
def packed(tmp_path, tokenizer_folder):
    """Document d is one word, its own, `LENGTHS[d]` times."""
    documents = [
        ([FIRST_WORD + number] * length, weight, held_out)
        for number, (length, weight, held_out) in enumerate(zip(LENGTHS, WEIGHTS, HELD_OUT, strict=True))
    ]
    write_documents(tmp_path / "pack", load_tokenizer(str(tokenizer_folder)), documents)
    return PackedTokens.open(str(tmp_path / "pack"))


def _readings(batches) -> np.ndarray:
    """How often each document stands in `batches`, in what counts for the loss or begins a row."""
    words = np.zeros(len(LENGTHS))
    for ids, mask in batches:
        counted = ids[mask.any(dim=1)].numpy().ravel()
        words += np.bincount(counted, minlength=FIRST_WORD + len(LENGTHS))[FIRST_WORD : FIRST_WORD + len(LENGTHS)]
    return words / LENGTHS


def _epochs(batches: Batches):
    """Of each of the first `EPOCHS` epochs, the documents' readings; a step is a row here."""
    step = 0
    for epoch in range(EPOCHS):
        read = []
        while batches.epoch_of(step) == epoch:
            read += batches.of_step(step)
            step += 1
        yield _readings(read)


def test_weighted_epochs_read_documents_in_proportion_and_never_held_out_ones(packed, make_config):
    read = list(_epochs(Batches(packed, make_config(micro_batch=1), 0, 1)))
    assert all(epoch.sum() == HELD_OUT.count(False) for epoch in read)  # as many as there are to train on
    shares = sum(read) / sum(read).sum()
    assert shares[[0, 2, 3]].tolist() == [0, 0, 0]  # held out, held out, without weight
    assert shares[[1, 4, 5]] == pytest.approx([0.1, 0.3, 0.6], abs=0.03)


def test_uniform_epochs_read_each_document_once_whatever_its_weight(packed, make_config):
    for epoch in _epochs(Batches(packed, make_config(micro_batch=1, resampling="uniform"), 0, 1)):
        assert epoch.tolist() == [0, 1, 0, 1, 1, 1]


@pytest.mark.parametrize("resampling", ["weighted", "uniform"])
def test_epochs_of_several_segments_read_the_documents_of_epochs_of_one(packed, make_config, monkeypatch, resampling):
    config = make_config(micro_batch=1, resampling=resampling)
    whole = [epoch.tolist() for epoch in itertools.islice(_epochs(Batches(packed, config, 0, 1)), 20)]
    monkeypatch.setattr(sampling, "SEGMENT_DOCUMENTS", 2)
    parts = Batches(packed, config, 0, 1)
    assert [epoch.tolist() for epoch in itertools.islice(_epochs(parts), 20)] == whole
    assert len(parts.ends) >= 2 * 20
    late = Batches(packed, config, 0, 1, parts.ends[:-1])
    assert late.of_step(parts.ends[-3])[0][0].tolist() == parts.of_step(parts.ends[-3])[0][0].tolist()


@pytest.mark.parametrize("atomic", [True, False])
def test_some_held_out_rows_are_the_first_of_all(tmp_path, monkeypatch, atomic):
    """Each of 4,000 documents, of which every second is held out, has two pieces of random lengths."""
    rng = np.random.default_rng(2)
    documents = [[([7] * count, atomic) for count in rng.integers(1, 9, 2)] for _ in range(4_000)]
    packed = PackedTokens.open(packs.write_pack(tmp_path, [documents]))
    whole, planned = held_out_rows(packed), []
    plan_rows = batches_module.plan_rows
    monkeypatch.setattr(
        batches_module, "plan_rows", lambda *given: (planned.append(len(given[1])), plan_rows(*given))[1]
    )
    some = held_out_rows(packed, 100)
    assert planned[0] < 1_000
    assert len(some) >= 100
    for index in range(100):
        assert all(np.array_equal(one, other) for one, other in zip(some.row(index), whole.row(index), strict=True))


@pytest.mark.parametrize("workers", [1, 3])
def test_the_held_out_documents_are_evaluated_on_once_by_all_workers_together(packed, make_config, workers):
    config = make_config()
    read = sum(_readings(Batches(packed, config, rank, workers).held_out()) for rank in range(workers))
    assert read.tolist() == [1, 0, 1, 0, 0, 0]
