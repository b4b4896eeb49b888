"""The two scores of a file that its sampling weight is made of.

In: the path of a file and the facts of its functions. Out: `ut_score` (how much of the file is unit tests, 0 to 1) and
`func_score` (how complete its functions are, 0.2 to 1.3). Source: the paper, on resampling. Stars come with the file.
"""

from __future__ import annotations

from collections.abc import Sequence

from cert_ray.python_source import FunctionFacts

# Fixtures of unittest and pytest: neither tests nor code under test. The paper leaves out `setUp` and its like.
_FIXTURES = {
    "setUp",
    "tearDown",
    "setUpClass",
    "tearDownClass",
    "setUpModule",
    "tearDownModule",
    "asyncSetUp",
    "asyncTearDown",
    "setup_method",
    "teardown_method",
    "setup_class",
    "teardown_class",
    "setup_module",
    "teardown_module",
    "setup_function",
    "teardown_function",
}
_BODY_SCORES = {"empty": 0.2, "plain": 1.0, "docstring": 1.2, "docstring_with_example": 1.3}


def ut_score(path: str, functions: Sequence[FunctionFacts]) -> float:
    """The share of `functions` that are unit tests; 0 unless `path` contains "test", 1 where there are no functions.

    A unit test has "test" in its name and calls one of unittest's `assert*` methods. Fixtures such as `setUp` are left
    out of the share. Case matters, as in the source.
    """
    if "test" not in path:
        return 0.0
    judged = [function for function in functions if function.name not in _FIXTURES]
    if not judged:
        return 1.0
    tests = sum("test" in function.name and function.calls_unittest_assert for function in judged)
    return tests / len(judged)


def func_score(functions: Sequence[FunctionFacts]) -> float:
    """The mean over `functions` of 0.2 (empty body), 1.0, 1.2 (docstring), 1.3 (with an example); 0.2 for none."""
    if not functions:
        return 0.2
    return sum(_BODY_SCORES[function.body] for function in functions) / len(functions)
