"""A storage that fails at every file once: one run comes to its end, with the bytes of a run that nothing disturbed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cert_ray import retries
from cert_ray.dataset.on_ray import preprocess
from cert_ray.dataset.options import PreprocessConfig
from tests.chaos import faulty_storage
from tests.chaos.run import compare, tree
from tests.dataset.builders import in_this_process, write_corpus

pytestmark = pytest.mark.slow


def test_one_run_outlasts_a_failure_at_every_file_that_tasks_and_driver_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_corpus(tmp_path / "corpus")
    marks = tmp_path / "marks"
    marks.mkdir()
    monkeypatch.setenv(faulty_storage.VARIABLE, json.dumps({"fail_every": 1, "marks": str(marks)}))
    monkeypatch.setattr(retries, "_wait", lambda seconds: None)
    faulty_storage.register()
    corpus = str(tmp_path / "corpus")
    given = {"inputs": [corpus], "unit_bytes": 20_000}
    with in_this_process():
        calm = preprocess(PreprocessConfig.model_validate({"sources": given}), str(tmp_path / "calm"))
        assert list(marks.iterdir()) == []
        failing = preprocess(PreprocessConfig.model_validate({"sources": given}), f"faulty://{tmp_path}/failing")
    assert failing == calm
    expected = tree(tmp_path / "calm")
    compare(1, tree(tmp_path / "failing"), expected)
    assert {"dedup/clusters/shard-00001.parquet", "documents/manifest.json"} <= set(expected)
    card = Path("dataset", "card", "card.html")
    assert (tmp_path / "failing" / card).read_bytes() == (tmp_path / "calm" / card).read_bytes()
    assert len(list(marks.iterdir())) > len(expected)  # one at least for each of them, and for the card
