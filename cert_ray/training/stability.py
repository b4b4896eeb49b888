"""Whether a run is still going well. In: the losses so far and a policy. Out: for how many steps they have spiked.

Pure functions of the losses, so a resumed run decides like an undisturbed one. `worker` acts on it: while losses spike,
it writes no checkpoint, so every checkpoint is from before, and after some patience it stops the run. A loss or a
gradient that is not finite ends a run at once, whatever the policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

import numpy as np
import pydantic

from cert_ray.config import Config

# The median absolute deviation of a normal distribution is its standard deviation divided by this.
_DEVIATION_PER_MAD = 1.4826


class SpikePolicy(Config):
    """When a step's loss counts as a spike, and what is done about it.

    Window and deviations are those of OLMo-core's SkipStepOptimizer, which skips such a step. Median and median
    absolute deviation replace its mean and standard deviation, because the spike itself hardly moves them.
    """

    action: Literal["stop", "warn"] = "stop"
    window_steps: int = pydantic.Field(default=128, ge=8)  # a loss is compared with those of this many steps before
    deviations: float = pydantic.Field(default=6.0, gt=0)
    minimum_rise_nats: float = pydantic.Field(default=0.1, ge=0)  # assumed: losses that hardly vary need room, too
    patience_steps: int = pydantic.Field(default=10, gt=0)  # assumed: most spikes recover by themselves

    @pydantic.model_validator(mode="after")
    def _refuse_patience_that_moves_the_median(self) -> Self:
        if self.patience_steps > self.window_steps // 2:
            raise ValueError(
                f"patience_steps {self.patience_steps} must be at most half of window_steps {self.window_steps}: "
                "a longer spike becomes what it is compared with"
            )
        return self


def spike_limit(losses_before: Sequence[float], policy: SpikePolicy) -> float:
    """The loss, in nats per token, above which the next step counts as a spike; infinite until the window is full."""
    if len(losses_before) < policy.window_steps:
        return float("inf")
    window = np.asarray(losses_before[-policy.window_steps :])
    median = float(np.median(window))
    deviation = _DEVIATION_PER_MAD * float(np.median(np.abs(window - median)))
    return median + max(policy.deviations * deviation, policy.minimum_rise_nats)


def spiking_steps(losses: Sequence[float], policy: SpikePolicy) -> int:
    """How many consecutive steps spike, up to and including the last; counts to `patience_steps`.

    Looks only at the last `window_steps + patience_steps` losses.
    """
    recent = losses[-(policy.window_steps + policy.patience_steps) :]
    for count in range(policy.patience_steps):
        last = len(recent) - 1 - count
        if last < 0 or not recent[last] > spike_limit(recent[:last], policy):
            return count
    return policy.patience_steps
