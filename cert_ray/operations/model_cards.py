"""The card of a recipe's model, gathered from what the stages wrote. In: a recipe, a model's name. Out: its README.md.

It is written after training, and again when there are scores. It is not in the model's manifest, so rewriting it leaves
the model as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cert_ray import manifests, storage
from cert_ray.operations.recipe import Recipe, RunFolders
from cert_ray.tokens.shards import STAGE as TOKENS
from cert_ray.training import records
from cert_ray.training.config import TrainConfig
from cert_ray.training.inputs import origin_of
from cert_ray.training.model_card import CARD_NAME, ModelFacts, Score, dataset_facts, losses_of, render_card, run_facts
from cert_ray.training.models import base_shape


def write_card(recipe: Recipe, name: str, scores: Sequence[Score] = ()) -> str:
    """Write the card of the trained model `name`; returns its URL."""
    folder = RunFolders(recipe.run).model(name)
    url = storage.join(folder, CARD_NAME)
    storage.write_text(url, render_card(gather(recipe, name, scores)))
    return url


def gather(recipe: Recipe, name: str, scores: Sequence[Score] = ()) -> ModelFacts:
    """What the stages know about the trained model `name`."""
    folders, model = RunFolders(recipe.run), recipe.models[name]
    folder = folders.model(name)
    manifest = manifests.read_manifest(folder, "model", "train")
    pack = manifests.read_manifest(folders.tokens(model.view), TOKENS, "pack")
    steps = records.from_json_lines(storage.read_text(storage.join(folder, "loss.jsonl")), folder)
    return run_facts(TrainConfig.model_validate(manifest.config), pack).model_copy(
        update={
            **origin_of(folder),  # the base may be gone by now
            **_dataset(folders),
            "architecture": base_shape(folder, 0, 0).architectures[0],
            "parameters": manifest.counts["parameters"],
            "steps": len(steps),
            "tokens": manifest.counts["tokens"],
            "losses": losses_of(steps),
            "scores": tuple(scores),
        }
    )


def _dataset(folders: RunFolders) -> dict[str, Any]:
    if not manifests.is_finished(folders.dataset):
        return {}
    return dataset_facts(manifests.files_counted(manifests.read_manifest(folders.dataset, "dataset", "preprocess")))
