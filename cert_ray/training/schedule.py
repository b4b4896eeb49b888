"""The learning rate of a step: linear warm-up, then one of two decays. A pure function, so resuming needs no state.

`cosine`: half a cosine from the warm-up to the end (Loshchilov and Hutter 2017, arXiv:1608.03983). `wsd`: warm-up,
stable, decay (MiniCPM, Hu et al. 2024, arXiv:2404.06395): the peak is held, and falls only in the last steps, as
1 - sqrt (Hägele et al. 2024, arXiv:2405.18392, who find it as good as cosine if a fifth of the steps decay).
"""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["cosine", "wsd"]


def decay_start(steps: int, decay_share: float) -> int:
    """The first step, counted from 0, with less than the peak rate under `wsd`; at least one step decays."""
    return steps - max(1, round(steps * decay_share))


def learning_rate(
    step: int,
    steps: int,
    warmup_steps: int,
    peak: float,
    final_share: float = 0.0,
    schedule: Schedule = "cosine",
    decay_share: float = 0.2,
) -> float:
    """The rate of `step`, counted from 0: rises to `peak` over `warmup_steps`, then falls to `peak * final_share`.

    The step after the last would have exactly the final rate. `decay_share`, of all steps, is only for `wsd`.

    Raises:
        ValueError: unless 0 <= step < steps and 0 <= warmup_steps < steps, or when the decay begins in the warm-up.
    """
    if not 0 <= step < steps or not 0 <= warmup_steps < steps:
        raise ValueError(f"step {step} and warmup_steps {warmup_steps} must be in [0, {steps})")
    start = warmup_steps if schedule == "cosine" else decay_start(steps, decay_share)
    if start < warmup_steps:
        raise ValueError(f"the decay begins at step {start}, before warmup_steps {warmup_steps}")
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    progress = max(0.0, (step - start) / (steps - start))
    remaining = 0.5 * (1 + math.cos(math.pi * progress)) if schedule == "cosine" else 1 - math.sqrt(progress)
    return peak * (final_share + (1 - final_share) * remaining)
