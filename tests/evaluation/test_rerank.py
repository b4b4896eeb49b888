"""Orders of candidates whose right order is known."""

from __future__ import annotations

import pytest

from cert_ray.evaluation.rerank import Candidate, RerankMethod, normal_form, rank
from tests.evaluation.builders import in_this_process


def candidates(*texts: str) -> list[Candidate]:
    return [Candidate(text) for text in texts]


def test_the_most_likely_comes_first_and_unknown_ones_last() -> None:
    some = [Candidate("a", -2.0), Candidate("b"), Candidate("c", -0.5), Candidate("d", -2.0)]
    assert rank("", some, RerankMethod.LOGPROB) == [2, 0, 3, 1]
    with pytest.raises(ValueError, match="log-probability"):
        rank("", candidates("a"), RerankMethod.LOGPROB)


def test_trees_are_equal_up_to_names_blanks_comments_and_docstrings() -> None:
    assert normal_form("x = 1\ny = x + 2") == normal_form("a=1 # one\nb = (a + 2)")
    assert normal_form("def f(x):\n  'doc'\n  return x") == normal_form("def f(y: int):\n  return y")
    assert normal_form("x = f(1)") != normal_form("x = g(1)")
    assert normal_form("x = ") is None


def test_the_majority_of_trees_wins_and_what_does_not_parse_loses() -> None:
    some = candidates(" (", " b + 1", " a+1", " a + 1  # sum", " (")
    assert rank("a = 1\nx =", some, RerankMethod.SYNTAX)[:2] == [2, 3]
    assert rank("a = 1\nx =", some, RerankMethod.SYNTAX)[-2:] == [0, 4]


def test_candidates_that_do_the_same_in_other_words_agree() -> None:
    prompt = "values = [3, 1, 2]\n# the largest value\nlargest ="
    some = candidates(" values[0]", " max(values)", " sorted(values)[-1]", " values[0]  # first", " undefined")
    order = rank(prompt, some, RerankMethod.AGREEMENT, in_this_process)
    # On the prompt's own values all four agree; only other values tell the first element from the largest.
    assert set(order[:4]) == {0, 1, 2, 3}
    assert order[4] == 4
    wrong_ahead = candidates(" values[0]", " max(values)", " sorted(values)[-1]", " -min(-v for v in values)")
    assert rank("values = [3, 4, 2]\nlargest =", wrong_ahead, RerankMethod.AGREEMENT, in_this_process)[-1] == 0


def test_functions_are_called_by_their_examples_and_annotations() -> None:
    prompt = 'def add(a: int, b: int) -> int:\n    """Sum.\n    >>> add(2, 2)\n    4\n    """\n'
    some = candidates("    return a * b\n", "    return a + b\n", "    return sum([a, b])\n")
    assert rank(prompt, some, RerankMethod.AGREEMENT, in_this_process) == [1, 2, 0]


def test_without_inputs_agreement_is_syntax() -> None:
    prompt = "import math\n\ndef f(frame, column):\n    # something\n    return"
    some = candidates(" frame[column]", " frame", " frame")
    assert (
        rank(prompt, some, RerankMethod.AGREEMENT, in_this_process)
        == rank(prompt, some, RerankMethod.SYNTAX)
        == [1, 2, 0]
    )


def test_agreement_needs_a_sandbox_and_nothing_has_an_empty_order() -> None:
    with pytest.raises(ValueError, match="sandbox"):
        rank("x =", candidates(" 1"), RerankMethod.AGREEMENT)
    for method in RerankMethod:
        assert rank("x =", [], method, in_this_process) == []
