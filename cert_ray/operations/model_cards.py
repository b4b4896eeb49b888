"""The card of a recipe's model, gathered from what the stages wrote. In: a recipe, a model's name. Out: its README.md.

Written after training, and again when scores are there; it is no part of the model's manifest, so writing it anew
leaves the model what it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cert_ray import manifests, storage
from cert_ray.manifests import Manifest
from cert_ray.operations.recipe import Recipe, RunFolders
from cert_ray.tokens.shards import STAGE as TOKENS
from cert_ray.training import records
from cert_ray.training.config import TrainConfig
from cert_ray.training.inputs import origin_of
from cert_ray.training.model_card import CARD_NAME, ModelFacts, Score, losses_of, render_card
from cert_ray.training.models import base_shape
from cert_ray.training.presets import PRESETS

# Where things lie, and how a run is operated: no part of what the weights depend on.
_LEFT_OUT = {"base", "tokenizer", "tokens", "output", "loggers", "log_every_steps", "max_failures", "keep_checkpoints"}


def write_card(recipe: Recipe, name: str, scores: Sequence[Score] = ()) -> str:
    """Write the card of the trained model `name`; returns its URL."""
    folder = RunFolders(recipe.run).model(name)
    url = storage.join(folder, CARD_NAME)
    storage.write_text(url, render_card(gather(recipe, name, scores)))
    return url


def gather(recipe: Recipe, name: str, scores: Sequence[Score] = ()) -> ModelFacts:
    """What the stages know of model `name`, which is trained."""
    folders, model = RunFolders(recipe.run), recipe.models[name]
    folder = folders.model(name)
    manifest = manifests.read_manifest(folder, "model", "train")
    pack = manifests.read_manifest(folders.tokens(model.view), TOKENS, "pack")
    steps = records.from_json_lines(storage.read_text(storage.join(folder, "loss.jsonl")), folder)
    config = TrainConfig.model_validate(manifest.config)
    return ModelFacts(
        name=name,
        **_base(recipe, name),
        **_dataset(folders),
        architecture=base_shape(folder, 0, 0).architectures[0],
        parameters=manifest.counts["parameters"],
        context_tokens=recipe.context_tokens,
        vocab_size=pack.notes["vocab_size"],
        view=model.view.value,
        libraries=recipe.view_libraries(model.view) or (),
        documents=pack.counts["documents"],
        view_tokens=pack.counts["tokens"],
        recipe=config.model_dump(mode="json", exclude=_LEFT_OUT),
        steps=len(steps),
        tokens=manifest.counts["tokens"],
        losses=losses_of(steps),
        unigram_nats=pack.notes.get("held_out_unigram_entropy_nats"),
        scores=tuple(scores),
    )


def _base(recipe: Recipe, name: str) -> dict[str, Any]:
    """What the model started from, and what is known of the first base of all."""
    start = recipe.models[name].start
    first = start
    while first in recipe.models:
        first = recipe.models[first].start
    if first in PRESETS:
        return {"base": start if start in recipe.models else f"{first}, from scratch"}
    known = _manifest_of(first)
    told = origin_of(RunFolders(recipe.run).model(name)) or origin_of(first)  # the first may be gone by now
    is_hub_id = not storage.is_folder(first)
    shown = start if start in recipe.models or is_hub_id else storage.name_of(first)
    if known and start == first and "run_digest" not in known.notes:  # fetched, not trained: it has a name
        shown = known.notes.get("base") or shown
    return {"base": shown, "base_is_hub_id": is_hub_id and start == first, **told}


def _manifest_of(folder: str) -> Manifest | None:
    if not storage.is_folder(folder) or not manifests.is_finished(folder):
        return None
    return manifests.read_manifest(folder, "model", "train")


def _dataset(folders: RunFolders) -> dict[str, Any]:
    if not manifests.is_finished(folders.dataset):
        return {}
    manifest = manifests.read_manifest(folders.dataset, "dataset", "preprocess")
    return {"dataset": {"read": manifest.rows_read, "kept": manifest.rows_kept}, "dropped": manifest.dropped}
