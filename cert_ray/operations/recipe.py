"""One YAML file describes a run: what to read, which library, which models to train from what, and where it all goes.

In: a YAML mapping. Out: a checked `Recipe`, and the folders of a run. Nothing is started in here.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

import pydantic
import yaml

from cert_ray import storage
from cert_ray.config import Config
from cert_ray.dataset.options import PreprocessConfig
from cert_ray.errors import ConfigError, InputError
from cert_ray.evaluation.execution import ExecutionConfig
from cert_ray.operations.claim import ClaimConfig
from cert_ray.retrieval.retriever import RetrieveConfig
from cert_ray.tokens.encoding import View
from cert_ray.tokens.vocabulary import TokenizerConfig
from cert_ray.training.config import LoggerName, TrainConfig

_STAGES = ("sketcher", "generator")  # the models that an evaluation scores if it names none
_MODEL_NAME = re.compile(r"\w[\w.-]*")
# Fields of TrainConfig that the recipe works out by itself.
_WORKED_OUT = ("base", "tokenizer", "tokens", "output")


class ModelRecipe(Config):
    """One model: what it starts from, which view of the dataset it reads, and how it is trained."""

    start: str  # a preset, the name of another model of this recipe, or the folder or hub id of a causal LM
    view: View
    train: dict[str, Any]  # options of TrainConfig; base, tokenizer, tokens and output are worked out


class EvaluationRecipe(Config):
    """What `jobs/evaluate.py` scores, after training."""

    problems: Annotated[tuple[str, ...], pydantic.Field(min_length=1)]  # files, or names that `cert-ray evaluate` knows
    model: str | None = None  # one model of this recipe; None: its sketcher and generator
    n: int = pydantic.Field(default=200, ge=1)  # the paper's samples a problem
    temperatures: Annotated[tuple[float, ...], pydantic.Field(min_length=1)] = (0.2,)  # several: also names the best
    max_tokens: int = pydantic.Field(default=100, ge=1)  # the paper's
    seed: int = pydantic.Field(default=0, ge=0)
    limit: int | None = pydantic.Field(default=None, ge=1)  # problems of each benchmark, for a trial
    requirements: tuple[str, ...] | None = None  # of the sandbox; None: what each benchmark was written for
    execution: ExecutionConfig = ExecutionConfig()
    cpus: float = pydantic.Field(default=1, ge=0)  # of the task that samples; programs take one CPU each
    gpus: float = pydantic.Field(default=0, ge=0)


class Recipe(Config):
    """A whole run. `run` is the folder or URL under which everything is written."""

    run: str = pydantic.Field(min_length=1)
    # The sketcher, the generator and XL read only files that import one of these.
    libraries: Annotated[tuple[str, ...], pydantic.Field(min_length=1)] | None  # None: every file (the paper's CERTg)
    preprocess: PreprocessConfig
    # Cleaned documents, keys and signatures, about as big as the dataset. Kept after preprocessing, they save a rerun.
    intermediates: Literal["keep", "remove"] = "keep"
    tokenizer: TokenizerConfig = TokenizerConfig()
    context_tokens: int = pydantic.Field(default=1024, ge=16)  # the paper's window
    pack_documents: int | None = pydantic.Field(default=None, ge=1)  # views read this many documents; None: all
    held_out_fraction: float = pydantic.Field(default=0.02, gt=0, lt=1)  # assumed
    # Library documentation, ahead of each file that the sketcher, the generator and XL read. Serve them with it too.
    retrieve: RetrieveConfig | None = None
    models: dict[str, ModelRecipe] = pydantic.Field(default_factory=dict)
    loggers: tuple[LoggerName, ...] = ()  # of every model that names none itself
    evaluation: EvaluationRecipe | None = None
    claim: ClaimConfig | None = None  # what `cert-ray reproduce` compares
    seed: int = pydantic.Field(default=0, ge=0)  # of the tokenizer's sample and of the held-out files
    workers: int | None = pydantic.Field(default=None, ge=1)  # preprocessing tasks at a time; None: all CPUs

    @pydantic.field_validator("libraries")
    @classmethod
    def _check_libraries(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for name in names or ():
            if not name.isidentifier() or keyword.iskeyword(name):
                raise ValueError(
                    f"no file can import {name!r}; give the name after `import`, of the top-level package only: "
                    "sklearn for scikit-learn, acme for acme.ledger"
                )
        return names

    @pydantic.field_validator("run")
    @classmethod
    def _check_run(cls, run: str) -> str:
        storage.check_shared(run)
        return run

    @pydantic.model_validator(mode="after")
    def _check_models(self) -> Self:
        for name, model in self.models.items():
            way = [name]
            while (start := self.models[way[-1]].start) in self.models:
                way.append(start)
                if start in way[:-1]:
                    raise ValueError(f"models.{name}.start: {', '.join(way)} form a circle; name a preset or a folder")
            if not _MODEL_NAME.fullmatch(name):
                raise ValueError(
                    f"models: {name!r} cannot be a folder's name; use letters, digits and `_`, "
                    "and after the first also `-` and `.`"
                )
            given = sorted(set(_WORKED_OUT) & set(model.train))
            if given:
                raise ValueError(
                    f"models.{name}.train: {', '.join(given)} cannot be set here; use `start` and `view` instead"
                )
            self.train_config(name)
        wanted = () if self.evaluation is None else [self.evaluation.model] if self.evaluation.model else _STAGES
        if missing := sorted(set(wanted) - set(self.models)):
            raise ValueError(f"evaluation: no model {', '.join(missing)} in this recipe; `model` can name another one")
        return self

    def train_config(self, name: str) -> TrainConfig:
        """The options of the training run that makes model `name`.

        Raises:
            ConfigError: when the recipe has no such model, or its options cannot be used.
        """
        if name not in self.models:
            raise ConfigError(f"models: no {name!r} in this recipe; it has {', '.join(self.models) or 'none'}")
        model = self.models[name]
        folders = RunFolders(self.run)
        from_recipe = model.start in self.models
        options = {
            "base": folders.model(model.start) if from_recipe else model.start,
            "tokenizer": folders.tokenizer,
            "tokens": folders.tokens(model.view),
            "output": folders.model(name),
            "loggers": self.loggers,
            **model.train,
        }
        return TrainConfig.from_mapping(options, f"models.{name}.train")

    @property
    def outside_bases(self) -> list[str]:
        """The folders and hub ids that models start from: neither presets nor models of this recipe."""
        from cert_ray.training.presets import PRESETS

        starts = dict.fromkeys(model.start for model in self.models.values())
        return [start for start in starts if start not in self.models and start not in PRESETS]

    @property
    def adopts_tokenizer(self) -> bool:
        """Whether the run's tokenizer is its outside base's own, extended, rather than one trained here.

        It is, unless a model starts from a preset: then outside bases must know the run's own tokenizer.
        """
        from cert_ray.training.presets import PRESETS

        return bool(self.outside_bases) and not any(model.start in PRESETS for model in self.models.values())

    @property
    def views(self) -> list[View]:
        """The views that models read, in the models' order."""
        return list(dict.fromkeys(model.view for model in self.models.values()))

    def view_libraries(self, view: View) -> tuple[str, ...] | None:
        """The libraries whose users `view` reads; None: every file, as in the base's view."""
        return None if view == View.BASE else self.libraries

    def view_retrieve(self, view: View) -> RetrieveConfig | None:
        """What models of `view` read ahead of a file, and of a prompt."""
        return None if view == View.BASE else self.retrieve


