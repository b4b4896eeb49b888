"""pass@k against brute force over all draws, and what it refuses."""

from __future__ import annotations

import itertools

import pytest

from cert_ray.evaluation.pass_at_k import mean_pass_at_k, pass_at_k


@pytest.mark.parametrize("num_samples", [1, 2, 5, 7])
def test_equals_the_share_of_all_draws_that_hold_a_pass(num_samples: int) -> None:
    for num_passed, k in itertools.product(range(num_samples + 1), range(1, num_samples + 1)):
        draws = list(itertools.combinations([True] * num_passed + [False] * (num_samples - num_passed), k))
        share = sum(any(draw) for draw in draws) / len(draws)
        assert pass_at_k(num_samples, num_passed, k) == pytest.approx(share, abs=1e-15)


def test_is_exact_where_floating_point_products_are_not() -> None:
    assert pass_at_k(200, 1, 1) == 0.005
    assert pass_at_k(200, 200, 100) == 1.0
    assert pass_at_k(100_000, 1, 50_000) == 0.5


def test_mean_is_the_published_figure_for_7_of_101() -> None:
    counts = [(1, 1)] * 7 + [(1, 0)] * 94
    assert mean_pass_at_k(counts, 1) == mean_pass_at_k(reversed(counts), 1) == 0.06930693069306931


@pytest.mark.parametrize(("num_samples", "num_passed", "k"), [(5, 0, 6), (5, 0, 0), (5, 6, 1), (5, -1, 1), (0, 0, 1)])
def test_refuses_what_has_no_answer(num_samples: int, num_passed: int, k: int) -> None:
    with pytest.raises(ValueError, match=r"must|needs"):
        pass_at_k(num_samples, num_passed, k)


def test_no_problems_have_no_mean() -> None:
    with pytest.raises(ValueError, match="no problems"):
        mean_pass_at_k([], 1)
