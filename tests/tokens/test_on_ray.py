from __future__ import annotations

from pathlib import Path

import pytest

from cert_ray.tokens.encoding import PackConfig, View
from cert_ray.tokens.on_ray import pack_dataset
from cert_ray.tokens.pack import pack_in_process
from cert_ray.tokens.vocabulary import TokenizerConfig, train_on_dataset
from tests.tokens.datasets import example, write_dataset


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")  # raised by its own defaults
def test_a_pack_has_the_same_bytes_on_any_number_of_workers(ray_cluster: None, tmp_path: Path) -> None:
    shards = [[example(number) for number in range(first, first + 9)] for first in range(0, 36, 9)]
    dataset = write_dataset(str(tmp_path / "dataset"), shards)
    tokenizer = str(tmp_path / "tokenizer")
    train_on_dataset(dataset, tokenizer, TokenizerConfig(vocab_size=400), seed=0)
    config = PackConfig(view=View.GENERATOR, context_tokens=64, libraries=("numpy",), held_out_fraction=0.2)
    pack_in_process(dataset, tokenizer, str(tmp_path / "plain"), config)
    expected = contents(tmp_path / "plain")
    assert len([name for name in expected if name.endswith(".bin")]) == 4
    for workers in (1, 3):
        output = tmp_path / f"workers-{workers}"
        pack_dataset(dataset, tokenizer, str(output), config, workers)
        assert contents(output) == expected