class RunFolders:
    """Where the parts of a run lie in its folder."""

    def __init__(self, run: str) -> None:
        self.run = storage.absolute(run)
        self.dataset = storage.join(self.run, "dataset")
        self.tokenizer = storage.join(self.run, "tokenizer")
        self.evaluation = storage.join(self.run, "evaluation")

    def tokens(self, view: View) -> str:
        """The packed tokens of `view`."""
        return storage.join(self.run, "tokens", view.value)

    def model(self, name: str) -> str:
        """The exported model `name`."""
        return storage.join(self.run, "models", name)


def load_recipe(url: str, assignments: Sequence[str] = (), replacements: Mapping[str, Any] | None = None) -> Recipe:
    """Read the recipe at `url`, replace values, and check it.

    Args:
        assignments: `KEY=VALUE` texts with dotted keys and YAML values, as people type them.
        replacements: values by dotted key, applied after the assignments.

    Raises:
        InputError: as `load_mapping`.
        ConfigError: naming every option that cannot be used.
    """
    options = load_mapping(url)
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"{text}: must be KEY=VALUE, e.g. workers=2")
        override(options, key, _yaml(value, text, "Quote it for the shell."))
    for key, value in (replacements or {}).items():
        override(options, key, value)
    return recipe_from(options, url)


def load_mapping(url: str) -> dict[str, Any]:
    """The YAML mapping at `url`, unchecked.

    Raises:
        InputError: when there is no such file, or it is not a YAML mapping, or has a key twice.
    """
    if not storage.exists(url) or storage.is_folder(url):
        raise InputError(url, "no such recipe", "Give the path of a YAML file; jobs/ has examples.")
    try:
        text = storage.read_text(url)
    except UnicodeDecodeError as error:
        raise InputError(url, f"not YAML: {error}", "Write it as UTF-8.") from error
    loaded = _yaml(text, url, "Correct that line.")
    if not isinstance(loaded, dict):
        raise InputError(
            url, "not a YAML mapping", "A recipe has the keys run, libraries, preprocess; jobs/ has examples."
        )
    return loaded


class _Loader(yaml.SafeLoader):
    """YAML of plain values. Refuses a mapping that has a key twice: the last one would count, and nobody would know."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        found: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in found.value:  # without what `<<` merges in: that may be replaced
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    raise yaml.MarkedYAMLError(problem=f"key {key.value} appears twice", problem_mark=key.start_mark)
                seen.add(key.value)
        return found


def _yaml(text: str, where: str, cure: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except RecursionError as error:
        raise InputError(where, "not YAML: nested too deeply", cure) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise InputError(where, f"not YAML: {place}{error.problem or error.context}", cure) from error
    except (yaml.YAMLError, ValueError) as error:  # the latter for a date that does not exist
        raise InputError(where, f"not YAML: {' '.join(str(error).split())}", cure) from error


def recipe_from(options: dict[str, Any], where: str) -> Recipe:
    """Check `options`, read from `where`.

    Raises:
        ConfigError: naming every option that cannot be used.
    """
    return Recipe.from_mapping(options, where)


def override(options: dict[str, Any], key: str, value: Any) -> None:
    """Set the value at the dotted `key`, making mappings on the way.

    Raises:
        ConfigError: when a part of the key names something that is not a mapping.
    """
    *parents, last = key.split(".")
    for part in parents:
        options = options.setdefault(part, {})
        if not isinstance(options, dict):
            raise ConfigError(f"{key}: {part} is a single value in this recipe, nothing can be set inside it")
    options[last] = value
