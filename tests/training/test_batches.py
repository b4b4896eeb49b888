"""What a run reads of a pack, counted by hand: which documents, how often, and never the held-out ones."""

from __future__ import annotations

import numpy as np
import pytest

from cert_ray.tokens.shards import PackedTokens
from cert_ray.tokens.vocabulary import load_tokenizer
from cert_ray.training.batches import Batches
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


@pytest.mark.parametrize("workers", [1, 3])
def test_the_held_out_documents_are_evaluated_on_once_by_all_workers_together(packed, make_config, workers):
    config = make_config()
    read = sum(_readings(Batches(packed, config, rank, workers).held_out()) for rank in range(workers))
    assert read.tolist() == [1, 0, 1, 0, 0, 0]
