"""The claim of CERT as options of a recipe: which models are compared, on what, and how often.

In: the section `claim` of a recipe. Out: a checked `ClaimConfig`; the recipe with a model for every seed; the parts of
an evaluation. Nothing is started in here. A comparison is fair by construction, or it is refused: XL, sketcher and
generator start from one base and learn from equally many rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self

import pydantic

from cert_ray import storage
from cert_ray.config import Config
from cert_ray.errors import ConfigError
from cert_ray.evaluation.execution import ExecutionConfig
from cert_ray.tokens.encoding import View

if TYPE_CHECKING:
    from cert_ray.operations.recipe import Recipe

Mode = Literal["greedy", "sampled"]
SYSTEMS = ("base", "xl", "cert")
_MODELS = {"xl": View.XL, "sketcher": View.SKETCHER, "generator": View.GENERATOR}


class ClaimConfig(Config):
    """What `cert-ray reproduce` evaluates. The models `xl`, `sketcher` and `generator` of the recipe are compared."""

    benchmarks: tuple[str, ...] = pydantic.Field(min_length=1)  # problem files; scored separately and pooled
    n: int | None = pydantic.Field(default=None, ge=1)  # sampled completions per problem and seed; None: only greedy
    temperature: float = pydantic.Field(default=0.2, gt=0, le=2)  # of the sampled ones; assumed
    top_p: float = pydantic.Field(default=0.9, gt=0, le=1)  # the paper's
    max_tokens: int = pydantic.Field(default=100, ge=1)  # the paper's
    seeds: tuple[int, ...] = pydantic.Field(default=(0,), min_length=1)  # of training and of sampling
    limit: int | None = pydantic.Field(default=None, ge=1)  # problems of each benchmark, for a trial
    prompts_together: int = pydantic.Field(default=16, ge=1)  # decoded side by side
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the weights while answering
    threads: int | None = pydantic.Field(default=None, ge=1)  # while answering; None leaves PyTorch's choice
    requirements: tuple[str, ...] | None = None  # of the sandbox; None: what each benchmark was written for
    execution: ExecutionConfig = ExecutionConfig()

    @pydantic.model_validator(mode="after")
    def _check(self) -> Self:
        names = [storage.name_of(url) for url in self.benchmarks]
        if len(set(names)) < len(names) or len(set(self.seeds)) < len(self.seeds):
            raise ValueError("benchmarks and seeds: each may appear only once")
        return self


@dataclass(frozen=True, slots=True)
class Part:
    """One evaluation: a system's answers to one benchmark, finished or not as a whole."""

    system: str
    seed: int
    mode: Mode
    benchmark: str

    @property
    def benchmark_name(self) -> str:
        """The problem file's name without its suffixes."""
        return storage.name_of(self.benchmark).split(".")[0]

    @property
    def name(self) -> str:
        """Where the part lies in the claim's folder."""
        return storage.join(self.system, f"seed-{self.seed}", self.mode, self.benchmark_name)


def check_claim(recipe: Recipe) -> ClaimConfig:
    """The recipe's claim, if its models can be compared.

    Raises:
        ConfigError: when there is no claim, or its models are missing, read other views than their names say, start
            from different bases, or learn from different amounts.
    """
    if recipe.claim is None:
        raise ConfigError("claim: this recipe has none; jobs/smollm2.yaml shows one")
    for name, view in _MODELS.items():
        if name not in recipe.models:
            raise ConfigError(f"models: the claim compares {', '.join(_MODELS)}, and {name} is missing")
        if recipe.models[name].view != view:
            raise ConfigError(f"models.{name}.view: {recipe.models[name].view}; the claim needs {view}")
    starts = {name: recipe.models[name].start for name in _MODELS}
    if len(set(starts.values())) > 1:
        raise ConfigError(f"models: {starts} start from different bases; the claim compares models of one base")
    trains = {name: recipe.train_config(name) for name in _MODELS}
    rows = {name: train.steps * train.rows_per_step for name, train in trains.items()}
    if len(set(rows.values())) > 1:
        raise ConfigError(
            f"models: trained on {rows} rows; give xl, sketcher and generator equal steps and rows per step"
        )
    return recipe.claim


def seeded(recipe: Recipe) -> Recipe:
    """`recipe` with a copy of the claim's models for every seed; see `model_name`."""
    claim = check_claim(recipe)
    models = dict(recipe.models)
    for name in _MODELS:
        for seed in claim.seeds:
            made = models[name].model_copy(update={"train": {**models[name].train, "seed": seed}})
            models.setdefault(model_name(recipe, name, seed), made)
    return recipe.model_copy(update={"models": models})


def model_name(recipe: Recipe, name: str, seed: int) -> str:
    """The name of model `name` trained with `seed`: its own name if that is the recipe's seed."""
    return name if recipe.train_config(name).seed == seed else f"{name}-seed-{seed}"


@dataclass(frozen=True, slots=True)
class Trained:
    """One of the compared models: its kind, and its name in the recipe of all seeds."""

    kind: str
    seed: int
    name: str


def trained_models(recipe: Recipe) -> list[Trained]:
    """The compared models, seed by seed."""
    seeds = check_claim(recipe).seeds
    return [Trained(kind, seed, model_name(recipe, kind, seed)) for seed in seeds for kind in _MODELS]


def models_to_train(recipe: Recipe) -> list[str]:
    """Every model that the claim needs, each after the one that it starts from."""
    compared = trained_models(recipe)
    start = recipe.models["xl"].start
    before: list[str] = []
    while start in recipe.models:
        before.insert(0, start)
        start = recipe.models[start].start
    return before + [trained.name for trained in compared]


def parts(claim: ClaimConfig, systems: tuple[str, ...] = SYSTEMS) -> Iterator[Part]:
    """Every part, greedy ones first. The base is not trained, so greedily it answers only once."""
    modes: tuple[Mode, ...] = ("greedy",) if claim.n is None else ("greedy", "sampled")
    for mode in modes:
        for system in systems:
            once = system == "base" and mode == "greedy"
            for seed in claim.seeds[:1] if once else claim.seeds:
                for benchmark in claim.benchmarks:
                    yield Part(system, seed, mode, benchmark)
