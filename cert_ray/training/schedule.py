"""The learning rate of a step: linear warm-up, then half a cosine (Loshchilov and Hutter 2017, arXiv:1608.03983).

A pure function of the step, so resuming needs no state.
"""

from __future__ import annotations

import math


def learning_rate(step: int, steps: int, warmup_steps: int, peak: float, final_share: float = 0.0) -> float:
    """The rate of step `step`, counted from 0: rises to `peak` over `warmup_steps`, then falls to `peak * final_share`.

    The step after the last one would have exactly the final rate.

    Raises:
        ValueError: unless 0 <= step < steps and 0 <= warmup_steps < steps.
    """
    if not 0 <= step < steps or not 0 <= warmup_steps < steps:
        raise ValueError(f"step {step} and warmup_steps {warmup_steps} must be in [0, {steps})")
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / (steps - warmup_steps)
    return peak * (final_share + (1 - final_share) * 0.5 * (1 + math.cos(math.pi * progress)))
