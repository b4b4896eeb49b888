"""The whole claim with models of a few thousand parameters: from files to the report, resumed, and made anew."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from cert_ray import cli, storage
from cert_ray.errors import ConfigError
from cert_ray.evaluation.execution import ExecutionConfig
from cert_ray.operations import pipeline, reproduce
from cert_ray.operations.claim import Part
from cert_ray.operations.claim_report import missing_parts, write_report
from cert_ray.operations.recipe import ModelRecipe, Recipe, recipe_from
from cert_ray.retrieval.library_docs import write_docs
from cert_ray.retrieval.retriever import RetrieveConfig
from cert_ray.tokens.encoding import View
from tests.dataset.builders import write_corpus
from tests.retrieval.builders import DOCS
from tests.serving.builders import save_model

PROBLEMS = Path(reproduce.__file__).with_name("demo_problems.jsonl")


class Counting:
    """A `Complete` that answers with numbers and counts what it is asked."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def __call__(self, prompts: list[str], n: int) -> list[list[str]]:
        self.asked.append(prompts)
        return [[f"{prompt}{sample}" for sample in range(n)] for prompt in prompts]


def test_answers_are_remembered_batch_by_batch(tmp_path: Path) -> None:
    url, complete = str(tmp_path / "completions.jsonl"), Counting()
    first = reproduce.Remembered(lambda: complete, url, "models")
    answers = [first(["a", "b"], 2), first(["c"], 2)]
    with (tmp_path / "completions.jsonl").open("a") as stream:
        stream.write('{"key": "cut sh')  # as a kill leaves it
    again = reproduce.Remembered(lambda: complete, url, "models")
    assert [again(["a", "b"], 2), again(["c"], 2)] == answers
    assert complete.asked == [["a", "b"], ["c"]]
    assert again.seconds == again.earlier_s == first.seconds
    again(["a", "b"], 3)
    reproduce.Remembered(lambda: complete, url, "other models")(["c"], 2)
    assert complete.asked[2:] == [["a", "b"], ["c"]]


def _recipe(folder: Path) -> Recipe:
    train = {"steps": 3, "warmup_steps": 1, "micro_batch": 2, "gradient_accumulation": 1, "learning_rate": 1e-3}
    start = str(folder / "start")
    return recipe_from(
        {
            "run": str(folder / "run"),
            "libraries": ["numpy"],
            "preprocess": {"sources": {"inputs": [str(folder / "corpus")]}},
            "context_tokens": 32,
            "held_out_fraction": 0.2,
            "models": {
                name: {"start": start, "view": name, "train": train} for name in ("xl", "sketcher", "generator")
            },
            "claim": {
                "benchmarks": [str(PROBLEMS)],
                "n": 2,
                "limit": 2,
                "max_tokens": 4,
                "requirements": [],
                "threads": 1,
            },
        },
        "test",
    )


@pytest.mark.parametrize("start", ["absent", "tiny"])
def test_a_model_that_is_not_compared_needs_no_base_to_be_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: str
) -> None:
    """But it has a say in whether the run's tokenizer is one of its own: a preset needs that."""
    asked: dict[str, Recipe] = {}
    for stage in ("run_preprocess", "run_tokenizer", "run_views"):
        monkeypatch.setattr(pipeline, stage, lambda recipe, stage=stage: asked.setdefault(stage, recipe))
    monkeypatch.setattr(pipeline, "run_train", lambda recipe, name: name)
    (tmp_path / "start").mkdir()
    given = _recipe(tmp_path)
    base = str(tmp_path / start) if start == "absent" else start
    other = ModelRecipe(start=base, view=View.CONTEXT_FIRST, train=given.models["xl"].train)
    reproduce.train_models(given.model_copy(update={"models": {**given.models, "both": other}}))
    assert asked["run_tokenizer"].adopts_tokenizer is (start == "absent")
    assert asked["run_tokenizer"].outside_bases == [str(tmp_path / "start")]
    assert View.CONTEXT_FIRST not in asked["run_views"].views


