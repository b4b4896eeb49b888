"""The claim's options: a comparison that would not be fair is refused by name; parts and models follow from seeds."""

from __future__ import annotations

from typing import Any

import pytest

from cert_ray.errors import ConfigError
from cert_ray.operations.claim import check_claim, model_name, models_to_train, parts, seeded
from cert_ray.operations.recipe import Recipe, recipe_from

TRAIN = {"steps": 10, "warmup_steps": 1, "micro_batch": 2}


def recipe(models: dict[str, Any] | None = None, **claim: Any) -> Recipe:
    options: dict[str, Any] = {name: {"start": "base", "view": name, "train": TRAIN} for name in ("xl", "sketcher")}
    options |= {"generator": {"start": "base", "view": "generator", "train": TRAIN}}
    options |= {"base": {"start": "tiny", "view": "base", "train": TRAIN}}
    return recipe_from(
        {
            "run": "/runs/x",
            "libraries": ["polars"],
            "preprocess": {"sources": {"inputs": ["/data"]}},
            "models": options | (models or {}),
            "claim": {"benchmarks": ["/b/First.jsonl.gz", "/b/Second.jsonl"], **claim},
        },
        "test",
    )


def test_every_seed_has_its_own_models_and_the_base_is_trained_once() -> None:
    made = seeded(recipe(seeds=[0, 7]))
    assert models_to_train(made) == [
        "base", "xl", "sketcher", "generator", "xl-seed-7", "sketcher-seed-7", "generator-seed-7",
    ]  # fmt: skip
    assert made.train_config("xl-seed-7").seed == 7
    assert made.train_config("xl-seed-7").base.endswith("/models/base")
    assert model_name(made, "xl", 0) == "xl"


def test_the_base_answers_greedily_once_whatever_the_seeds() -> None:
    claim = check_claim(recipe(seeds=[0, 1, 2], n=5))
    listed = list(parts(claim))
    greedy = [part for part in listed if part.mode == "greedy"]
    assert [part.seed for part in greedy if part.system == "base"] == [0, 0]
    assert len(greedy) == 2 + 2 * 3 * 2
    assert len(listed) - len(greedy) == 3 * 3 * 2
    assert listed[0].name == "base/seed-0/greedy/First"
    assert len({part.name for part in listed}) == len(listed)


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ({"xl": {"start": "base", "view": "base", "train": TRAIN}}, r"models\.xl\.view: base; the claim needs xl"),
        ({"xl": {"start": "tiny", "view": "xl", "train": TRAIN}}, "start from different bases"),
        (
            {"xl": {"start": "base", "view": "xl", "train": {**TRAIN, "steps": 20}}},
            "trained on .* rows; give xl",
        ),
    ],
)
def test_an_unfair_comparison_is_refused(models: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_claim(recipe(models))


def test_the_same_rows_by_another_batch_are_fair() -> None:
    halved = {"start": "base", "view": "xl", "train": {**TRAIN, "micro_batch": 1, "gradient_accumulation": 8}}
    check_claim(recipe({"xl": halved}))


def test_recipes_without_a_claim_or_with_a_model_missing_are_refused() -> None:
    with pytest.raises(ConfigError, match="this recipe has none"):
        check_claim(recipe().model_copy(update={"claim": None}))
    made = recipe()
    models = {name: model for name, model in made.models.items() if name != "sketcher"}
    with pytest.raises(ConfigError, match="sketcher is missing"):
        check_claim(made.model_copy(update={"models": models}))
    with pytest.raises(ConfigError, match="each may appear only once"):
        recipe(seeds=[1, 1])
