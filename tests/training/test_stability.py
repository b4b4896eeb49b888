"""When losses spike: by hand, against noise that does not, and whatever came before the window."""

from __future__ import annotations

import numpy as np
import pytest

from cert_ray.errors import ConfigError
from cert_ray.training.stability import SpikePolicy, spike_limit, spiking_steps

POLICY = SpikePolicy(window_steps=8, deviations=6, minimum_rise_nats=0.1, patience_steps=3)
CALM = [2.0, 2.1, 1.9, 2.0, 2.2, 1.8, 2.0, 2.0]


def test_the_limit_is_the_median_and_six_deviations_by_hand():
    """Median 2.0; absolute deviations 0, 0, 0, 0, 0.1, 0.1, 0.2, 0.2, their median 0.05."""
    assert spike_limit(CALM, POLICY) == pytest.approx(2.0 + 6 * 1.4826 * 0.05)
    assert spike_limit([2.0] * 8, POLICY) == pytest.approx(2.1)


def test_nothing_is_judged_before_a_full_window():
    assert spike_limit(CALM[1:], POLICY) == float("inf")
    assert spiking_steps([], POLICY) == 0
    assert spiking_steps([*CALM[1:], 99.0], POLICY) == 0


@pytest.mark.parametrize(
    ("after", "steps"),
    [
        ([2.3], 0),
        ([2.5], 1),
        ([9.0, 2.0], 0),  # it has recovered
        ([2.0, 9.0], 1),
        ([9.0, 9.0], 2),
        ([9.0, 5.0, 4.0], 3),
        ([9.0, 9.0, 9.0, 9.0], 3),  # counts no further than the patience
    ],
)
def test_counts_the_steps_in_a_row_up_to_the_patience(after, steps):
    assert spiking_steps([*CALM, *after], POLICY) == steps


def test_losses_before_the_window_do_not_matter():
    assert spiking_steps([*[0.0] * 50, *CALM, 9.0], POLICY) == spiking_steps([*[7.0] * 50, *CALM, 9.0], POLICY) == 1


def test_a_usual_run_never_stops_and_a_divergence_soon_does():
    """A falling loss with noise over 3,000 steps, then one that rises by 0.02 nats per step."""
    policy = SpikePolicy()
    steps = np.arange(3_000)
    noise = np.random.default_rng(0).normal(0, 0.05, len(steps))
    losses = (2 + 8 * np.exp(-steps / 200) + noise).tolist()
    counts = [spiking_steps(losses[:end], policy) for end in range(1, len(losses) + 1)]
    assert max(counts) == 0
    while spiking_steps(losses, policy) < policy.patience_steps:
        losses.append(losses[-1] + 0.02)
        assert len(losses) < 3_060


def test_patience_longer_than_half_the_window_is_refused():
    with pytest.raises(ConfigError, match="patience_steps 70 must be at most half of window_steps 128"):
        SpikePolicy.from_mapping({"patience_steps": 70}, "on_spike")
