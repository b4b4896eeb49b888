"""Editor plugins get what they read, as far as this server's models and their windows go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from cert_ray.errors import RequestError
from cert_ray.serving.answers import CascadeAnswer
from cert_ray.serving.boundaries import PAPER_STOPS
from cert_ray.serving.editors import nearer_half
from cert_ray.serving.engines import check_length
from cert_ray.serving.sampling import Sampling
from tests.serving.front_doors import ScriptedBackend
from tests.serving.test_http import error_of, send


class NarrowBackend(ScriptedBackend):
    """A window of so many words, and no way to fill in the middle unless `infills`."""

    def __init__(self, window: int = 1_000, infills: bool = True) -> None:
        super().__init__()
        self._window, self._infills = window, infills

    async def answer(
        self, model: str, prompts: Sequence[str], sampling: Sampling, timeout_s: float
    ) -> list[CascadeAnswer]:
        check_length(len((prompts[0] + (sampling.suffix or "")).split()), self._window)
        if sampling.suffix is not None and not self._infills:
            raise RequestError(400, "suffix this model was not trained so.", "suffix", "unsupported_value")
        return await super().answer(model, prompts, sampling, timeout_s)


def infill(backend: ScriptedBackend, **fields: Any) -> Any:
    return send("POST", "/infill", backend, json=fields)


def tabby(backend: ScriptedBackend, **fields: Any) -> Any:
    return send("POST", "/tabby/v1/completions", backend, json=fields)


def test_llama_cpps_plugin_gets_what_stands_between() -> None:
    backend = NarrowBackend()
    response = infill(
        backend,
        input_prefix="import pandas as pd\n",
        prompt="x",
        input_suffix="\nprint(x)",
        n_predict=24,
        stop=["\n"],
        seed=-1,
        samplers=["top_k"],
        cache_prompt=True,
    )
    assert response.status_code == 200
    assert (response.json()["content"], response.json()["stop"]) == (" = 0", True)
    [(_, prompts, sampling)] = backend.asked
    assert prompts == ["import pandas as pd\nx"]
    assert (sampling.suffix, sampling.max_tokens, sampling.stop) == ("\nprint(x)", 24, ("\n",))


def test_a_model_that_cannot_fill_in_is_given_what_stands_before() -> None:
    backend = NarrowBackend(infills=False)
    assert infill(backend, input_prefix="x", input_suffix="y").json()["content"] == " = 0"
    assert [(prompts, sampling.suffix) for _, prompts, sampling in backend.asked] == [(["x"], None)]


def test_what_is_far_from_the_cursor_is_left_out_until_it_fits() -> None:
    backend = NarrowBackend(window=60)
    lines = [f"line {number}" for number in range(100)]
    assert infill(backend, input_prefix="\n".join(lines), input_suffix=" a" * 40).status_code == 200
    [(_, [prompt], sampling)] = backend.asked
    assert prompt.splitlines() == lines[-len(prompt.splitlines()) :]
    assert 10 <= len(prompt.splitlines()) <= 30
    assert sampling.suffix == " a" * (len(sampling.suffix or "") // 2)


def test_a_first_line_before_a_long_file_is_completed() -> None:
    """There is no line before the cursor to leave out."""
    backend = NarrowBackend(window=60)
    assert infill(backend, prompt="import", input_suffix=" a" * 500).status_code == 200
    [(_, prompts, sampling)] = backend.asked
    assert prompts == ["import"]
    assert 20 <= len((sampling.suffix or "").split()) < 60


def test_a_plugins_nucleus_of_nothing_is_not_all() -> None:
    backend = NarrowBackend()
    infill(backend, input_prefix="x", top_p=0)
    assert 0 < backend.asked[0][2].top_p < 0.01


def test_one_line_that_does_not_fit_is_refused_with_both_lengths() -> None:
    error = error_of(infill(NarrowBackend(window=5), input_prefix="a b c d e f g"))
    assert error["code"] == "context_length_exceeded"
    assert "5 tokens" in error["message"]
    assert "7 tokens" in error["message"]


def test_a_plugin_that_warms_up_costs_no_model() -> None:
    backend = NarrowBackend()
    assert infill(backend, input_prefix="x", n_predict=0).json()["content"] == ""
    assert backend.asked == []


def test_tabbys_plugin_gets_choices_cut_as_the_paper_cuts() -> None:
    backend = NarrowBackend()
    response = tabby(backend, language="python", segments={"prefix": "x", "suffix": "", "git_url": "u"}, seed=7)
    assert response.json()["choices"] == [{"index": 0, "text": " = 0"}]
    [(_, prompts, sampling)] = backend.asked
    assert (prompts, sampling.stop, sampling.seed, sampling.suffix) == (["x"], PAPER_STOPS, 7, None)
    assert send("GET", "/tabby/v1/health", backend).json()["model"] == "org/cert"
    assert send("GET", "/tabby/v1beta/server_setting", backend).json() == {"disable_client_side_telemetry": True}
    assert send("POST", "/tabby/v1/events", backend, json={"type": "view"}).status_code == 204


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/infill", {"input_prefix": "x", "stream": True}, "stream"),
        ("/infill", {"input_prefix": "x", "n_predict": "3"}, "n_predict"),
        ("/tabby/v1/completions", {"language": "rust", "segments": {"prefix": "x"}}, "language"),
        ("/tabby/v1/completions", {"language": "python"}, "segments"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(path: str, body: dict[str, Any], param: str) -> None:
    response = send("POST", path, json=body)
    assert response.status_code == 400
    assert error_of(response)["param"] == param


def test_half_a_surrogate_pair_is_refused() -> None:
    response = send(
        "POST", "/infill", content=b'{"input_prefix": "\\ud800"}', headers={"Content-Type": "application/json"}
    )
    assert (response.status_code, error_of(response)["param"]) == (400, "prompt")


def test_the_nearer_half_begins_with_a_line() -> None:
    assert nearer_half("one\ntwo\nthree\nfour") == "four"
    assert nearer_half("one\ntwo\nthree") == "three"
    assert nearer_half("one line") is None
    assert nearer_half("first\n") is None
