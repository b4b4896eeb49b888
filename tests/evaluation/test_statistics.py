"""Intervals and tests against closed forms, hand counts and brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from cert_ray.evaluation.statistics import Counts, Interval, compare, score_interval, smallest_detectable_difference


def one_sample(passed: int, total: int) -> list[Counts]:
    return [(1, 1)] * passed + [(1, 0)] * (total - passed)


def run(*passed: int, samples: int = 1) -> dict[str, Counts]:
    return {f"T/{place}": (samples, count) for place, count in enumerate(passed)}


def test_interval_of_many_single_samples_is_the_binomial_one() -> None:
    found = score_interval([one_sample(300, 1000)], 1)
    half_width = 1.959964 * math.sqrt(0.3 * 0.7 / 1000)
    assert found.value == 0.3
    assert found.low == pytest.approx(0.3 - half_width, abs=0.003)
    assert found.high == pytest.approx(0.3 + half_width, abs=0.003)


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    truth = np.random.default_rng(1)
    trials = [score_interval([one_sample(int(truth.binomial(101, 0.2)), 101)], 1) for _ in range(100)]
    # 95 expected of 100; 88 or fewer would have a chance below 0.4%.
    assert sum(found.low <= 0.2 <= found.high for found in trials) > 88


@pytest.mark.parametrize(("passed", "low", "high"), [(0, 0.0, 0.0359), (101, 0.9641, 1.0)])
def test_no_spread_is_not_taken_for_certainty(passed: int, low: float, high: float) -> None:
    found = score_interval([one_sample(passed, 101)], 1)  # 1 - 0.025 ** (1 / 101) = 0.0359: Clopper and Pearson
    assert (found.low, found.high) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


def test_one_problem_says_nothing_about_others() -> None:
    assert score_interval([[(200, 50)]], 1) == Interval(0.25, 0.0, 1.0)
    assert compare([run(50, samples=200)], [run(150, samples=200)], 1).difference == Interval(0.5, -1.0, 1.0)


def test_same_input_gives_the_same_interval_and_another_seed_nearly() -> None:
    counts = [(20, count) for count in range(20)]
    assert score_interval([counts], 10) == score_interval([counts], 10)
    other = score_interval([counts], 10, seed=5)
    assert other.low == pytest.approx(score_interval([counts], 10).low, abs=0.02)


def test_pooled_benchmarks_count_every_problem_once_and_are_resampled_apart() -> None:
    easy, hard = [(1, 1)] * 60, [(1, 0)] * 40  # no spread within either: then they are resampled together
    assert score_interval([easy, hard, []], 1) == score_interval([easy + hard], 1)
    assert score_interval([easy, hard], 1).value == 0.6
    uneven = score_interval([one_sample(30, 60), one_sample(1, 40)], 1)
    expected = math.sqrt(60 * 0.25 + 40 * (1 / 40) * (39 / 40)) / 100  # strata's variances add up
    assert (uneven.high - uneven.low) / (2 * 1.96) == pytest.approx(expected, rel=0.05)


def test_comparison_of_single_samples_is_mcnemars_test() -> None:
    first = run(*[1] * 10, *[0] * 15, *[1] * 5)
    second = run(*[0] * 2, *[1] * 8, *[1] * 9, *[0] * 6, *[1] * 5)
    found = compare([first], [second], 1)
    assert (len(found.wins), found.losses, found.ties) == (9, ("T/0", "T/1"), 19)
    tail = sum(math.comb(11, wins) for wins in range(3)) / 2**11
    assert found.p_value == pytest.approx(2 * tail)
    assert found.test == "McNemar, exact"
    assert found.difference.value == pytest.approx(7 / 30)
    assert found.difference.low < 7 / 30 < found.difference.high
    assert (found.first, found.second) == (0.5, pytest.approx(22 / 30))


def test_few_differing_problems_are_enumerated() -> None:
    first, second = run(1, 2, 5, 9, 3, 3, samples=10), run(4, 6, 7, 8, 3, 10, samples=10)
    differences = [0.3, 0.4, 0.2, -0.1, 0.7]
    flipped = [
        sum(d * s for d, s in zip(differences, signs, strict=True)) for signs in itertools.product((1, -1), repeat=5)
    ]
    share = sum(abs(value) >= 1.5 - 1e-9 for value in flipped) / 32
    found = compare([first], [second], 1)
    assert found.p_value == pytest.approx(share)
    assert (found.wins, found.losses, found.ties) == (("T/0", "T/1", "T/2", "T/5"), ("T/3",), 1)


def test_many_differing_problems_agree_with_the_t_test() -> None:
    drawn = np.random.default_rng(3)
    first, second = drawn.binomial(20, 0.4, 80), drawn.binomial(20, 0.45, 80)
    found = compare([run(*map(int, first), samples=20)], [run(*map(int, second), samples=20)], 1)
    assert found.p_value == pytest.approx(stats.ttest_rel(first, second).pvalue, abs=0.02)
    assert found.test.endswith("random")


def test_a_run_does_not_differ_from_itself() -> None:
    found = compare([run(1, 0, 1)], [run(1, 0, 1)], 1)
    assert (found.p_value, found.wins, found.losses, found.detectable) == (1.0, (), (), None)


def test_swapping_the_runs_turns_the_comparison_round() -> None:
    first, second = run(1, 2, 5, 9, samples=10), run(4, 6, 7, 8, samples=10)
    there, back = compare([first], [second], 1), compare([second], [first], 1)
    assert (there.p_value, there.wins) == (back.p_value, back.losses)
    assert there.difference.value == -back.difference.value


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [([run(1, 0)], [run(1)], "T/1"), ([run(1)], [run(1), run(1)], "benchmarks"), ([{}], [{}], "without problems")],
)
def test_runs_over_other_problems_are_refused(
    first: list[dict[str, Counts]], second: list[dict[str, Counts]], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        compare(first, second, 1)


def test_smallest_detectable_difference_is_found_in_80_of_100_trials() -> None:
    drawn = np.random.default_rng(4)
    spread = drawn.normal(0, 0.5, 100)
    effect = smallest_detectable_difference((spread - spread.mean()) / spread.std(ddof=1) * 0.5)
    assert effect == pytest.approx((1.959964 + 0.841621) * 0.5 / 10, abs=1e-6)
    trials = drawn.normal(effect, 0.5, (2000, 100))
    share = float((stats.ttest_1samp(trials, 0, axis=1).pvalue < 0.05).mean())
    assert share == pytest.approx(0.8, abs=0.03)


def test_what_cannot_be_known_is_none_or_refused() -> None:
    assert smallest_detectable_difference([0.5]) is None
    with pytest.raises(ValueError, match="power"):
        smallest_detectable_difference([0, 1], power=1.0)
    with pytest.raises(ValueError, match="no problems"):
        score_interval([[]], 1)


def test_equal_differences_are_not_taken_for_certainty() -> None:
    two = compare([run(0, 0)], [run(1, 1)], 1).difference
    assert two.value == 1.0
    assert two.low < 0 < two.high
    many = compare([run(*[0] * 100)], [run(*[1] * 100)], 1).difference
    # 0 of 100 problems went the other way: at most 1 - 0.025 ** (1 / 100) = 3.62% of all do, each by two.
    assert many.low == pytest.approx(1 - 2 * 0.0362, abs=1e-3)
