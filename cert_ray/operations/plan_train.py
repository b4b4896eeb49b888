"""`cert-ray plan train`: from a recipe's models to their memory and time. In: a `Recipe`. Out: text.

A model's start is followed through the recipe to a preset, a folder or a hub id, of which only the config is read.
"""

from __future__ import annotations

from collections.abc import Sequence

from cert_ray.errors import ConfigError
from cert_ray.operations.recipe import Recipe
from cert_ray.training import memory
from cert_ray.training.models import base_shape


def render_training(recipe: Recipe, names: Sequence[str], gpu: str, mfu: float | None = None) -> str:
    """The plan for the models `names` on one `gpu` per worker; `mfu` as in `memory.render`.

    Raises:
        ConfigError: for a model or a GPU that is unknown, or a start whose config cannot be read.
    """
    memory.gpu_named(gpu)
    if not names:
        raise ConfigError("models: this recipe has none to plan")
    plans = []
    for name in names:
        config = recipe.train_config(name)
        start = _first_start(recipe, name)
        shape = base_shape(start, recipe.tokenizer.vocab_size, recipe.context_tokens)
        size = memory.measure(shape, config.precision, recipe.context_tokens)
        config = config.model_copy(update={"base": recipe.models[name].start})
        plans.append(memory.render(name, size, config, gpu, mfu))
    return "\n\n".join(plans)


def _first_start(recipe: Recipe, name: str) -> str:
    start = recipe.models[name].start
    return _first_start(recipe, start) if start in recipe.models else start
