"""The learning rate against hand-computed values and against transformers' schedule."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import get_cosine_schedule_with_warmup, get_wsd_schedule

from cert_ray.training.schedule import learning_rate


def test_rises_to_the_peak_and_falls_by_half_a_cosine():
    rates = [learning_rate(step, steps=10, warmup_steps=2, peak=3.0) for step in range(10)]
    assert rates[:3] == pytest.approx([1.0, 2.0, 3.0])
    assert rates[6] == pytest.approx(1.5)  # halfway from step 2 to step 10
    assert rates[9] > 0


def test_is_the_cosine_of_transformers_after_the_warm_up():
    """During it, transformers starts at 0 and wastes the first step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=5e-4)
    peer = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=20, num_training_steps=100)
    for step in range(100):
        if step >= 20:
            assert learning_rate(step, 100, 20, 5e-4) == pytest.approx(peer.get_last_lr()[0])
        optimizer.step()
        peer.step()


def test_wsd_holds_the_peak_and_falls_as_one_minus_the_root():
    rates = [learning_rate(step, 10, 2, peak=3.0, schedule="wsd", decay_share=0.4) for step in range(10)]
    assert rates == pytest.approx([1.0, 2.0, 3.0, 3.0, 3.0, 3.0, 3.0, 1.5, 3 * (1 - 0.5**0.5), 3 * (1 - 0.75**0.5)])


@pytest.mark.parametrize("final_share", [0.0, 0.1])
def test_wsd_is_that_of_transformers_after_the_warm_up(final_share):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=5e-4)
    peer = get_wsd_schedule(optimizer, 20, 30, num_training_steps=100, decay_type="1-sqrt", min_lr_ratio=final_share)
    for step in range(100):
        if step >= 20:
            rate = learning_rate(step, 100, 20, 5e-4, final_share, schedule="wsd", decay_share=0.3)
            assert rate == pytest.approx(peer.get_last_lr()[0])
        optimizer.step()
        peer.step()


def test_a_longer_wsd_run_is_the_same_until_the_shorter_one_decays():
    """What the schedule is for: a stable checkpoint serves runs of any length."""
    rates = [[learning_rate(step, steps, 10, 1.0, schedule="wsd") for step in range(80)] for steps in (100, 1_000)]
    assert rates[0] == rates[1]


@given(st.integers(1, 500), st.data())
def test_stays_between_the_final_rate_and_the_peak(steps, data):
    warmup = data.draw(st.integers(0, steps - 1))
    step = data.draw(st.integers(warmup, steps - 1))
    schedule = data.draw(st.sampled_from(["cosine", "wsd"]))
    share = (steps - warmup) / steps
    rate = learning_rate(step, steps, warmup, peak=0.2, final_share=0.1, schedule=schedule, decay_share=share)
    assert 0.1 * 0.2 * (1 - 1e-9) <= rate <= 0.2


@pytest.mark.parametrize(("step", "warmup"), [(-1, 0), (10, 0), (0, 10)])
def test_refuses_steps_out_of_range(step, warmup):
    with pytest.raises(ValueError, match="must be in"):
        learning_rate(step, 10, warmup, 1.0)


def test_refuses_a_decay_that_begins_in_the_warm_up():
    with pytest.raises(ValueError, match="begins at step 5, before warmup_steps 6"):
        learning_rate(0, 10, 6, 1.0, schedule="wsd", decay_share=0.5)
