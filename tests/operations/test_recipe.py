"""Recipes: what they work out, and what they refuse by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from cert_ray.corpus.inputs import SourceConfig
from cert_ray.errors import ConfigError, InputError
from cert_ray.evaluation.execution import ExecutionConfig
from cert_ray.operations import pipeline
from cert_ray.operations.recipe import (
    ModelRecipe,
    Recipe,
    RunFolders,
    load_mapping,
    load_recipe,
    override,
    recipe_from,
)
from cert_ray.tokens.encoding import PackConfig, View


def options(**more: Any) -> dict[str, Any]:
    return {
        "run": "/runs/x",
        "libraries": ["polars"],
        "preprocess": {"sources": {"inputs": ["/data"]}},
        "models": {
            "base": {"start": "tiny", "view": "base", "train": {"steps": 10, "warmup_steps": 1}},
            "sketcher": {"start": "base", "view": "sketcher", "train": {"steps": 10, "warmup_steps": 1}},
            "other": {"start": "/models/codegen", "view": "xl", "train": {"steps": 10, "warmup_steps": 1}},
        },
        **more,
    }


def recipe(**more: Any) -> Recipe:
    return recipe_from(options(**more), "test.yaml")


def test_training_options_are_worked_out_from_start_and_view() -> None:
    made = recipe()
    base, sketcher, other = (made.train_config(name) for name in ("base", "sketcher", "other"))
    folders = RunFolders("/runs/x")
    assert (base.base, base.tokens, base.output) == ("tiny", folders.tokens(View.BASE), folders.model("base"))
    assert (sketcher.base, sketcher.tokens) == (folders.model("base"), folders.tokens(View.SKETCHER))
    assert {base.tokenizer, sketcher.tokenizer, other.tokenizer} == {folders.tokenizer}  # a run has one
    assert other.base == "/models/codegen"
    assert made.view_libraries(View.BASE) is None
    assert made.view_libraries(View.GENERATOR) == ("polars",)


def test_a_base_from_outside_brings_the_tokenizer_unless_a_preset_needs_one_of_its_own() -> None:
    assert recipe().outside_bases == ["/models/codegen"]
    assert not recipe().adopts_tokenizer  # `tiny` starts without one
    models = {
        "sketcher": {"start": "/models/codegen", "view": "sketcher", "train": {"steps": 10, "warmup_steps": 1}},
        "further": {"start": "sketcher", "view": "sketcher", "train": {"steps": 10, "warmup_steps": 1}},
    }
    continued = recipe(models=models)
    assert continued.outside_bases == ["/models/codegen"]
    assert continued.adopts_tokenizer
    assert not recipe(models={}).adopts_tokenizer


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"run": None}, "run: .*got None"),
        ({"librarys": ["x"]}, "librarys: unknown option; perhaps libraries is meant; known are .*seed"),
        ({"libraries": []}, "libraries"),
        ({"preprocess": {"sources": {"inputs": []}}}, r"inputs: should hold at least 1 \(got \[\]\)"),
        ({"preprocess": {"sources": {}}}, r"preprocess.sources.inputs: required"),
        ({"preprocess": {"sources": {"inputs": ["/d"]}, "sketch_kind": "nouns"}}, "sketch_kind.*constants.*'nouns'"),
        ({"models": {"base": {"start": "tiny", "view": "base", "train": {"step": 1}}}}, "step: unknown option"),
        ({"models": {"b": {"start": "tiny", "view": "base", "train": {"output": "x"}}}}, "output cannot be set here"),
        ({"run": ""}, "run: "),
        ({"libraries": "polars"}, r"libraries: should be a list, as \[a, b\] \(got 'polars'\)"),
        ({"libraries": ["scikit-learn"]}, "no file can import 'scikit-learn'; .* sklearn for scikit-learn"),
        ({"libraries": ["acme.ledger"]}, "no file can import 'acme.ledger'; .* top-level package"),
        ({"libraries": ["polars", ""]}, "no file can import ''"),
        ({"libraries": ["import"]}, "no file can import 'import'"),
        ({"libraries": ["None"]}, "no file can import 'None'"),
        (
            {"models": {"../up": {"start": "tiny", "view": "base", "train": {}}}},
            "models: '../up' cannot be a folder's name",
        ),
    ],
)
def test_bad_options_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe(**change)


@pytest.mark.parametrize("starts", ["axx", "bax", "bcb", "bca"])
def test_models_that_start_from_each_other_are_refused(starts: str) -> None:
    train = {"steps": 10, "warmup_steps": 1}
    models = {name: {"start": start, "view": "base", "train": train} for name, start in zip("abc", starts, strict=True)}
    with pytest.raises(ConfigError, match=r"models\.[ab]\.start: .* form a circle; name a preset or a folder"):
        recipe(models=models)


def test_an_unknown_option_is_shown_those_of_its_own_place() -> None:
    changes: list[dict[str, Any]] = [
        {"preprocess": {"sources": {"input": ["/d"], "inputs": ["/d"]}}},
        {"models": {"base": {"begin": "tiny", "start": "tiny", "view": "base", "train": {"steps": 2_000}}}},
        {"models": {"train": {"begin": "tiny", "start": "tiny", "view": "base", "train": {"steps": 2_000}}}},
        {"evaluation": {"problems": ["human-eval"], "model": "base", "execution": {"timeout": 3}}},
    ]
    for change, known in zip(changes, (SourceConfig, ModelRecipe, ModelRecipe, ExecutionConfig), strict=True):
        with pytest.raises(ConfigError) as refused:
            recipe(**change)
        assert "unknown option; " in str(refused.value)
        assert str(refused.value).endswith(f" known are {', '.join(sorted(known.model_fields))}")


def test_one_wrong_value_does_not_print_the_whole_recipe() -> None:
    models = {"base": {"start": "tiny", "view": "base", "train": {"steps": 2}}}
    with pytest.raises(ConfigError) as refused:
        recipe(models=models, preprocess={"sources": {"inputs": ["/d"] * 10_000}})
    told = "models.base.train: warmup_steps 1000 leaves none of the 2 steps; lower it or raise steps"
    assert str(refused.value) == f"test.yaml: {told}"
    with pytest.raises(ConfigError) as refused:
        recipe(run=["/d"] * 10_000)
    assert len(str(refused.value)) < 200


def test_a_key_that_stands_twice_is_refused_and_what_an_anchor_brings_may_be_replaced(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("run: a\nlibraries: [x]\nrun: b\n")
    with pytest.raises(InputError, match=r"line 3, column 1: key run appears twice"):
        load_mapping(str(path))
    # `top` is read before the `more` inside of `deep`, whose merged keys by then hold `steps` twice.
    path.write_text("deep: {deeper: {b: &more {<<: &one {steps: 1, x: 2}, steps: 3}}}\ntop: {<<: *more, x: 4}\n")
    assert load_mapping(str(path))["top"] == {"steps": 3, "x": 4}


def test_a_value_that_is_no_yaml_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(options()))
    with pytest.raises(InputError, match=r"run=\[a: not YAML: line 1, column 3: "):
        load_recipe(str(tmp_path / "r.yaml"), ["run=[a"])


def test_files_that_are_no_recipe_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such recipe"):
        load_recipe(str(tmp_path / "none.yaml"))
    for text, message in (
        ("a: [", "not YAML"),
        ("a: 2026-02-30", "not YAML: day is out of range"),
        ("[" * 20_000, "nested too deeply"),
        ("- a\n- b\n", "not a YAML mapping"),
    ):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(InputError, match=message):
            load_recipe(str(tmp_path / "bad.yaml"))


def test_override_reaches_into_mappings_and_refuses_values() -> None:
    target = options()
    override(target, "preprocess.sources.limit", 5)
    override(target, "tokenizer.vocab_size", 500)
    made = recipe_from(target, "test")
    assert made.preprocess.sources.limit == 5
    assert made.tokenizer.vocab_size == 500
    with pytest.raises(ConfigError, match="run is a single value"):
        override(target, "run.x", 1)


def test_documentation_stands_in_every_view_that_has_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    packed: dict[View, PackConfig] = {}

    def pack(dataset: str, tokenizer: str, output: str, config: PackConfig, workers: int | None) -> None:
        packed[config.view] = config

    monkeypatch.setattr(pipeline, "pack_dataset", pack)
    given = recipe(retrieve={"docs": "docs.jsonl", "top": 3})
    for view in View:
        pipeline.run_pack(given, view)
    assert [view for view, config in packed.items() if config.retrieve == given.retrieve] == [
        View.XL,
        View.SKETCHER,
        View.GENERATOR,
        View.CONTEXT_FIRST,
    ]
    assert packed[View.BASE].retrieve is None


def test_a_run_in_the_memory_of_one_process_is_refused() -> None:
    with pytest.raises(ConfigError, match="own memory, which the other processes of a run do not see"):
        recipe_from(
            {"run": "memory://run", "libraries": ["numpy"], "preprocess": {"sources": {"inputs": ["c"]}}}, "test"
        )
