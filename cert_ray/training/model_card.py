"""README.md of an exported model, as the Hugging Face hub reads it: YAML about the model, then a page for people.

In: `ModelFacts`, gathered by whoever exports; `run_facts` are those that a run knows before its first step. Out: text.
What is not known is left out. Equal facts give equal text, so it holds no time, host or path. The metadata follows the
hub's model card specification (`base_model`, `model-index`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jinja2
import pydantic
import yaml

from cert_ray import manifests, storage
from cert_ray.config import Config
from cert_ray.manifests import Manifest
from cert_ray.training.config import TrainConfig
from cert_ray.training.inputs import STAGE, VERB, origin_of
from cert_ray.training.presets import PRESETS
from cert_ray.training.records import StepRecord

CARD_NAME = "README.md"
# Where things are, and how a run is operated: the weights do not depend on these.
_LEFT_OUT = {"base", "tokenizer", "tokens", "output", "loggers", "log_every_steps", "max_failures", "keep_checkpoints"}
_WAYS = {
    "base": "trained on whole files",
    "xl": "continually pre-trained on files that use the libraries, without sketches: the control",
    "sketcher": "continually pre-trained on sketches of files that use the libraries: stage one of CERT",
    "generator": "continually pre-trained on pairs of sketch and code: stage two of CERT",
    "context_first": "continually pre-trained on code, the sketch of what follows it, and what follows it: both stages "
    "of CERT in one model",
}


class Score(Config):
    """An evaluation's result, for the model or the cascade that it is part of. Values are shares, from 0 to 1."""

    benchmark: str
    system: str  # "model", or "cascade"
    mode: str
    k: int
    value: float
    low: float | None = None  # ends of the 95% interval
    high: float | None = None
    problems: int


class ModelFacts(Config, allow_inf_nan=True):  # measured
    """What a card says."""

    name: str
    base: str | None = None  # a preset, a hub id, or the name of a base or model
    base_is_hub_id: bool = False
    dequantised_from: str | None = None  # of the base
    licence: str | None = None  # of the base, an SPDX id
    architecture: str | None = None
    parameters: int | None = None
    context_tokens: int | None = None
    vocab_size: int | None = None
    view: str | None = None
    libraries: tuple[str, ...] = ()
    dataset: dict[str, int] | None = None  # files read and kept
    dropped: dict[str, int] = pydantic.Field(default_factory=dict)  # files by reason
    documents: int | None = None  # of the view
    view_tokens: int | None = None
    recipe: dict[str, Any] = pydantic.Field(default_factory=dict)  # the training options that decide the result
    steps: int | None = None
    tokens: int | None = None  # trained on, including repeats
    losses: tuple[tuple[int, float, float | None], ...] = ()  # (tokens, training, held out) of some steps
    unigram_nats: float | None = None
    scores: tuple[Score, ...] = ()


def run_facts(config: TrainConfig, pack: Manifest) -> ModelFacts:
    """What is known of a run before its first step. Its paths are absolute, as `inputs.check` makes them."""
    return ModelFacts(
        name=storage.name_of(config.output),
        **base_facts(config.base),
        context_tokens=pack.config["context_tokens"],
        vocab_size=pack.notes["vocab_size"],
        view=pack.config.get("view"),
        libraries=pack.config.get("libraries") or (),
        **dataset_facts(pack.notes.get("dataset")),  # packs of earlier versions lack this
        documents=pack.counts.get("documents"),
        view_tokens=pack.counts.get("tokens"),
        recipe=config.model_dump(mode="json", exclude=_LEFT_OUT),
        unigram_nats=pack.notes.get("held_out_unigram_entropy_nats"),
    )


def dataset_facts(files: Mapping[str, Any] | None) -> dict[str, Any]:
    """What `manifests.files_counted` says about a dataset, as values of `ModelFacts`."""
    return (
        {}
        if files is None
        else {"dataset": {"read": files["read"], "kept": files["kept"]}, "dropped": files["dropped"]}
    )


def base_facts(base: str) -> dict[str, Any]:
    """The name of a run's `base`, and what is known about it, as values of `ModelFacts`; never a path."""
    if base in PRESETS:
        return {"base": f"{base}, from scratch"}
    if not storage.is_folder(base):
        is_hub_id = "://" not in base and not base.startswith("/")  # otherwise a folder that no longer exists
        return {"base": base if is_hub_id else storage.name_of(base), "base_is_hub_id": is_hub_id}
    name = storage.name_of(base)
    if manifests.is_finished(base):
        notes = manifests.read_manifest(base, STAGE, VERB).notes
        if "run_digest" not in notes:  # fetched, not trained: it has a name
            name = notes.get("base") or name
    return {"base": name, **origin_of(base)}


def losses_of(records: list[StepRecord]) -> tuple[tuple[int, float, float | None], ...]:
    """The losses of the first and last step, and of those that were evaluated."""
    last = len(records) - 1
    kept = [one for place, one in enumerate(records) if place in (0, last) or one.held_out_loss is not None]
    return tuple((one.tokens, round(one.loss, 4), _rounded(one.held_out_loss)) for one in kept)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def render_card(facts: ModelFacts) -> str:
    """The card as Markdown with its YAML header."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("cert_ray.training", ""),
        autoescape=False,  # Markdown
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    header = yaml.safe_dump(metadata(facts), sort_keys=False, allow_unicode=True)
    recipe = yaml.safe_dump(facts.recipe, sort_keys=True) if facts.recipe else ""
    template = environment.get_template("model_card.md.j2")
    return template.render(header=header, facts=facts, recipe=recipe, way=_WAYS.get(facts.view or ""))


def metadata(facts: ModelFacts) -> dict[str, Any]:
    """The hub's metadata: only known keys, in a fixed order."""
    found: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["code", "python", "cert-ray", *([facts.view] if facts.view else []), *facts.libraries],
    }
    if facts.licence:
        found["license"] = facts.licence
    if facts.base and facts.base_is_hub_id:
        found["base_model"] = facts.base
    results = [_result(score) for score in facts.scores if score.system == "model"]
    if results:
        found["model-index"] = [{"name": facts.name, "results": results}]
    return found


def _result(score: Score) -> Mapping[str, Any]:
    return {
        "task": {"type": "text-generation"},
        "dataset": {"type": score.benchmark, "name": score.benchmark},
        "metrics": [
            {"type": f"pass@{score.k}", "name": f"pass@{score.k}, {score.mode}", "value": round(score.value, 5)}
        ],
    }
