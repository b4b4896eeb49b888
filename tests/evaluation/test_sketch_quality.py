"""Sketches counted by hand."""

from __future__ import annotations

import pytest

from cert_ray.evaluation.benchmarks import Problem, Sample
from cert_ray.evaluation.sandbox import Execution, Outcome
from cert_ray.evaluation.scoring import ProblemResult
from cert_ray.evaluation.sketch_quality import measure_sketches, sketch_of_answer

PASSED, FAILED = Execution(Outcome.PASSED, "", ""), Execution(Outcome.FAILED, "", "")


@pytest.mark.parametrize(
    ("prompt", "answer", "sketch"),
    [
        ("a = 'some' + 'thing'\nx =", " f(1, 'two')", "f(number, string)"),
        ("x =", " 1", "number"),
        ("def f(a=10):\n    return", " a['b']\n", "a[string]"),
        ("x = [100, 200,", " 300]", "number]"),
        ("x = 'a", "b'", None),
        ("x =", " (", None),
    ],
)
def test_the_answers_sketch_is_what_follows_the_prompts(prompt: str, answer: str, sketch: str | None) -> None:
    assert sketch_of_answer(prompt, answer) == sketch


def test_matches_votes_routes_and_blame() -> None:
    problem = Problem("T/0", "x =", None, "", (" f(1)", " g(2)"))
    said = [
        (" f(number)", "generator", 0.5, PASSED),
        (" f(number)", "generator", 0.5, FAILED),  # a gold sketch, filled in wrongly
        (" g(number)", "generator", 0.5, FAILED),
        (" h(number)", "generator_long_sketch", 1.0, FAILED),  # neither gold nor ever right
        (" k", "sketcher", 1.0, PASSED),
        (" k", "sketcher", 1.0, FAILED),  # the same sketch was right once
    ]
    samples = tuple(Sample("T/0", "", sketch, route, share) for sketch, route, share, _ in said)
    result = ProblemResult(problem, samples, ("",) * 6, tuple(run for *_, run in said))
    found = measure_sketches([result])
    assert found is not None
    assert (found["samples"], found["exact_match"], found["vote_share"]) == (6, 0.5, 0.75)
    assert found["routes"] == {
        "generator": 0.5,
        "sketcher": pytest.approx(1 / 3),
        "generator_long_sketch": pytest.approx(1 / 6),
    }
    assert found["failures"] == {"sketch": 1, "generator": 3}


def test_without_sketches_there_is_nothing_to_measure() -> None:
    problem = Problem("T/0", "x =", None, "")
    assert measure_sketches([ProblemResult(problem, (Sample("T/0", " 1"),), (" 1",), (FAILED,))]) is None
