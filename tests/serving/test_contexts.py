"""The sketch of a cut-off prompt is the beginning of the sketch of the file."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from cert_ray import python_source
from cert_ray.schemas import Dropped
from cert_ray.serving import contexts
from cert_ray.serving.contexts import sketch_context
from cert_ray.sketching import Sketched, SketchKind, sketch_source

FILE = '''import pandas as pd
import numpy as np

df = pd.DataFrame({'A': [1, 2, 3], "b": [4.5, 1e3, -6]})


@decorate(1)
def add(df, column='A', number=2):
    """Adds 2 to a "column"."""
    # here 1 and 'two' stay
    for name in df.columns:
        if name == 'A' or not name:
            df[name] = df[name].astype(float) + 1
        else:
            continue
    try:
        with open('out') as stream:
            stream.write(f(lambda row: row[0] + 1))
    except OSError:
        return [x for x in range(3) if x]
    return df['A'] if number else df[column].map(lambda value: value * 2)


class Thing(object):
    names = {'a': 1, **{}}


result = add(df, 'b')
'''


def assert_begins(sketched: Sketched, whole: Sketched, prompt: str) -> None:
    count = len(sketched.placeholders)
    assert whole.text.startswith(sketched.text.rstrip())
    assert whole.placeholders[:count] == sketched.placeholders
    for placeholder in sketched.placeholders:
        assert sketched.text[placeholder.start : placeholder.end] == placeholder.kind
    assert all(end > len(prompt) for _, end in whole.replaced[count:])  # none was missed


def test_every_cut_at_the_end_of_a_word_begins_the_sketch_of_the_file() -> None:
    whole = sketch_source(FILE, SketchKind.CONSTANTS)
    assert not isinstance(whole, Dropped)
    cuts = [cut for cut in range(1, len(FILE) + 1) if not (FILE[cut - 1 : cut + 1].isalnum() and cut < len(FILE))]
    inside = {place for start, end in whole.replaced for place in range(start + 1, end)}
    docstring = FILE.index('"""'), FILE.index('"""', FILE.index('"""') + 3) + 3
    inside.update(range(docstring[0] + 1, docstring[1]))
    inside.add(FILE.index("**") + 1)  # half an operator is not the end of a word
    tried = [cut for cut in cuts if cut not in inside]
    assert len(tried) > 200
    for cut in tried:
        assert_begins(sketch_context(FILE[:cut]), whole, FILE[:cut])


def test_a_file_that_parses_is_sketched_as_in_training() -> None:
    for kind in SketchKind:
        assert sketch_context(FILE, kind) == sketch_source(FILE, kind)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("", ""),
        ("x = 1\nreturn ", "x = number\nreturn "),
        ("x = 1\ny = 'open ", "x = number\ny = 'open "),
        ("print 'hello'\n", "print 'hello'\n"),
        ("x = 1\nprint 'old'\ny = ", "x = number\nprint 'old'\ny = "),
        ("s = 'float'.astype(float)\nstring =", "s = string.astype(float)\nstring ="),
        ("x = 1\n\0", "x = number\n\0"),
        ("def f(a=1):\n    # number one\n", None),
        ("x = ((((1", "x = ((((number"),
    ],
)
def test_a_prompt_that_ends_anywhere_has_a_sketch(prompt: str, expected: str | None) -> None:
    sketched = sketch_context(prompt)
    if expected is not None:
        assert sketched.text == expected
    for placeholder in sketched.placeholders:
        assert sketched.text[placeholder.start : placeholder.end] == placeholder.kind


@pytest.mark.parametrize("lines", [1, 5, 500])
def test_a_prompt_inside_a_docstring_is_sketched_up_to_it_at_the_price_of_a_few_readings(
    lines: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed = []
    monkeypatch.setattr(contexts, "parse", lambda source: parsed.append(source) or python_source.parse(source))
    head = "x = 1\n\x0cdef f(a=2):\n"
    docstring = '    """It says "x = 3",\n' + "    and it's more:\n" * lines
    sketched = sketch_context(head + docstring + "    open")
    assert len(parsed) < 10
    assert sketched.text == sketch_context(head).text + docstring + "    open"
    assert [place.kind for place in sketched.placeholders] == ["number", "func", "number"]


@pytest.mark.parametrize("name", ["PandasEval", "NumpyEval"])
def test_the_sketch_of_a_benchmark_prompt_begins_that_of_its_gold_answer(shared: Path, name: str) -> None:
    with gzip.open(shared / "benchmarks" / f"{name}.jsonl.gz", "rt") as lines:
        problems = [json.loads(line) for line in lines]
    compared = 0
    for problem in problems:
        whole = sketch_source(problem["prompt"] + problem["canonical_solution"][0], SketchKind.CONSTANTS)
        if not isinstance(whole, Dropped):
            compared += 1
            assert_begins(sketch_context(problem["prompt"]), whole, problem["prompt"])
    assert compared >= 95  # of 101; the others' gold answers are cut off, or do not parse


def test_a_prompt_that_is_no_code_is_not_read_again_from_each_of_its_quotes() -> None:
    prompt = "'\\\"" * 30_000
    assert len(list(contexts._tokens(prompt))) < 10
    assert sketch_context(prompt).text == prompt


def test_a_long_prompt_is_parsed_a_bounded_number_of_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contexts, "_MOST_READ", 30_000)
    prompt = "x = [1, 2]\n" * 2_000 + "$ y\n" * 40
    read: list[int] = []
    parse = contexts.parse

    def counted(source: str) -> object:
        read.append(len(source))
        return parse(source)

    monkeypatch.setattr(contexts, "parse", counted)
    assert sketch_context(prompt).text == prompt
    assert sum(read) < 30 * (contexts._MOST_READ + len(prompt))
