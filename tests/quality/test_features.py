"""The scores of files, counted by hand."""

from __future__ import annotations

import pytest

from cert_ray.python_source import FunctionFacts
from cert_ray.quality.features import func_score, ut_score

TEST = FunctionFacts("test_add", "plain", calls_unittest_assert=True)
TEST_WITHOUT_ASSERT = FunctionFacts("test_nothing", "plain", calls_unittest_assert=False)
ASSERTING_HELPER = FunctionFacts("check", "plain", calls_unittest_assert=True)
SETUP = FunctionFacts("setUp", "plain", calls_unittest_assert=False)
CODE = FunctionFacts("add", "docstring", calls_unittest_assert=False)


@pytest.mark.parametrize(
    ("path", "functions", "score"),
    [
        ("pkg/code.py", [TEST, TEST], 0.0),  # the path does not say test
        ("pkg/code.py", [], 0.0),
        ("tests/x.py", [], 1.0),  # nothing but a test file could be empty so
        ("tests/x.py", [SETUP], 1.0),
        ("tests/x.py", [TEST, TEST], 1.0),
        ("tests/x.py", [TEST, SETUP], 1.0),  # fixtures do not count
        ("tests/x.py", [TEST, CODE], 0.5),
        ("tests/x.py", [TEST, TEST_WITHOUT_ASSERT, ASSERTING_HELPER, CODE], 0.25),
        ("latest/x.py", [CODE], 0.0),
    ],
)
def test_ut_score_is_the_share_of_unit_tests(path: str, functions: list[FunctionFacts], score: float) -> None:
    assert ut_score(path, functions) == score


@pytest.mark.parametrize(
    ("bodies", "score"),
    [
        ([], 0.2),
        (["empty"], 0.2),
        (["plain"], 1.0),
        (["docstring"], 1.2),
        (["docstring_with_example"], 1.3),
        (["empty", "docstring_with_example"], 0.75),
        (["plain", "docstring", "docstring"], (1.0 + 1.2 + 1.2) / 3),
    ],
)
def test_func_score_is_the_mean_over_functions(bodies: list[str], score: float) -> None:
    functions = [FunctionFacts("f", body, calls_unittest_assert=False) for body in bodies]  # type: ignore[arg-type]
    assert func_score(functions) == pytest.approx(score)
