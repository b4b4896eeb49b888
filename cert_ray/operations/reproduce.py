"""`cert-ray reproduce`: the claim of CERT, measured. In: a recipe with a `claim`. Out, in RUN/claim: evaluations,
`claim.json`, `claim.md`, `claim.html` and `claim.png`.

The stages are the recipe's own (`pipeline`) and reuse what is finished. So does every evaluation as a whole and, within
one, every batch of prompts that was answered. A digest records what a part was made from, so one model's answers never
score another. A second one covers only what answers depend on, since the sandbox that runs them has no influence on
them. Training needs Ray; evaluating does not. Models are loaded once, and only if one of their answers is missing: a
machine with a sandbox can run what a machine with a GPU answered, and needs only the models' manifests.
"""

from __future__ import annotations

import functools
import json
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import xxhash

from cert_ray import storage
from cert_ray.evaluation.run import Complete, EvaluateConfig, draw_samples, run_evaluation
from cert_ray.operations import pipeline
from cert_ray.operations.claim import (
    SYSTEMS,
    ClaimConfig,
    Part,
    check_claim,
    model_name,
    models_to_train,
    parts,
    seeded,
)
from cert_ray.operations.evaluating import describe_model
from cert_ray.operations.recipe import Recipe, RunFolders
from cert_ray.telemetry.machine import machine
from cert_ray.training.on_ray import TrainResult

_log = logging.getLogger(__name__)

# Makes a `complete` with given sampling options.
_Maker = Callable[[dict[str, Any]], Complete]

PART_FILE = "part.json"
_COMPLETIONS = "completions.jsonl"


def claim_folder(recipe: Recipe) -> str:
    """Where the evaluations and the report lie."""
    return storage.join(RunFolders(recipe.run).run, "claim")


def train_models(recipe: Recipe) -> dict[str, TrainResult]:
    """Preprocess, pack and train everything that the claim compares. Ray must be running.

    Raises:
        ConfigError: at once, when the claim cannot be compared, or its base is a folder that is not there.
        CertRayError: as the stages.
    """
    from cert_ray.training.models import check_there

    check_claim(recipe)
    wanted = seeded(recipe)
    names = models_to_train(wanted)
    used = wanted.model_copy(update={"models": {name: wanted.models[name] for name in names}})
    for start in used.outside_bases:
        check_there(start, "start")  # before hours of preprocessing, which need no base
    pipeline.run_preprocess(wanted)
    # All models decide whether the run has its own tokenizer; if not, it has that of the bases of those trained here.
    pipeline.run_tokenizer(used if wanted.adopts_tokenizer else wanted)
    pipeline.run_views(used)
    return {name: pipeline.run_train(wanted, name) for name in names}


def evaluate_parts(recipe: Recipe, systems: Sequence[str] = SYSTEMS, *, answers_only: bool = False) -> None:
    """Evaluate `systems`, grouped by models. What is finished and made from the same ones is left as it is.

    `answers_only`: let the models answer and keep the answers. Nothing is run, so no sandbox is needed.

    Raises:
        ConfigError, InputError, SandboxError: as `run_evaluation`, or when a model cannot be loaded.
    """
    claim = check_claim(recipe)
    for asked in _by_models(recipe, parts(claim, tuple(systems))):
        load = functools.cache(functools.partial(_load, recipe, asked[0], claim))
        for part in asked:
            if is_finished(recipe, part):
                _log.info("%s is finished", part.name)
                continue
            _evaluate(recipe, claim, part, load, answers_only)


def _by_models(recipe: Recipe, asked: Iterable[Part]) -> list[list[Part]]:
    """Group the parts that the same models answer: these are loaded once, and no others beside them."""
    found: dict[tuple[str, ...], list[Part]] = {}
    for part in asked:
        found.setdefault(tuple(model_folders(recipe, part).values()), []).append(part)
    return list(found.values())


def is_finished(recipe: Recipe, part: Part) -> bool:
    """Whether `part` was evaluated with the current models and options."""
    url = storage.join(claim_folder(recipe), part.name, PART_FILE)
    return storage.exists(url) and json.loads(storage.read_text(url))["digest"] == part_digest(recipe, part)


def part_digest(recipe: Recipe, part: Part) -> str:
    """A digest of everything that a part's outcome depends on: models, problems, sampling, sandbox."""
    claim = check_claim(recipe)
    wanted = _evaluate_config(recipe, claim, part).model_dump(mode="json", exclude={"output", "problems"})
    return _digest(recipe, part, {"evaluate": wanted})


def answers_digest(recipe: Recipe, part: Part) -> str:
    """A digest of what a part's answers depend on: models, problems, sampling."""
    config = _evaluate_config(recipe, check_claim(recipe), part)
    return _digest(recipe, part, {"drawn": [config.n, config.temperature, config.seed, config.limit]})


def _digest(recipe: Recipe, part: Part, options: dict[str, Any]) -> str:
    claim = check_claim(recipe)
    described = {
        "models": {option: describe_model(folder) for option, folder in model_folders(recipe, part).items()},
        "problems": storage.checksum(part.benchmark).checksum,
        **options,
        "sampling": [claim.max_tokens, claim.top_p, claim.dtype, claim.prompts_together],
    }
    if recipe.retrieve is not None:
        described["retrieve"] = recipe.retrieve.pinned().model_dump(mode="json", exclude={"docs"})
    return str(xxhash.xxh3_128_hexdigest(json.dumps(described, sort_keys=True).encode()))


