"""Streams and draws, against hand-made distributions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cert_ray.serving.sampling import draw_tokens, uniform_streams


def test_a_stream_is_named_by_seed_prompt_and_sample() -> None:
    streams = uniform_streams(5, [1, 2, 3], range(4), 9)
    assert torch.equal(streams[2:], uniform_streams(5, [1, 2, 3], range(2, 4), 9))
    assert torch.equal(streams[:, :4], uniform_streams(5, [1, 2, 3], range(4), 4))
    for other in (uniform_streams(6, [1, 2, 3], range(4), 9), uniform_streams(5, [1, 2], range(4), 9)):
        assert not torch.isclose(streams, other).any()
    assert len(streams.unique()) == streams.numel()


@pytest.mark.parametrize("seed", [-1, 0, 2**63 - 1, -(2**63)])
def test_every_seed_of_the_api_works(seed: int) -> None:
    assert uniform_streams(seed, [], range(1), 3).shape == (1, 3)


def test_draws_follow_the_distribution() -> None:
    probabilities = torch.tensor([0.5, 0.1, 0.4])
    draws = 20_000
    uniform = uniform_streams(0, [], range(1), draws)[0]
    tokens = draw_tokens(probabilities.log().expand(draws, 3), uniform, 1.0, 1.0)
    shares = torch.bincount(tokens, minlength=3) / draws
    assert torch.allclose(shares, probabilities, atol=0.02)  # five standard deviations


def test_the_nucleus_is_the_smallest_set_that_reaches_top_p() -> None:
    logits = torch.tensor([0.5, 0.1, 0.3, 0.1]).log().expand(1000, 4)
    uniform = torch.linspace(0, 1 - 1e-9, 1000, dtype=torch.float64)
    for top_p, kept in ((0.4, {0}), (0.5, {0}), (0.55, {0, 2}), (0.79, {0, 2})):
        assert set(draw_tokens(logits, uniform, 1.0, top_p).tolist()) == kept


def test_a_flat_distribution_is_sampled_beyond_the_candidates() -> None:
    logits = torch.zeros(2000, 3000)
    uniform = torch.linspace(0, 1 - 1e-9, 2000, dtype=torch.float64)
    assert len(draw_tokens(logits, uniform, 1.0, 0.9).unique()) > 1500


@given(st.floats(min_value=5e-324, max_value=2.0), st.floats(min_value=1e-300, max_value=1.0), st.floats(0, 1 - 2**-53))
def test_every_temperature_and_top_p_gives_a_token(temperature: float, top_p: float, uniform: float) -> None:
    logits = torch.tensor([[3.0, float("-inf"), 1.0]])
    token = draw_tokens(logits, torch.tensor([uniform], dtype=torch.float64), temperature, top_p).item()
    assert token in (0, 2)
