"""Requests are read with OpenAI's defaults, and what is not done here is refused by name."""

from __future__ import annotations

from typing import Any

import pydantic
import pytest

from cert_ray.errors import RequestError
from cert_ray.serving.cascade import CascadeAnswer, Route
from cert_ray.serving.engines import Completion
from cert_ray.serving.openai_schema import CompletionRequest, RequestLimits, read_request, write_response
from cert_ray.serving.sampling import Sampling


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
    assert read(seed=0)[1].seed == 0
    assert read(temperature=0)[1].temperature == 0


def test_prompts_and_stops_may_be_lists() -> None:
    prompts, sampling = read(prompt=["a", "b"], stop=["\n", ""], n=3)
    assert prompts == ["a", "b"]
    assert sampling.stop == ("\n",)
    assert read(stop="\n\n")[1].stop == ("\n\n",)


@pytest.mark.parametrize(
    ("field", "value", "default"),
    [
        ("logprobs", 5, None),
        ("echo", True, False),
        ("stream", True, False),
        ("best_of", 3, None),
        ("suffix", "\n", ""),
        ("logit_bias", {"50256": -100}, {}),
        ("presence_penalty", 0.5, 0),
        ("frequency_penalty", -1, 0.0),
        ("top_k", 5, None),
    ],
)
def test_what_is_not_done_is_refused_unless_it_is_the_default(field: str, value: object, default: object) -> None:
    read(**{field: default})
    with pytest.raises(RequestError, match=field) as refused:
        read(**{field: value})
    assert (refused.value.status, refused.value.param) == (400, field)


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
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"seed": 2**63}, "seed"),
    ],
)
def test_values_out_of_range_are_refused(fields: dict[str, Any], where: str) -> None:
    with pytest.raises(pydantic.ValidationError) as refused:
        read(**fields)
    assert refused.value.errors()[0]["loc"][0] == where


def test_limits_are_named() -> None:
    limits = RequestLimits(max_prompts=2, max_n=3, max_choices=4, max_stops=1)
    for fields in ({"prompt": ["a"] * 3}, {"n": 4}, {"prompt": ["a", "b"], "n": 3}, {"stop": ["a", "b"]}):
        with pytest.raises(RequestError, match="more than this server's") as refused:
            read(limits, **fields)
        assert refused.value.status == 400


def test_choices_are_numbered_through_all_prompts() -> None:
    choices = (Completion((1, 2), "a", "stop", -1.0), Completion((3,), "b", "length", -1.0))
    answers = [
        CascadeAnswer(choices, Route.GENERATOR, "s", 2, 1.0, 5, {"sketch": 0.5}),
        CascadeAnswer(choices, Route.SKETCHER, "t", 1, 0.5, 7),
    ]
    response = write_response("cert", Sampling(n=2, seed=4), answers).model_dump()
    assert [(choice["index"], choice["text"]) for choice in response["choices"]] == [
        (0, "a"),
        (1, "b"),
        (2, "a"),
        (3, "b"),
    ]
    assert response["usage"] == {"prompt_tokens": 12, "completion_tokens": 6, "total_tokens": 18}
    assert (response["cert"]["route"], response["cert"]["sketch"], response["cert"]["seed"]) == ("generator", "s", 4)
    assert [other["route"] for other in response["cert"]["others"]] == ["sketcher"]