def model_folders(recipe: Recipe, part: Part) -> dict[str, str]:
    """The folders of a part's models, by the option that takes them."""
    folders = RunFolders(recipe.run)
    if part.system == "base":
        start = recipe.models["xl"].start
        return {"model": folders.model(start) if start in recipe.models else start}
    if part.system == "xl":
        return {"model": folders.model(model_name(recipe, "xl", part.seed))}
    return {name: folders.model(model_name(recipe, name, part.seed)) for name in ("sketcher", "generator")}


def _load(recipe: Recipe, part: Part, claim: ClaimConfig) -> _Maker:
    """A maker over models that are loaded once."""
    from cert_ray.serving.answering import Answerer, ModelConfig
    from cert_ray.serving.completers import CompleterConfig, LocalCompleter
    from cert_ray.training.models import local_folder

    found = {option: str(local_folder(folder, option)) for option, folder in model_folders(recipe, part).items()}
    engine = {"dtype": claim.dtype, "threads": claim.threads}
    options = {**found, "engine": engine, "answer_cache": 0, "prompts_at_once": claim.prompts_together}
    options["retrieve"] = recipe.retrieve  # for every system, even the base: all read the same
    answerer = Answerer.load(ModelConfig.from_mapping(options, "claim"))
    return lambda sampling: LocalCompleter(answerer, CompleterConfig.from_mapping(sampling, "claim"))


def _evaluate(recipe: Recipe, claim: ClaimConfig, part: Part, load: Callable[[], _Maker], answers_only: bool) -> None:
    config = _evaluate_config(recipe, claim, part)
    sampling = {"max_tokens": claim.max_tokens, "top_p": claim.top_p, "seed": part.seed}
    sampling["temperature"] = config.temperature or 0.0
    url = storage.join(config.output, _COMPLETIONS)
    remembered = Remembered(lambda: load()(sampling), url, answers_digest(recipe, part))
    if answers_only:
        _log.info("answering %s", part.name)
        draw_samples(config, remembered)
        return
    _log.info("evaluating %s", part.name)
    digest = part_digest(recipe, part)  # now, since other models may be put there meanwhile
    began = time.perf_counter()
    run_evaluation(config, remembered, keep_parts=False)
    figures = {
        "digest": digest,
        "answering_s": round(remembered.seconds, 1),
        "total_s": round(time.perf_counter() - began - remembered.loading_s + remembered.earlier_s, 1),
        "answered_on": sorted(remembered.machines),
        "ran_on": machine(),
    }
    storage.write_text(storage.join(config.output, PART_FILE), json.dumps(figures) + "\n")


def _evaluate_config(recipe: Recipe, claim: ClaimConfig, part: Part) -> EvaluateConfig:
    sampled = part.mode == "sampled"
    assert not sampled or claim.n is not None
    return EvaluateConfig(
        problems=part.benchmark,
        output=storage.join(claim_folder(recipe), part.name),
        n=claim.n if sampled and claim.n is not None else 1,
        temperature=claim.temperature if sampled else 0.0,
        seed=part.seed,
        limit=claim.limit,
        prompts_per_call=claim.prompts_together,
        requirements=claim.requirements,
        execution=claim.execution,
    )


class Remembered:
    """A `Complete` that writes down each batch of answers, and asks again only for missing batches.

    One JSON object a line: what was asked (`key`), the answers, and the seconds they took. A batch whose line a kill
    cut short is asked for again.
    """

    def __init__(self, load: Callable[[], Complete], url: str, digest: str) -> None:
        """`load` makes the `Complete` that answers, if an answer is missing.

        `digest` stands for what the answers depend on besides the prompts; answers under another digest do not count.
        """
        self._load, self._url, self._digest = load, url, digest
        self._lines = storage.read_text(url).splitlines() if storage.exists(url) else []
        self._known = {entry["key"]: entry for entry in map(_parsed, self._lines) if entry is not None}
        self.loading_s = 0.0  # in none of the other sums
        self.seconds = 0.0  # of answering, including earlier runs
        self.earlier_s = 0.0  # the part of it spent by earlier runs
        self.machines: set[str] = set()  # that answered

    def __call__(self, prompts: list[str], n: int) -> list[list[str]]:
        """`n` completions for each prompt."""
        key = xxhash.xxh3_128_hexdigest(json.dumps([self._digest, prompts, n]).encode())
        entry = self._known.get(key)
        if entry is not None:
            self.earlier_s += entry["seconds"]
        else:
            asked = time.perf_counter()
            complete = self._load()
            began = time.perf_counter()
            self.loading_s += began - asked
            answers = complete(prompts, n)
            entry = {"key": key, "seconds": time.perf_counter() - began, "machine": machine(), "answers": answers}
            self._lines.append(json.dumps(entry))
            storage.write_text(self._url, "".join(line + "\n" for line in self._lines))
        self.seconds += entry["seconds"]
        self.machines.add(entry["machine"])
        found: list[list[str]] = entry["answers"]
        return found


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        entry: dict[str, Any] = json.loads(line)
    except ValueError:
        return None
    return entry