def test_every_system_reads_the_documentation_and_another_one_is_another_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    docs = str(tmp_path / "docs.jsonl")
    recipe = _recipe(tmp_path).model_copy(update={"retrieve": RetrieveConfig(docs=docs)})
    given: list[RetrieveConfig | None] = []
    monkeypatch.setattr("cert_ray.training.models.local_folder", lambda folder, option: Path(folder))
    monkeypatch.setattr("cert_ray.serving.answering.Answerer.load", lambda config: given.append(config.retrieve))
    assert recipe.claim is not None
    for system in ("base", "xl", "cert"):
        part = Part(system, 0, "greedy", str(PROBLEMS))
        digests = set()
        for end in (1, 2):
            write_docs(docs, DOCS[:end])
            digests.add(reproduce.part_digest(recipe, part))
        assert len(digests) == 2
        reproduce._load(recipe, part, recipe.claim)
    assert given == [recipe.retrieve] * 3


def test_a_base_that_is_not_there_is_told_before_anything_is_preprocessed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reproduce.pipeline, "run_preprocess", _never)
    with pytest.raises(ConfigError, match=r"start: .*start' is not a folder"):
        reproduce.train_models(_recipe(tmp_path))


def test_models_that_the_claim_does_not_compare_are_neither_packed_nor_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = _recipe(tmp_path)
    (tmp_path / "start").mkdir()
    other = recipe.models["generator"].model_copy(update={"view": View.CONTEXT_FIRST})
    packed: list[View] = []
    for stage in ("run_preprocess", "run_tokenizer", "run_train"):
        monkeypatch.setattr(reproduce.pipeline, stage, lambda *_: None)
    monkeypatch.setattr(reproduce.pipeline, "run_views", lambda given: packed.extend(given.views))
    trained = reproduce.train_models(recipe.model_copy(update={"models": {**recipe.models, "both": other}}))
    assert (list(trained), packed) == (["xl", "sketcher", "generator"], [View.XL, View.SKETCHER, View.GENERATOR])


def test_the_command_says_how_what_was_answered_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(_recipe(tmp_path).model_dump(mode="json")))
    monkeypatch.setattr(reproduce, "_load", lambda *_: lambda _: Counting())
    monkeypatch.setattr(reproduce, "run_evaluation", _never)
    result = CliRunner().invoke(cli.app, ["reproduce", str(recipe), "--only", "base", "--answers-only"])
    assert result.exit_code == 0, result.output
    assert f"base answered, kept in {tmp_path / 'run' / 'claim'}" in result.output
    assert "--only base instead of --answers-only" in result.output


def test_models_are_loaded_once_whatever_the_modes_benchmarks_and_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other.jsonl"
    shutil.copyfile(PROBLEMS, other)
    made = _recipe(tmp_path)
    assert made.claim is not None
    claim = made.claim.model_copy(update={"benchmarks": (str(PROBLEMS), str(other)), "seeds": (0, 1)})
    loaded: list[str] = []

    def load(recipe: Recipe, part: Part, _: object) -> Any:
        loaded.append("+".join(map(storage.name_of, reproduce.model_folders(recipe, part).values())))
        return lambda _: Counting()

    monkeypatch.setattr(reproduce, "_load", load)
    reproduce.evaluate_parts(made.model_copy(update={"claim": claim}), answers_only=True)
    answered = sorted((tmp_path / "run" / "claim").rglob("completions.jsonl"))
    assert len(answered) == 2 * (1 + 2 + 2) + 2 * 3 * 2
    assert loaded == [
        "start", "xl", "xl-seed-1", "sketcher+generator", "sketcher-seed-1+generator-seed-1"
    ]  # fmt: skip


def test_what_was_evaluated_is_not_taken_for_models_that_came_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = _recipe(tmp_path)
    part = Part("base", 0, "greedy", str(PROBLEMS))
    (tmp_path / "start").mkdir()

    def evaluates(*_: Any, **__: Any) -> None:
        if not (weights := tmp_path / "start" / "model.safetensors").exists():
            weights.write_text("other ones")

    monkeypatch.setattr(reproduce, "run_evaluation", evaluates)
    monkeypatch.setattr(reproduce, "parts", lambda *_: [part])
    reproduce.evaluate_parts(recipe)
    assert not reproduce.is_finished(recipe, part)
    reproduce.evaluate_parts(recipe)  # and nothing comes
    assert reproduce.is_finished(recipe, part)


