"""How certain a score is: counts per problem in; intervals, comparisons of two runs, detectable differences out. Pure.

Problems are the unit: the bootstrap resamples them and the test flips them, so the intervals speak about other problems
of the same kind as well as about other samples. Samples of one problem are not independent observations.

Several benchmarks are strata: each is resampled by itself, and the pooled score counts every problem once. Not handled:
choosing the best of many runs (say, the best temperature) makes its score too high, and no interval here corrects that.
Resampling is by scipy, with a fixed seed: equal input gives equal output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

from cert_ray.evaluation.pass_at_k import mean_pass_at_k, pass_at_k

Counts = tuple[int, int]  # of one problem: samples drawn, samples passed

_RESAMPLES = 9_999  # the odd number makes (resamples + 1) * 0.025 whole: Davison and Hinkley 1997, section 2.4
_CONFIDENCE = 0.95
_SIGNIFICANCE = 0.05
_POWER = 0.8


@dataclass(frozen=True, slots=True)
class Interval:
    """A score, or a difference of scores, with the ends of its confidence interval."""

    value: float
    low: float
    high: float
    confidence: float = _CONFIDENCE


@dataclass(frozen=True, slots=True)
class Comparison:
    """A second run against a first on the same problems, by pass@k.

    `wins` are the problems on which the second run's pass@k is higher. `p_value` is two-sided, for the hypothesis that
    the runs are exchangeable on every problem; `test` names how it was computed. `detectable` is
    `smallest_detectable_difference` for these problems.
    """

    k: int
    first: float
    second: float
    difference: Interval  # second minus first
    p_value: float
    test: str
    wins: tuple[str, ...]
    losses: tuple[str, ...]
    ties: int
    detectable: float | None


def score_interval(benchmarks: Sequence[Sequence[Counts]], k: int, *, seed: int = 0) -> Interval:
    """Mean pass@k over the problems of all `benchmarks`, with a 95% interval by bootstrap over problems (BCa).

    If the score is 0 on every problem, or 1 on every one, resampling shows no spread at all: the interval is then
    Clopper and Pearson's for that many trials. A single problem, or equal scores in between, say nothing: 0 to 1.

    Raises:
        ValueError: without problems, or when k does not fit a problem's samples.
    """
    value = mean_pass_at_k((counts for problems in benchmarks for counts in problems), k)
    strata = [np.array([pass_at_k(*counts, k) for counts in problems]) for problems in benchmarks if problems]
    scores = np.concatenate(strata)
    if scores.min() < scores.max():
        return Interval(value, *_bootstrap(strata, seed))
    if value in (0.0, 1.0) and len(scores) > 1:
        ends = stats.binomtest(int(scores.sum()), len(scores)).proportion_ci(_CONFIDENCE, method="exact")
        return Interval(value, float(ends.low), float(ends.high))
    return Interval(value, 0.0, 1.0)


def compare(
    first: Sequence[Mapping[str, Counts]], second: Sequence[Mapping[str, Counts]], k: int, *, seed: int = 0
) -> Comparison:
    """Compare two runs problem by problem: one mapping of task_id to counts per benchmark, in the same order.

    The test flips the sign of each problem's difference: exactly, as McNemar's test, if every difference is a whole
    problem (with one sample each, say); exactly, by enumeration, up to 13 differing problems; else with 9,999 random
    flips.

    Raises:
        ValueError: when the runs do not have the same problems, or k does not fit the samples.
    """
    _check_same_problems(first, second)
    scored = [
        (task_id, pass_at_k(*counts, k), pass_at_k(*others[task_id], k))
        for problems, others in zip(first, second, strict=True)
        for task_id, counts in problems.items()
    ]
    differences = np.array([after - before for _, before, after in scored])
    ends = np.cumsum([len(problems) for problems in first])[:-1]
    strata = [stratum for stratum in np.split(differences, ends) if len(stratum)]
    p_value, test = _sign_flip_test(differences, seed)
    return Comparison(
        k=k,
        first=mean_pass_at_k((counts for problems in first for counts in problems.values()), k),
        second=mean_pass_at_k((counts for problems in second for counts in problems.values()), k),
        difference=_difference_interval(differences, strata, seed),
        p_value=p_value,
        test=test,
        wins=tuple(task_id for task_id, before, after in scored if after > before),
        losses=tuple(task_id for task_id, before, after in scored if after < before),
        ties=sum(before == after for _, before, after in scored),
        detectable=smallest_detectable_difference(differences),
    )


def smallest_detectable_difference(
    differences: npt.ArrayLike, *, significance: float = _SIGNIFICANCE, power: float = _POWER
) -> float | None:
    """The true difference in mean score that a paired comparison on this many problems would find in 80 of 100 trials.

    (z(1 - significance / 2) + z(power)) * s / sqrt(n), with s the standard deviation of the per-problem `differences`:
    the usual normal approximation for a paired test. None for fewer than two problems or without any spread, when s
    is not known.

    Raises:
        ValueError: unless significance and power lie between 0 and 1.
    """
    if not (0 < significance < 1 and 0 < power < 1):
        raise ValueError(f"significance = {significance} and power = {power} must lie between 0 and 1")
    values = np.asarray(differences, dtype=float)
    if len(values) < 2 or values.min() == values.max():
        return None
    reach = stats.norm.ppf(1 - significance / 2) + stats.norm.ppf(power)
    return float(reach * values.std(ddof=1) / np.sqrt(len(values)))


def _check_same_problems(first: Sequence[Mapping[str, Counts]], second: Sequence[Mapping[str, Counts]]) -> None:
    if len(first) != len(second):
        raise ValueError(f"{len(first)} benchmarks against {len(second)}: compare runs of the same benchmarks")
    for problems, others in zip(first, second, strict=True):
        odd = sorted(problems.keys() ^ others.keys())
        if odd:
            raise ValueError(
                f"{len(odd)} problems are in one run only ({', '.join(odd[:5])}): compare runs over the same problems"
            )
    if not any(first):
        raise ValueError("two runs without problems cannot be compared")


def _bootstrap(strata: Sequence[npt.NDArray[np.float64]], seed: int) -> tuple[float, float]:
    """Ends of the interval of the mean over all strata, each resampled by itself if any of them shows a spread."""
    total = sum(len(stratum) for stratum in strata)
    if all(stratum.min() == stratum.max() for stratum in strata):
        strata = [np.concatenate(strata)]

    def pooled_mean(*samples: npt.NDArray[np.float64], axis: int = -1) -> Any:
        return sum(sample.sum(axis=axis) for sample in samples) / total

    found = stats.bootstrap(
        tuple(strata),
        pooled_mean,
        n_resamples=_RESAMPLES,
        confidence_level=_CONFIDENCE,
        method="BCa" if all(len(stratum) > 1 for stratum in strata) else "percentile",  # BCa leaves one out
        vectorized=True,
        random_state=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)


def _difference_interval(
    differences: npt.NDArray[np.float64], strata: Sequence[npt.NDArray[np.float64]], seed: int
) -> Interval:
    value = float(differences.mean())
    if differences.min() < differences.max():
        return Interval(value, *_bootstrap(strata, seed))
    # No spread is not certainty: all these problems may go one way although a share of all problems goes the other.
    unlike = float(stats.binomtest(0, len(differences)).proportion_ci(_CONFIDENCE, method="exact").high)
    return Interval(value, max(-1.0, value - 2 * unlike), min(1.0, value + 2 * unlike))


def _sign_flip_test(differences: npt.NDArray[np.float64], seed: int) -> tuple[float, str]:
    """Two-sided p-value of the differences' mean under random signs; problems without a difference do not count."""
    told = differences[differences != 0]
    if len(told) < 2:
        return 1.0, f"{len(told) or 'no'} problem differs"
    if np.all(np.abs(told) == 1):
        return float(stats.binomtest(int((told > 0).sum()), len(told)).pvalue), "McNemar, exact"

    def mean(sample: npt.NDArray[np.float64], axis: int = -1) -> Any:
        return sample.mean(axis=axis)

    found = stats.permutation_test(
        (told,),
        mean,
        permutation_type="samples",
        n_resamples=_RESAMPLES,
        vectorized=True,
        random_state=np.random.default_rng(seed),
    )
    exact = 2 ** len(told) <= _RESAMPLES
    return float(found.pvalue), f"sign flips, {'all' if exact else f'{_RESAMPLES:,} random'}"
