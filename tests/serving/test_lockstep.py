"""Side by side, prompts get the answers that each gets alone; equal samples are one row of the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cert_ray.errors import RequestError
from cert_ray.serving.answering import Answerer, ModelConfig
from cert_ray.serving.completers import CompleterConfig
from cert_ray.serving.engines import TransformersEngine
from cert_ray.serving.lockstep import LockstepCompleter, LockstepEngine, run_together
from cert_ray.serving.sampling import Sampling
from cert_ray.sketching import prompt_format
from tests.serving.builders import save_model

PROMPTS = ["import pandas as pd\n", "df = pd.DataFrame(", "def head(df, n):\n    return ", "x", "\n\ndf['a'] = "]


@pytest.fixture(scope="module", params=["gpt_neo", "llama"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp(request.param), request.param)


@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0])
def test_prompts_of_several_lengths_get_the_answers_they_get_alone(folder: str, temperature: float) -> None:
    alone, together = TransformersEngine(folder), LockstepEngine(folder)
    prompts = [prompt_format.encode_code(alone.tokenizer, text) for text in PROMPTS] + [[]]
    starts = ["", "", " ", "", "  ", ""]
    options: dict[str, Any] = {"n": 5, "max_tokens": 70, "temperature": temperature, "top_p": 0.9, "seed": 7}
    first = alone.generate(prompts, stop=("\ndef",), starts=starts, **options)
    second = together.generate(prompts, stop=("\ndef",), starts=starts, **options)
    for expected, found in zip(first, second, strict=True):
        assert [(one.ids, one.text, one.finish_reason) for one in found] == [
            (one.ids, one.text, one.finish_reason) for one in expected
        ]
        assert [one.mean_logprob for one in found] == pytest.approx([one.mean_logprob for one in expected], abs=1e-4)


def test_samples_that_agree_so_far_are_one_row(folder: str) -> None:
    engine = LockstepEngine(folder)
    rows: list[int] = []
    forward = engine._model.forward

    def counting(*arguments: Any, **options: Any) -> Any:
        rows.append(len(options["input_ids"]))
        return forward(*arguments, **options)

    engine._model.forward = counting
    found = engine.generate([[5, 6]], n=8, max_tokens=6, temperature=0.4, top_p=1.0, seed=1, stop=())[0]
    steps = max(len(one.ids) for one in found)
    distinct = [len({one.ids[:step] for one in found if len(one.ids) >= step}) for step in range(steps)]
    assert rows == distinct[: len(rows)]
    assert rows[0] == 1


def test_the_cascade_answers_as_one_prompt_after_the_other(folder: str, tmp_path: Path) -> None:
    models = ModelConfig(sketcher=folder, generator=save_model(tmp_path, "llama", seed=3))
    sampling = Sampling(n=3, max_tokens=10, temperature=0.8, top_p=0.9, seed=2)
    one_by_one = Answerer.load(models).answer(PROMPTS, sampling)
    side_by_side = LockstepCompleter(models, width=3).answer(PROMPTS, sampling)
    for expected, found in zip(one_by_one, side_by_side, strict=True):
        assert (found.route, found.sketch) == (expected.route, expected.sketch)
        assert [choice.text for choice in found.choices] == [choice.text for choice in expected.choices]


def test_a_plain_model_completes_every_prompt_n_times(folder: str) -> None:
    completer = LockstepCompleter(ModelConfig(model=folder), CompleterConfig(max_tokens=4))
    found = completer(PROMPTS, 2)
    assert [len(texts) for texts in found] == [2] * len(PROMPTS)
    assert completer([], 2) == []


def test_a_prompt_that_does_not_fit_fails_by_itself_and_nobody_waits_for_ever(folder: str) -> None:
    engine = LockstepEngine(folder)

    def work(prompt: str, engines: list[Any]) -> int:
        ids = [5] * (engine.context_tokens + 1 if prompt == "long" else 3)
        try:
            options: dict[str, Any] = {"n": 1, "max_tokens": 2, "temperature": 0.0, "top_p": 1.0, "seed": 0}
            return len(engines[0].generate([ids], stop=(), **options))
        except RequestError:
            return -1

    assert run_together(["a", "long", "b"], [engine], work) == [1, -1, 1]
