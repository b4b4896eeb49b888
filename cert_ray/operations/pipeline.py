"""The stages of a recipe, one function each: what `cert-ray VERB` and `jobs/VERB.py` both call.

In: a `Recipe`. Out: the stage's manifest or result. Every stage reuses what is finished. Ray must be running.
"""

from __future__ import annotations

import logging

from cert_ray.dataset.on_ray import preprocess
from cert_ray.errors import ConfigError
from cert_ray.manifests import Manifest
from cert_ray.operations.recipe import Recipe, RunFolders
from cert_ray.tokens.encoding import PackConfig, View
from cert_ray.tokens.on_ray import pack_dataset
from cert_ray.tokens.vocabulary import train_on_dataset
from cert_ray.training.on_ray import TrainResult, train

logger = logging.getLogger(__name__)


def run_preprocess(recipe: Recipe) -> Manifest:
    """Inputs to annotated dataset."""
    return preprocess(recipe.preprocess, recipe.run, recipe.workers, recipe.intermediates)


def run_tokenizer(recipe: Recipe) -> Manifest:
    """Annotated dataset to tokenizer."""
    folders = RunFolders(recipe.run)
    config = recipe.tokenizer.model_copy(update={"context_tokens": recipe.context_tokens})
    return train_on_dataset(folders.dataset, folders.tokenizer, config, recipe.seed)


def run_pack(recipe: Recipe, view: View, limit: int | None = None) -> Manifest:
    """Annotated dataset and tokenizer to one packed view, of the dataset's first `limit` documents.

    Raises:
        ConfigError: when the models that read the view start from bases with different tokenizers.
    """
    folders = RunFolders(recipe.run)
    config = PackConfig(
        view=view,
        context_tokens=recipe.context_tokens,
        libraries=recipe.view_libraries(view),
        held_out_fraction=recipe.held_out_fraction,
        seed=recipe.seed,
        limit=limit,
    )
    return pack_dataset(folders.dataset, _tokenizer_of(recipe, view), folders.tokens(view), config, recipe.workers)


def run_train(recipe: Recipe, name: str) -> TrainResult:
    """Packed view and start to the exported model `name`."""
    return train(recipe.train_config(name))


def _tokenizer_of(recipe: Recipe, view: View) -> str:
    wanted = set()
    for name, model in recipe.models.items():
        if model.view == view:
            wanted.add(_external_start(recipe, name) if recipe.base_brings_tokenizer(name) else None)
    if len(wanted) > 1:
        raise ConfigError(
            f"view {view}: its models start from bases with different tokenizers; use one run for each base"
        )
    outside = wanted.pop() if wanted else None
    return outside or RunFolders(recipe.run).tokenizer


def _external_start(recipe: Recipe, name: str) -> str:
    start = recipe.models[name].start
    return _external_start(recipe, start) if start in recipe.models else start


def run_views(recipe: Recipe) -> dict[str, Manifest]:
    """Pack every view that a model of the recipe reads."""
    return {view.value: run_pack(recipe, view) for view in recipe.views}


def run_models(recipe: Recipe) -> dict[str, TrainResult]:
    """Train every model of the recipe, in its order."""
    return {name: run_train(recipe, name) for name in recipe.models}
