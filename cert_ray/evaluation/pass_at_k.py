"""pass@k from counts: samples drawn and samples passed in, a probability out. Exact integer arithmetic, no arrays.

Source: Chen et al. 2021, arXiv:2107.03374, section 2.1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction


def pass_at_k(num_samples: int, num_passed: int, k: int) -> float:
    """Probability that at least one of `k` completions, drawn without replacement, passes.

    The unbiased estimator 1 - C(n-c, k) / C(n, k), rounded once, at the end.

    Raises:
        ValueError: unless 1 <= k <= num_samples and 0 <= num_passed <= num_samples.
    """
    return float(_exact(num_samples, num_passed, k))


def mean_pass_at_k(counts: Iterable[tuple[int, int]], k: int) -> float:
    """Mean pass@k over problems, given each one's (samples, passed); independent of their order.

    Raises:
        ValueError: when there is no problem, or as `pass_at_k` does.
    """
    scores = [_exact(num_samples, num_passed, k) for num_samples, num_passed in counts]
    if not scores:
        raise ValueError("pass@k of no problems is not defined: give at least one (samples, passed) pair")
    return float(sum(scores, start=Fraction()) / len(scores))


def _exact(num_samples: int, num_passed: int, k: int) -> Fraction:
    if not 1 <= k <= num_samples:
        raise ValueError(f"k = {k} needs 1 <= k <= samples = {num_samples}: draw more samples or ask for a smaller k")
    if not 0 <= num_passed <= num_samples:
        raise ValueError(f"passed = {num_passed} must lie between 0 and samples = {num_samples}")
    return 1 - Fraction(math.comb(num_samples - num_passed, k), math.comb(num_samples, k))
