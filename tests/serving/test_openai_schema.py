"""Requests are read with OpenAI's defaults, and what is not done here is refused by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pydantic
import pytest
import torch

from cert_ray.errors import RequestError
from cert_ray.serving.openai_schema import CompletionRequest, RequestLimits, read_request
from cert_ray.serving.sampling import Mode, Sampling, draw_tokens


def read(limits: RequestLimits | None = None, **fields: Any) -> tuple[list[str], Sampling]:
    request = CompletionRequest.model_validate({"model": "cert", "prompt": "x =", **fields})
    return read_request(request, limits or RequestLimits())


def test_defaults_are_openais() -> None:
    prompts, sampling = read()
    assert prompts == ["x ="]
    assert (sampling.n, sampling.max_tokens, sampling.temperature, sampling.top_p) == (1, 16, 1.0, 1.0)
    nulls = dict.fromkeys(("n", "max_tokens", "temperature", "top_p", "stop", "seed", "logprobs", "stream", "suffix"))
    assert read(**nulls)[1].model_copy(update={"seed": 0}) == sampling.model_copy(update={"seed": 0})


def test_a_request_without_a_seed_gets_a_fresh_one() -> None:
    assert read()[1].seed != read()[1].seed
    assert not read()[1].is_seeded
    assert (read(seed=0)[1].seed, read(seed=0)[1].is_seeded) == (0, True)
    assert read(temperature=0)[1].temperature == 0


def test_a_nucleus_of_nothing_is_the_likeliest_token() -> None:
    """OpenAI's least top_p is 0; it must not be read as none at all, which is every token."""
    logits, numbers = torch.tensor([[0.0, 0.1, -5.0]]), np.array([0.0, 0.5, 0.9])
    for top_p, expected in ((0, {1}), (0.0, {1}), (1e-300, {1}), (1.0, {0, 1})):
        sampling = read(top_p=top_p)[1]
        (tokens,) = draw_tokens(logits, [numbers], [sampling.temperature], [sampling.top_p])
        assert set(tokens.tolist()) >= expected
        assert (len(set(tokens.tolist())) == 1) == (expected == {1})


def test_prompts_and_stops_may_be_lists() -> None:
    prompts, sampling = read(prompt=["a", "b"], stop=["\n", ""], n=3)
    assert prompts == ["a", "b"]
    assert sampling.stop == ("\n",)
    assert read(stop="\n\n")[1].stop == ("\n\n",)


def test_every_option_arrives() -> None:
    options = {"n": 2, "best_of": 3, "logprobs": 0, "echo": True, "stop_token_ids": [7], "max_tokens": 0}
    sampling = read(mode="generator_only", **options)[1]
    assert sampling.mode == Mode.GENERATOR_ONLY
    assert (sampling.best_of, sampling.logprobs, sampling.echo) == (3, 0, True)
    assert (sampling.stop_token_ids, sampling.max_tokens) == ((7,), 0)
    assert read(suffix="\n")[1].suffix == "\n"
    assert read(suffix="")[1].suffix is None


@pytest.mark.parametrize(
    ("field", "value", "default"),
    [
        ("logit_bias", {"50256": -100}, {}),
        ("presence_penalty", 0.5, 0),
        ("frequency_penalty", -1, 0.0),
        ("top_k", 5, None),
    ],
)
def test_what_is_not_done_is_refused_unless_it_is_the_default(field: str, value: object, default: object) -> None:
    if default is not None:
        read(**{field: default})
    with pytest.raises(pydantic.ValidationError, match=field):
        read(**{field: value})


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"prompt": [1, 2, 3]}, "prompt"),
        ({"prompt": [[1, 2], [3]]}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"stop": ["\udfff"]}, "stop"),
        ({"n": 0}, "n"),
        ({"n": "many"}, "n"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"n": "2"}, "n"),
        ({"echo": "yes"}, "echo"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"seed": 2**63}, "seed"),
    ],
)
def test_values_out_of_range_are_refused(fields: dict[str, Any], where: str) -> None:
    with pytest.raises(pydantic.ValidationError) as refused:
        read(**fields)
    assert refused.value.errors()[0]["loc"][0] == where


def test_limits_are_named() -> None:
    limits = RequestLimits(max_prompts=2, max_n=3, max_choices=4, max_stops=1)
    for fields in (
        {"prompt": ["a"] * 3},
        {"n": 4},
        {"prompt": ["a", "b"], "n": 3},
        {"stop": ["a", "b"]},
        {"best_of": 4},
    ):
        with pytest.raises(RequestError, match="more than this server's") as refused:
            read(limits, **fields)
        assert refused.value.status == 400
