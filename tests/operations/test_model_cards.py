"""What cards and the claim's report say of a base, however many runs lie between it and the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cert_ray import manifests
from cert_ray.config import Config
from cert_ray.operations import claim_report
from cert_ray.operations.recipe import Recipe, RunFolders, recipe_from
from cert_ray.training.bases import Origin
from cert_ray.training.inputs import origin_of
from cert_ray.training.model_card import base_facts

ORIGIN = {"dequantised_from": "Q4_1", "licence": "apache-2.0"}


def write_model(folder: Path | str, notes: dict[str, Any], config: Config | None = None) -> str:
    Path(folder).mkdir(parents=True)
    manifests.write_manifest(str(folder), manifests.summarize("model", config or Config(), "inputs", [], notes))
    return str(folder)


@pytest.fixture
def fetched(tmp_path: Path) -> str:
    """A base as `cert-ray fetch-base` notes it."""
    origin = Origin(base="a-base", model="A", quantisation="Q4_1", licence="apache-2.0", file_sha256="")
    return write_model(tmp_path / "fetched", {"base": "a-base", "dequantised_from": "Q4_1"}, origin)


def recipe_of(folder: Path, start: str, base: str | None = None) -> Recipe:
    train = {"steps": 4, "warmup_steps": 1}
    starts = {} if base is None else {"base": base}
    starts |= dict.fromkeys(("xl", "sketcher", "generator"), start)
    return recipe_from(
        {
            "run": str(folder / "run"),
            "libraries": ["numpy"],
            "preprocess": {"sources": {"inputs": ["corpus"]}},
            "models": {name: {"start": start, "view": name, "train": train} for name, start in starts.items()},
            "claim": {"benchmarks": ["problems.jsonl"]},
        },
        "test",
    )


@pytest.mark.parametrize("noted", [True, False], ids=["noted", "of an earlier version"])
def test_what_is_known_of_a_base_survives_training_in_another_run(tmp_path: Path, fetched: str, noted: bool) -> None:
    notes = {"run_digest": "one", "base": fetched} | (ORIGIN if noted else {})
    first = write_model(tmp_path / "first", notes)
    recipe = recipe_of(tmp_path, first)
    card = base_facts(first)
    assert {name: card[name] for name in ORIGIN} == ORIGIN
    assert card["base"] == "first"  # no path
    assert claim_report._base(recipe)["dequantised_from"] == "Q4_1"


def test_what_is_known_of_a_base_survives_training_in_the_same_recipe(tmp_path: Path, fetched: str) -> None:
    recipe = recipe_of(tmp_path, "base", fetched)
    write_model(RunFolders(recipe.run).model("base"), {"run_digest": "one", "base": fetched})
    assert claim_report._base(recipe)["dequantised_from"] == "Q4_1"
    assert base_facts(RunFolders(recipe.run).model("base"))["licence"] == "apache-2.0"


def test_the_report_names_a_base_that_the_run_trains_as_cards_do(tmp_path: Path, fetched: str) -> None:
    recipe = recipe_of(tmp_path, "base", fetched)
    write_model(RunFolders(recipe.run).model("base"), {"run_digest": "one", "base": fetched} | ORIGIN)
    assert claim_report._base(recipe) == {"name": "base", "dequantised_from": "Q4_1"}


@pytest.mark.parametrize(
    ("base", "name", "is_hub_id"),
    [
        ("tiny", "tiny, from scratch", None),
        ("org/model", "org/model", True),
        ("/runs/of/another/machine/base", "base", False),
    ],
)
def test_a_base_is_named_without_a_path(base: str, name: str, is_hub_id: bool | None) -> None:
    told = base_facts(base)
    assert (told["base"], told.get("base_is_hub_id")) == (name, is_hub_id)


def test_models_trained_from_each_other_end(tmp_path: Path) -> None:
    write_model(tmp_path / "one", {"run_digest": "1", "base": str(tmp_path / "two")})
    write_model(tmp_path / "two", {"run_digest": "2", "base": str(tmp_path / "one")})
    assert origin_of(str(tmp_path / "one")) == {}
