"""A finished dataset that another one is about to replace is told of, with what differs, before anything is removed."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cert_ray import manifests
from cert_ray.dataset import on_ray
from cert_ray.dataset.on_ray import preprocess
from cert_ray.dataset.options import PreprocessConfig
from tests.dataset.builders import FILE, in_this_process

pytestmark = pytest.mark.slow


def write_files(folder: Path, *indices: int) -> Path:
    folder.mkdir(exist_ok=True)
    for index in indices:
        (folder / f"{index}.py").write_text(FILE.format(index=index, library="pandas"))
    return folder


def config(inputs: Path, **options: object) -> PreprocessConfig:
    return PreprocessConfig.from_mapping({"sources": {"inputs": [str(inputs)]}, **options}, "test")


@pytest.fixture
def corpus(tmp_path: Path) -> Iterator[Path]:
    """A finished run of this corpus stands beside it."""
    corpus = write_files(tmp_path / "corpus", 1, 2)
    with in_this_process():
        preprocess(config(corpus), str(tmp_path / "run"))
        yield corpus


def told(caplog: pytest.LogCaptureFixture, options: PreprocessConfig, run: Path) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING, "cert_ray"):
        preprocess(options, str(run))
    return [line.getMessage() for line in caplog.records]


def test_what_differs_is_named_while_the_earlier_dataset_still_stands(
    corpus: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = corpus.parent / "run"

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    others = write_files(corpus.parent / "others", 3)
    lines: list[tuple[str, bool]] = []

    def noted(text: str, *values: object) -> None:
        lines.append((text % values, manifests.is_finished(str(run / "dataset"))))

    with monkeypatch.context() as patched:
        patched.setattr(on_ray, "_preprocess", stopped)
        patched.setattr(manifests.logger, "warning", noted)
        with pytest.raises(KeyboardInterrupt):
            preprocess(config(others, cleaning={"min_ascii_share": 0.5}, sketch_kind="names"), str(run))
    names = "preprocess.sources.inputs, preprocess.cleaning.min_ascii_share, preprocess.sketch_kind"
    line = f"dataset: {run / 'dataset'} holds what was finished with other {names}: it is replaced. "
    assert lines == [(f"{line}Give each a `run` of its own to keep both.", True)]
    preprocess(config(corpus), str(run))
    (one,) = told(caplog, config(others), run)
    assert "preprocess.sources.inputs:" in one
    assert told(caplog, config(others), run) == []


@pytest.mark.parametrize("change", ["another", "rewritten"])
def test_inputs_that_hold_something_else_are_told_of(
    corpus: Path, caplog: pytest.LogCaptureFixture, change: str
) -> None:
    if change == "another":
        write_files(corpus, 3)
    else:
        (corpus / "1.py").write_text((corpus / "1.py").read_text().replace("number 1", "number 9"))
        os.utime(corpus / "1.py", (1, 1))
    (line,) = told(caplog, config(corpus), corpus.parent / "run")
    assert "finished with other contents of the inputs" in line


def test_growing_resuming_and_measuring_anew_replace_nothing(corpus: Path, caplog: pytest.LogCaptureFixture) -> None:
    run, later = corpus.parent / "run", str(write_files(corpus.parent / "later", 3))
    assert told(caplog, config(corpus, dedup_quality=None), run) == []
    assert told(caplog, config(corpus, appended=[[later]]), run) == []
    (run / "dataset" / "shard-00000.parquet").write_bytes(b"damaged")
    assert told(caplog, config(corpus, appended=[[later]]), run) == []
    (run / "dataset" / "manifest.json").unlink()
    assert told(caplog, config(corpus, appended=[[later]]), run) == []
    (line,) = told(caplog, config(corpus), run)
    assert "preprocess.appended:" in line
    preprocess(config(corpus, appended=[[later]]), str(run))
    write_files(corpus, 4)
    even_later = str(write_files(corpus.parent / "even-later", 5))
    (line,) = told(caplog, config(corpus, appended=[[later], [even_later]]), run)
    assert "contents of the inputs" in line


def test_cleaned_documents_are_told_of_where_their_dataset_is_not_finished(
    corpus: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = corpus.parent / "run"
    (run / "dataset" / "manifest.json").unlink()
    assert told(caplog, config(corpus), run) == []
    (run / "dataset" / "manifest.json").unlink()
    (line,) = told(caplog, config(corpus, cleaning={"min_ascii_share": 0.5}), run)
    assert line.startswith(f"documents: {run / 'documents'} holds what was finished with other preprocess.cleaning.")