@pytest.mark.ray
@pytest.mark.usefixtures("contained", "ray_cluster")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_from_files_to_a_report_and_nothing_is_done_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_corpus(tmp_path / "corpus", files=24)
    save_model(tmp_path / "start", "llama", window=256)
    recipe = _recipe(tmp_path)
    trained = reproduce.train_models(recipe)
    assert {name: result.steps for name, result in trained.items()} == {"xl": 3, "sketcher": 3, "generator": 3}
    reproduce.evaluate_parts(recipe, ["base", "xl"])
    left = ["cert/seed-0/greedy/demo_problems", "cert/seed-0/sampled/demo_problems"]
    assert missing_parts(recipe) == left
    with monkeypatch.context() as without_sandbox:
        without_sandbox.setattr(reproduce, "run_evaluation", _never)
        reproduce.evaluate_parts(recipe, answers_only=True)
    assert missing_parts(recipe) == left
    elsewhere = _without_weights(recipe, tmp_path / "elsewhere")
    with monkeypatch.context() as without_models:
        without_models.setattr(reproduce, "_load", _never)
        reproduce.evaluate_parts(elsewhere)
    assert missing_parts(elsewhere) == []
    assert write_report(elsewhere)["scores"]
    reproduce.evaluate_parts(recipe)
    report = write_report(recipe)
    _check_report(report, Path(reproduce.claim_folder(recipe)))

    monkeypatch.setattr(reproduce, "_load", _never)
    assert all(result.reused for result in reproduce.train_models(recipe).values())
    reproduce.evaluate_parts(recipe)  # loads no model
    assert write_report(recipe) == report
    _write_other_weights(tmp_path / "run" / "models" / "xl")
    assert missing_parts(recipe) == [Part("xl", 0, mode, str(PROBLEMS)).name for mode in ("greedy", "sampled")]


def _without_weights(recipe: Recipe, run: Path) -> Recipe:
    """The run where only what running answers and the report need was copied to; with other limits of the sandbox."""
    source = Path(recipe.run)
    shutil.copytree(source / "claim", run / "claim")
    kinds = ("models/*", "tokens/*", "dataset")
    for manifest in (found for kind in kinds for found in source.glob(f"{kind}/manifest.json")):
        target = run / manifest.parent.relative_to(source)
        target.mkdir(parents=True)
        for file in manifest.parent.glob("*.json*"):
            shutil.copy(file, target)
    assert recipe.claim is not None
    claim = recipe.claim.model_copy(update={"execution": ExecutionConfig(workers=1)})
    return recipe.model_copy(update={"run": str(run), "claim": claim})


def _never(*arguments: Any) -> Any:
    raise AssertionError("this should not have been done")


def _check_report(report: dict[str, Any], folder: Path) -> None:
    scores = {(row["mode"], row["system"], row["benchmark"]): row for row in report["scores"]}
    assert len(scores) == len(report["scores"]) == 2 * 3 * 2
    for (mode, _, _), row in scores.items():
        assert (row["problems"], row["samples"]) == (2, 2 if mode == "greedy" else 4)
        assert row["low"] <= row["value"] <= row["high"]
    assert [row["pair"] for row in report["comparisons"][:2]] == [["base", "xl"], ["base", "xl"]]
    tokens = {row["tokens"] for row in report["models"]}
    assert max(tokens) <= 3 * 2 * 32
    assert list(map(len, report["machines"].values())) == [1, 1, 1]
    assert report["dataset"]["read"] == report["dataset"]["kept"] + sum(report["dataset"]["dropped"].values())
    text = (folder / "claim.md").read_text()
    assert "| greedy | pooled | CERT - XL |" in text
    assert text.count("| sampled | ") == 2 * (3 + 3)
    assert json.loads((folder / "claim.json").read_text()) == report
    assert "data:image/png;base64," in (folder / "claim.html").read_text()
    with Image.open(folder / "claim.png") as picture:
        assert picture.size[0] > 300


def _write_other_weights(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    for file in manifest["shards"][0]["files"]:
        if file["name"] == "model.safetensors":
            file["checksum"] = "0" * 32
    storage.write_text(str(folder / "manifest.json"), json.dumps(manifest))
