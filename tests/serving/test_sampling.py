"""Streams and draws, against hand-made distributions and scipy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from cert_ray.errors import ConfigError
from cert_ray.serving.sampling import Sampling, Streams, _highest, _sums, _totals, draw_tokens, log_totals


def draw(logits: torch.Tensor, uniform: np.ndarray, temperature: float, top_p: float) -> np.ndarray:
    return draw_tokens(logits[None], [uniform], [temperature], [top_p])[0]


def test_a_stream_is_named_by_seed_prompt_sample_and_step() -> None:
    stream = Streams(5, [1, 2, 3])
    assert np.array_equal(stream.at(4, 9)[:3], stream.at(4, 3))
    others = [stream.at(5, 9), Streams(6, [1, 2, 3]).at(4, 9), Streams(5, [1, 2]).at(4, 9)]
    assert len(np.unique(np.concatenate([stream.at(4, 9), *others]))) == 36


@pytest.mark.parametrize("seed", [-1, 0, 2**63 - 1, -(2**63)])
def test_every_seed_of_the_api_works(seed: int) -> None:
    assert Streams(seed, []).at(0, 3).shape == (3,)


@pytest.mark.parametrize("temperature", [0.2, 0.8, 1.0])
@pytest.mark.parametrize("top_p", [0.9, 1.0])
def test_draws_follow_the_distribution(temperature: float, top_p: float) -> None:
    logits = torch.randn(200, generator=torch.Generator().manual_seed(1)) * 2
    draws = 50_000
    tokens = draw(logits, Streams(0, []).at(0, draws), temperature, top_p)
    probabilities = torch.softmax(logits.double() / temperature, dim=-1).numpy()
    order = np.argsort(-probabilities)
    kept = order[: int(np.searchsorted(probabilities[order].cumsum(), top_p)) + 1]
    assert set(tokens.tolist()) <= set(kept.tolist())
    expected = probabilities[kept] / probabilities[kept].sum() * draws
    common = expected >= 5  # the test's own condition; the rest counts as one
    counts = np.bincount(tokens, minlength=200)[kept]
    seen, wanted = [*counts[common], counts[~common].sum()], [*expected[common], expected[~common].sum()]
    if wanted[-1] < 5:
        seen, wanted = [*seen[:-2], seen[-2] + seen[-1]], [*wanted[:-2], wanted[-2] + wanted[-1]]
    assert len(seen) == 1 or chisquare(seen, wanted).pvalue > 0.001


def test_the_nucleus_is_the_smallest_set_that_reaches_top_p() -> None:
    logits = torch.tensor([0.5, 0.1, 0.3, 0.1]).log()
    uniform = np.linspace(0, 1 - 1e-9, 1000)
    for top_p, kept in ((0.4, {0}), (0.499, {0}), (0.55, {0, 2}), (0.79, {0, 2})):
        assert set(draw(logits, uniform, 1.0, top_p).tolist()) == kept


@pytest.mark.parametrize("size", [100, 4_096, 20_000, 20_480])
def test_the_highest_are_found_wherever_they_stand(size: int) -> None:
    logits_RV = torch.randn(5, size, generator=torch.Generator().manual_seed(size))
    logits_RV[1, :70] += 10  # all in two blocks
    logits_RV[2, -70:] += 10
    logits_RV[3, 9:] = float("-inf")
    values_RK, ids_RK = _highest(logits_RV, 64)
    assert torch.equal(values_RK, logits_RV.sort(descending=True).values[:, :64])
    assert torch.equal(logits_RV.gather(1, ids_RK), values_RK)
    assert all(len(set(row)) == 64 for row in ids_RK.tolist())


@pytest.mark.parametrize("gap", [1.0, 3.0, 5.0, 6.0, 8.0, 20.0])
def test_what_is_next_to_nothing_changes_no_draw(gap: float) -> None:
    """From all tokens needed to a few: the tokens are those of running sums over the whole row, in float64."""
    logits = torch.randn(20_000, generator=torch.Generator().manual_seed(3))
    logits[::700] += gap
    uniform = np.linspace(0, 1 - 1e-9, 500)
    order = logits.argsort(descending=True, stable=True).numpy()
    cumulative = torch.softmax(logits.double() / 0.2, dim=-1).numpy()[order].cumsum()
    size = int(np.searchsorted(cumulative, 0.9)) + 1
    expected = order[np.searchsorted(cumulative[:size], uniform * cumulative[size - 1], side="right")]
    assert np.mean(draw(logits, uniform, 0.2, 0.9) == expected) > 0.99  # but where two tokens meet


@pytest.mark.parametrize("behind", [2e-6, 1e-3, 1e-1])
@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_many_tokens_behind_the_candidates_hold_what_is_theirs(behind: float, temperature: float) -> None:
    """63 equal tokens hold nearly all; of the others, all equal, one is a candidate, and shows what they may hold."""
    others = 20_000 - 63
    logits = torch.full((20_000,), temperature * float(np.log(63 * behind / (1 - behind) / others)))
    high = torch.arange(63) * 300
    logits[high] = 0.0
    values_K = logits.topk(64).values
    weights_V = np.exp(logits.double().numpy() / temperature)
    cumulative_K = np.exp(values_K.double().numpy() / temperature).cumsum()
    totals = _totals(logits[None], values_K[None, :1], cumulative_K[None], np.array([[temperature]]), None)
    assert totals == pytest.approx(np.array([[weights_V.sum()]]), rel=1e-6)
    drawn = draw(logits, 1 - behind * np.array([2.0, 1.3, 0.7, 0.5]), temperature, 1.0)
    assert np.isin(drawn, high.numpy()).tolist() == [True, True, False, False]


def test_a_flat_distribution_is_sampled_beyond_the_candidates() -> None:
    tokens = draw(torch.zeros(3000), np.linspace(0, 1 - 1e-9, 2000), 1.0, 0.9)
    assert len(np.unique(tokens)) > 1500


def test_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    logits = torch.randn(4, 500, generator=torch.Generator().manual_seed(2))
    uniforms = [Streams(seed, []).at(0, 30) for seed in range(4)]
    options = [0.0, 0.3, 1.0, 1.5], [0.9, 0.5, 1.0, 0.99]
    together = draw_tokens(logits, uniforms, *options)
    for row in range(4):
        alone = draw(logits[row], uniforms[row], options[0][row], options[1][row])
        assert np.array_equal(together[row], alone)


@given(st.floats(min_value=5e-324, max_value=2.0), st.floats(min_value=1e-300, max_value=1.0), st.floats(0, 1 - 2**-53))
def test_every_temperature_and_top_p_gives_a_token(temperature: float, top_p: float, uniform: float) -> None:
    token = draw(torch.tensor([3.0, float("-inf"), 1.0]), np.array([uniform]), temperature, top_p)[0]
    assert token in (0, 2)


@pytest.mark.parametrize("size", [7, 1_024, 5_000, 5_120])
def test_a_row_is_summed_whole_and_the_same_in_company(size: int) -> None:
    weights_RV = torch.randn(6, size, generator=torch.Generator().manual_seed(size)).mul_(3).exp_()
    sums_R1 = _sums(weights_RV)
    assert (sums_R1.dtype, sums_R1.shape) == (torch.float64, (6, 1))
    assert sums_R1.numpy() == pytest.approx(weights_RV.numpy().astype(np.float64).sum(axis=1)[:, None], rel=3e-7)
    for row in range(6):
        assert torch.equal(_sums(weights_RV[row : row + 1]), sums_R1[row : row + 1])


def test_tokens_that_cannot_be_drawn_leave_no_subnormal_numbers_behind() -> None:
    logits_RV = torch.linspace(0, -150, 1_000)[None].clone()
    logits_RV[0, -1] = float("-inf")
    scratch_RV = torch.empty_like(logits_RV)

    def subnormal() -> int:  # each costs fifty times as much as another number
        return int(((scratch_RV > 0) & (scratch_RV < torch.finfo(torch.float32).tiny)).sum())

    assert float(log_totals(logits_RV, scratch_RV)) == pytest.approx(float(logits_RV.double().logsumexp(-1)), abs=1e-6)
    assert subnormal() == 0
    draw_tokens(logits_RV, [np.array([0.5])], [0.2], [0.9], scratch_RV)
    assert subnormal() == 0


def test_options_that_contradict_each_other_are_refused() -> None:
    for options, named in (({"n": 3, "best_of": 2}, "best_of=2"), ({"max_tokens": 0}, "max_tokens=0")):
        with pytest.raises(ConfigError, match=named):
            Sampling.from_mapping(options, "a request")
    assert Sampling(n=2, best_of=5).drawn == 5
