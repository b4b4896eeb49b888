"""A recipe's stages that no other test runs: a base's tokenizer taken over, the evaluation of its models."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from cert_ray import storage
from cert_ray.errors import CertRayError, ConfigError, NotFinishedError
from cert_ray.operations import on_ray, pipeline
from cert_ray.operations.on_ray import run_on_worker
from cert_ray.operations.recipe import Recipe, recipe_from
from cert_ray.operations.sources import Source
from cert_ray.operations.story import read_story
from cert_ray.retrieval.library_docs import write_docs
from cert_ray.retrieval.retriever import RetrieveConfig
from cert_ray.serving.answering import Answerer, ModelConfig
from cert_ray.telemetry import logs
from cert_ray.training.model_card import Score
from tests.evaluation.builders import die_before, in_this_process, write_problems
from tests.ray_marks import RAY_DATA
from tests.retrieval.builders import DOCS
from tests.serving.builders import save_model
from tests.tokens.packs import write_pack
from tests.training.conftest import write_tokenizer

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


@pytest.mark.parametrize(
    ("last", "error", "told"),
    [
        ({"start": "scketcher", "view": "sketcher"}, ConfigError, r"start: 'scketcher' is not a folder; give a preset"),
        ({"start": "first", "view": "xl"}, NotFinishedError, r"tokens/xl has no manifest\.json: run `cert-ray pack`"),
    ],
)
def test_what_the_last_model_lacks_is_told_before_the_first_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: dict[str, str], error: type[Exception], told: str
) -> None:
    write_pack(tmp_path / "run" / "tokens" / "sketcher", [[[(range(9), False)]]])
    train = {"steps": 4, "warmup_steps": 1, "micro_batch": 1}
    models = {"first": {"start": "tiny", "view": "sketcher", "train": train}, "last": {**last, "train": train}}
    recipe = recipe_of(tmp_path, None)
    recipe = recipe_from({**recipe.model_dump(mode="json"), "models": models}, "test")
    trained: list[str] = []
    monkeypatch.setattr(pipeline, "run_train", lambda recipe, name: trained.append(name))
    with pytest.raises(error, match=told):
        pipeline.run_models(recipe)
    assert not trained
    assert list(pipeline.run_models(recipe, ["first"])) == trained == ["first"]


def test_an_evaluation_of_models_that_are_not_trained_says_what_to_run(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, {"problems": [str(PROBLEMS)]})
    with pytest.raises(NotFinishedError, match=r"models/sketcher has no manifest\.json: run `cert-ray train`"):
        pipeline.run_evaluate(recipe)


def test_an_evaluation_names_a_model_of_the_recipe(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="evaluation: no model xl in this recipe"):
        recipe_of(tmp_path, {"problems": [str(PROBLEMS)], "model": "xl"})


@pytest.mark.parametrize("view", ["xl", "base"])
def test_models_are_scored_with_the_documentation_that_they_were_trained_to_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, view: str
) -> None:
    write_docs(str(tmp_path / "docs.jsonl"), DOCS)
    folder = save_model(tmp_path / "run" / "models" / "it")
    options: dict[str, object] = {
        "run": str(tmp_path / "run"),
        "libraries": ["monkey"],
        "preprocess": {"sources": {"inputs": ["corpus"]}},
        "retrieve": {"docs": "docs.jsonl", "top": 1},
        "models": {"it": {"start": "tiny", "view": view, "train": {"steps": 4, "warmup_steps": 1, "micro_batch": 1}}},
        "evaluation": {"problems": [write_problems(tmp_path / "p.jsonl", 2)], "model": "it", "max_tokens": 2},
    }
    loaded: list[ModelConfig] = []
    load = Answerer.load
    monkeypatch.setattr(Answerer, "load", lambda config: loaded.append(config) or load(config))
    monkeypatch.setattr(pipeline, "run_on_worker", lambda work, cpus, gpus: work())
    monkeypatch.setattr(pipeline, "execute_on_ray", in_this_process)
    monkeypatch.setattr(pipeline, "warn_of_unprotected_nodes", lambda unsafe, unfiltered: None)
    monkeypatch.chdir(tmp_path)
    pipeline.run_evaluate(recipe_from(options, "test"))
    (config,) = loaded
    assert config.model == folder
    written = json.loads((tmp_path / "run" / "evaluation" / "summary.json").read_text())["config"]["source"]
    if view == "base":
        assert (config.retrieve, written) == (None, {"model": folder})
        return
    assert config.retrieve == RetrieveConfig(docs=str(tmp_path / "docs.jsonl"), top=1).pinned()
    assert Source.from_mapping(written, "test").retrieve == RetrieveConfig(docs="docs.jsonl", top=1)


@pytest.mark.parametrize("temperatures", [(0.0,), (0.2, 0.8)])
def test_the_scores_go_into_the_cards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, temperatures: tuple[float, ...]
) -> None:
    problems = write_problems(tmp_path / "p.jsonl", 2)
    options = {"problems": [problems], "max_tokens": 2, "n": 1, "temperatures": temperatures, "requirements": []}
    recipe = recipe_of(tmp_path, options)
    for name in recipe.models:
        save_model(tmp_path / "run" / "models" / name)
    cards: dict[str, list[Score]] = {}
    monkeypatch.setattr(pipeline, "write_card", lambda recipe, name, scores: cards.update({name: scores}))
    monkeypatch.setattr(pipeline, "run_on_worker", lambda work, cpus, gpus: work())
    monkeypatch.setattr(pipeline, "execute_on_ray", in_this_process)
    monkeypatch.setattr(pipeline, "warn_of_unprotected_nodes", lambda unsafe, unfiltered: None)
    found = pipeline.run_evaluate(recipe)
    assert set(cards) == {"sketcher", "generator"}
    (score,) = cards["sketcher"]
    assert (score.system, score.k, score.problems) == ("cascade", 1, 2)
    assert score.mode.startswith("greedy" if temperatures == (0.0,) else "sampled at temperature 0.")
    assert [score.value] == [each["pass@1"] for each in found.values()]


class TestOnRay:
    pytestmark = RAY_DATA

    @pytest.mark.usefixtures("contained")
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

    def test_a_task_that_loses_its_worker_four_times_runs_again(self, tmp_path: Path) -> None:
        assert run_on_worker(lambda: die_before(tmp_path, attempts=5), cpus=1, gpus=0) == 5

    def test_a_task_that_always_loses_its_worker_ends_with_what_to_look_at(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert 10 < on_ray._RETRIES < 100
        monkeypatch.setattr(on_ray, "_RETRIES", 1)
        with pytest.raises(CertRayError, match=r"2 times.*memory.*cpus and gpus"):
            run_on_worker(lambda: die_before(tmp_path, attempts=99), cpus=1, gpus=0)
        assert len((tmp_path / "calls").read_text()) == 2

    def test_an_error_of_the_code_is_not_tried_again(self, tmp_path: Path) -> None:
        def fail() -> None:
            with (tmp_path / "attempts").open("a") as stream:
                stream.write("x")
            raise ValueError("a fault of ours")

        with pytest.raises(ValueError, match="a fault of ours"):
            run_on_worker(fail, cpus=1, gpus=0)
        assert (tmp_path / "attempts").read_text() == "x"

    def test_lines_of_a_task_are_kept_below_the_run(self, tmp_path: Path) -> None:
        def tell() -> None:
            logging.getLogger("cert_ray.tests").info("pass@1 0.25")

        with logs.story(str(tmp_path), "evaluate"):
            run_on_worker(tell, cpus=1, gpus=0)
        (line,) = (line for line in read_story(str(tmp_path)) if line.level == "INFO")
        assert (line.verb, line.message) == ("evaluate-worker", "pass@1 0.25")


def test_the_tokenizer_of_a_base_in_a_store_is_taken_over_without_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"memory://bases/{tmp_path.name}"
    write_tokenizer(tmp_path)
    storage.write_bytes(f"{url}/tokenizer.json", (tmp_path / "tokenizer.json").read_bytes())
    monkeypatch.setattr(storage, "copy_files_to_local", lambda *_: pytest.fail("that copies the weights"))
    recipe = recipe_from(
        {
            "run": str(tmp_path / "run"),
            "libraries": ["numpy"],
            "preprocess": {"sources": {"inputs": ["corpus"]}},
            "models": {"base": {"start": url, "view": "base", "train": {"steps": 4, "warmup_steps": 1}}},
        },
        "test",
    )
    manifest = pipeline.run_tokenizer(recipe)
    assert manifest.notes["special_tokens_added"] > 0
