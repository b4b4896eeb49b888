"""A recipe's stages on Ray that no other test runs: the evaluation of its models, once."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from cert_ray.errors import CertRayError, ConfigError
from cert_ray.operations import pipeline
from cert_ray.operations.on_ray import run_on_worker
from cert_ray.operations.recipe import Recipe, recipe_from
from cert_ray.operations.story import read_story
from cert_ray.telemetry import logs
from tests.ray_marks import RAY_DATA
from tests.serving.builders import save_model

PROBLEMS = Path(pipeline.__file__).with_name("demo_problems.jsonl")


def recipe_of(folder: Path, evaluation: dict[str, object] | None) -> Recipe:
    train = {"steps": 4, "warmup_steps": 1, "micro_batch": 1}
    return recipe_from(
        {
            "run": str(folder / "run"),
            "libraries": ["numpy"],
            "preprocess": {"sources": {"inputs": ["corpus"]}},
            "models": {name: {"start": "tiny", "view": name, "train": train} for name in ("sketcher", "generator")},
            "evaluation": evaluation,
        },
        "test",
    )


def test_a_recipe_without_an_evaluation_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="evaluation: this recipe has none"):
        pipeline.run_evaluate(recipe_of(tmp_path, None))


def test_an_evaluation_names_a_model_of_the_recipe(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="evaluation: no model xl in this recipe"):
        recipe_of(tmp_path, {"problems": [str(PROBLEMS)], "model": "xl"})


class TestOnRay:
    pytestmark = RAY_DATA

    def test_models_are_scored_once(self, tmp_path: Path) -> None:
        recipe = recipe_of(tmp_path, {"problems": [str(PROBLEMS)], "n": 2, "max_tokens": 4, "requirements": []})
        for seed, name in enumerate(recipe.models):
            save_model(tmp_path / "run" / "models" / name, seed=seed)
        first = pipeline.run_evaluate(recipe)
        ((problems, scores),) = first.items()
        assert problems == str(PROBLEMS)
        assert set(scores) == {"pass@1"}
        written = tmp_path / "run" / "evaluation" / "summary.json"
        before = written.stat().st_mtime_ns
        assert pipeline.run_evaluate(recipe) == first
        assert written.stat().st_mtime_ns == before

    def test_an_error_raised_on_purpose_comes_back_as_itself(self) -> None:
        def fail() -> None:
            raise ConfigError("change it")

        with pytest.raises(CertRayError, match=r"^change it$"):
            run_on_worker(fail, cpus=1, gpus=0)

    def test_lines_of_a_task_are_kept_below_the_run(self, tmp_path: Path) -> None:
        def tell() -> None:
            logging.getLogger("cert_ray.tests").info("pass@1 0.25")

        with logs.story(str(tmp_path), "evaluate"):
            run_on_worker(tell, cpus=1, gpus=0)
        (line,) = (line for line in read_story(str(tmp_path)) if line.level == "INFO")
        assert (line.verb, line.message) == ("evaluate-worker", "pass@1 0.25")
