from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cert_ray.errors import InputError, NotFinishedError
from cert_ray.tokens.dataset import choose, common_libraries, draw_sample, open_dataset, sampled_texts, uniform_of_hash
from tests.tokens.datasets import document, example, write_dataset


def test_a_sample_stays_within_its_bytes_and_comes_in_dataset_order(tmp_path: Path) -> None:
    rows = [document(f"x = {number:04d}\n") for number in range(1_000)]
    dataset = open_dataset(write_dataset(str(tmp_path), [rows[:300], [], rows[300:]]))
    sample = draw_sample(dataset, sample_bytes=900, seed=1)
    texts = list(sampled_texts(dataset, sample))
    assert (len(texts), sample.documents, sample.size_bytes) == (100, 100, 900)
    assert texts == sorted(texts)
    assert texts != list(sampled_texts(dataset, draw_sample(dataset, sample_bytes=900, seed=2)))


def test_a_sample_does_not_depend_on_how_documents_are_sharded(tmp_path: Path) -> None:
    rows = [document(f"x = {number:04d}\n", weight=1 + number % 3) for number in range(200)]
    one = open_dataset(write_dataset(str(tmp_path / "one"), [rows]))
    three = open_dataset(write_dataset(str(tmp_path / "three"), [rows[:7], rows[7:150], rows[150:]]))
    samples = [list(sampled_texts(dataset, draw_sample(dataset, 500, seed=0))) for dataset in (one, three)]
    assert samples[0] == samples[1]


def test_documents_are_drawn_in_proportion_to_their_weights() -> None:
    uniforms = np.array([uniform_of_hash(str(number), 3) for number in range(40_000)])
    weights = np.where(np.arange(40_000) % 2, 3.0, 1.0)
    chosen = choose(uniforms, weights, np.ones(40_000, np.int64), limit_bytes=1_000)
    assert chosen.sum() == 1_000
    assert chosen[1::2].mean() / chosen[::2].mean() == pytest.approx(3.0, rel=0.2)


def test_a_weight_of_zero_is_never_drawn_and_one_document_always_is() -> None:
    uniforms, sizes = np.array([0.1, 0.5, 0.9]), np.array([10, 10, 10])
    assert choose(uniforms, np.array([0.0, 1.0, 1.0]), sizes, 1_000).tolist() == [False, True, True]
    assert choose(uniforms, np.ones(3), sizes, 1).tolist() == [False, False, True]
    assert not choose(uniforms, np.zeros(3), sizes, 1_000).any()


def test_a_dataset_without_documents_or_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFinishedError, match="cert-ray preprocess"):
        open_dataset(str(tmp_path / "nothing"))
    with pytest.raises(InputError, match="holds no document"):
        open_dataset(write_dataset(str(tmp_path / "empty"), [[]]))
    weightless = open_dataset(write_dataset(str(tmp_path / "weightless"), [[document("x = 1\n", weight=0.0)]]))
    with pytest.raises(InputError, match="positive weight"):
        draw_sample(weightless, 100, seed=0)


def test_libraries_are_counted_by_documents(tmp_path: Path) -> None:
    shards = [[example(0), example(1)], [example(2), document("x\n", libraries=["numpy", "pandas"])]]
    dataset = open_dataset(write_dataset(str(tmp_path), shards))
    assert common_libraries(dataset, 2) == [("numpy", 3), ("os", 1)]
