"""Benchmarks by name: fetched once, checked, and found again without their source."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import pytest

from cert_ray.errors import ConfigError, InputError
from cert_ray.evaluation import fetch
from cert_ray.evaluation.benchmarks import read_problems
from cert_ray.evaluation.fetch import find_problems


def test_the_pinned_checksums_are_those_of_the_published_files(shared: Path) -> None:
    for name in ("pandas-eval", "numpy-eval"):
        published = fetch.KNOWN[name]
        assert hashlib.sha256((shared / "benchmarks" / published.file).read_bytes()).hexdigest() == published.sha256


def test_a_file_is_fetched_once_and_then_found_without_its_source(shared: Path, tmp_path: Path) -> None:
    source = tmp_path / "mirror.gz"
    source.write_bytes((shared / "benchmarks" / "PandasEval.jsonl.gz").read_bytes())
    found = find_problems(f"pandas-eval=file://{source}", str(tmp_path / "cache"))
    assert len(read_problems(found)) == 101
    source.unlink()
    assert find_problems("pandas-eval", str(tmp_path / "cache")) == found


def test_a_cached_file_that_was_changed_is_fetched_again(shared: Path, tmp_path: Path) -> None:
    source = f"pandas-eval=file://{shared / 'benchmarks' / 'PandasEval.jsonl.gz'}"
    found = Path(find_problems(source, str(tmp_path)))
    payload = found.read_bytes()
    found.write_bytes(payload[:-1] + b"x")
    assert Path(find_problems(source, str(tmp_path))).read_bytes() == payload


def test_the_default_place_is_the_pinned_url(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = dataclasses.replace(fetch.KNOWN["numpy-eval"], url=f"file://{shared / 'benchmarks' / 'NumpyEval.jsonl.gz'}")
    monkeypatch.setitem(fetch.KNOWN, "numpy-eval", here)
    assert len(read_problems(find_problems("numpy-eval", str(tmp_path)))) == 101


def test_another_file_is_refused_and_not_kept(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("something else")
    with pytest.raises(InputError, match=r"sha256 .* was published"):
        find_problems(f"numpy-eval=file://{tmp_path / 'other'}", str(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


def test_what_cannot_be_fetched_says_how_to_name_another_place(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="human-eval=URL"):
        find_problems(f"human-eval=file://{tmp_path / 'absent'}", str(tmp_path / "cache"))


def test_humaneval_comes_from_its_package(tmp_path: Path) -> None:
    assert len(read_problems(find_problems("human-eval", str(tmp_path)))) == 164


def test_paths_stay_and_unknown_names_are_refused(tmp_path: Path) -> None:
    assert find_problems("some/where.jsonl") == "some/where.jsonl"
    odd = tmp_path / "a=b.jsonl"
    odd.touch()
    assert find_problems(str(odd)) == str(odd)
    with pytest.raises(ConfigError, match="pandas-eval"):
        find_problems("panda-eval=file:///x")
