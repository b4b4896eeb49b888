"""The stages of a recipe, one function each, called by both `cert-ray VERB` and `jobs/VERB.py`.

In: a `Recipe`. Out: the stage's manifest or result. Every stage reuses what is finished. Ray must be running.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from cert_ray import manifests, storage
from cert_ray.dataset.on_ray import preprocess
from cert_ray.errors import CertRayError, ConfigError, NotFinishedError, TokenizerMismatchError
from cert_ray.evaluation.on_ray import execute_on_ray
from cert_ray.evaluation.run import EvaluateConfig
from cert_ray.evaluation.runs import read_runs
from cert_ray.manifests import Manifest
from cert_ray.operations.evaluating import evaluate
from cert_ray.operations.model_cards import write_card
from cert_ray.operations.on_ray import run_on_worker, warn_of_unprotected_nodes
from cert_ray.operations.recipe import Recipe, RunFolders
from cert_ray.telemetry import logs
from cert_ray.tokens.encoding import PackConfig, View
from cert_ray.tokens.on_ray import pack_dataset
from cert_ray.tokens.vocabulary import adopt_tokenizer, load_tokenizer, tokenizer_digest, train_on_dataset
from cert_ray.training.model_card import Score
from cert_ray.training.on_ray import TrainResult, train

logger = logging.getLogger(__name__)


def run_preprocess(recipe: Recipe) -> Manifest:
    """Inputs to annotated dataset."""
    return preprocess(recipe.preprocess, recipe.run, recipe.workers, recipe.intermediates)


def run_tokenizer(recipe: Recipe) -> Manifest:
    """Annotated dataset to tokenizer; or the tokenizer of the outside base, if every model goes back to one.

    Raises:
        TokenizerMismatchError: when the models' outside bases have different tokenizers.
    """
    folders = RunFolders(recipe.run)
    if recipe.adopts_tokenizer:
        return _adopt(recipe.outside_bases, folders.tokenizer, recipe.context_tokens)
    config = recipe.tokenizer.model_copy(update={"context_tokens": recipe.context_tokens})
    return train_on_dataset(folders.dataset, folders.tokenizer, config, recipe.seed)


def run_pack(recipe: Recipe, view: View, limit: int | None = None) -> Manifest:
    """Annotated dataset and tokenizer to one packed view of the dataset's first `limit` documents."""
    folders = RunFolders(recipe.run)
    config = PackConfig(
        view=view,
        context_tokens=recipe.context_tokens,
        libraries=recipe.view_libraries(view),
        held_out_fraction=recipe.held_out_fraction,
        seed=recipe.seed,
        limit=limit or recipe.pack_documents,
        retrieve=recipe.view_retrieve(view),
    )
    return pack_dataset(folders.dataset, folders.tokenizer, folders.tokens(view), config, recipe.workers)


def run_train(recipe: Recipe, name: str) -> TrainResult:
    """Packed view and start to the exported model `name`, with its card."""
    with logs.scope(stage=f"models/{name}"):
        result = train(recipe.train_config(name))
    if not result.reused:
        write_card(recipe, name)
    return result


def run_evaluate(recipe: Recipe) -> dict[str, dict[str, float]]:
    """Trained models to pass@k, in RUN/evaluation. Sampling is one task; programs are tasks of their own.

    The scores also go into the models' cards, unless the recipe has a claim: then the claim's scores stand there.

    Raises:
        ConfigError: for a recipe without an evaluation.
        NotFinishedError: for a model that is not trained yet.
        CertRayError: as `evaluating.evaluate`.
    """
    wanted = recipe.evaluation
    if wanted is None:
        raise ConfigError("evaluation: this recipe has none; jobs/numpy.yaml shows one")
    folders = RunFolders(recipe.run)
    names = {"model": wanted.model} if wanted.model else {"sketcher": "sketcher", "generator": "generator"}
    source = {option: folders.model(name) for option, name in names.items()}
    for folder in source.values():
        if not storage.exists(storage.join(folder, "config.json")):
            raise NotFinishedError(folder, "train")
    # Recorded as given: when a job is submitted again, the same file lies in another folder.
    if (retrieve := recipe.view_retrieve(recipe.models[next(iter(names.values()))].view)) is not None:
        source["retrieve"] = retrieve.text
    config = EvaluateConfig.from_mapping(
        {
            "problems": wanted.problems[0],
            "output": folders.evaluation,
            "n": wanted.n,
            "temperature": wanted.temperatures[0],
            "max_tokens": wanted.max_tokens,
            "source": source,
            "seed": wanted.seed,
            "limit": wanted.limit,
            "requirements": wanted.requirements,
            "execution": wanted.execution.model_dump(),
        },
        "evaluation",
    )
    sampling = {"max_tokens": wanted.max_tokens, "seed": wanted.seed}
    warn_of_unprotected_nodes(wanted.execution.unsafe, wanted.execution.unfiltered)
    given = (config, wanted.problems, wanted.temperatures, sampling, execute_on_ray)
    found = run_on_worker(lambda: evaluate(*given, reuse=True), wanted.cpus, wanted.gpus)
    if recipe.claim is None:
        scores = _card_scores(folders.evaluation, "model" if wanted.model else "cascade")
        for name in names.values():
            try:
                write_card(recipe, name, scores)
            except CertRayError as error:  # part of the run that the card describes is gone; the scores are kept
                logger.warning("the scores could not be added to the model card of %s: %s", name, error)
    return found


def _card_scores(evaluation: str, system: str) -> list[Score]:
    """The scores of a finished evaluation; with several temperatures, those at each benchmark's best one."""
    scores = []
    for run in read_runs(evaluation):
        mode = "greedy" if run.temperature == 0 else f"sampled at temperature {run.temperature}"
        for k in run.ks:
            interval = run.interval(k)
            told = {"value": interval.value, "low": interval.low, "high": interval.high}
            problems = len(run.counts)
            scores.append(Score(benchmark=run.benchmark, system=system, mode=mode, k=k, problems=problems, **told))
    return scores


def _adopt(bases: list[str], output: str, context_tokens: int) -> Manifest:
    from cert_ray.training.models import local_folder

    found = {base: base if storage.is_folder(base) else str(local_folder(base, "start")) for base in bases}
    digests = {base: tokenizer_digest(load_tokenizer(folder)) for base, folder in found.items()}
    if len(set(digests.values())) > 1:
        raise TokenizerMismatchError(
            f"start: {', '.join(bases)} have different tokenizers, and a run has one. Use a recipe for each base."
        )
    return adopt_tokenizer(found[bases[0]], output, context_tokens)


def run_views(recipe: Recipe) -> dict[str, Manifest]:
    """Pack every view that a model of the recipe reads."""
    return {view.value: run_pack(recipe, view) for view in recipe.views}


def run_models(recipe: Recipe, names: Sequence[str] | None = None) -> dict[str, TrainResult]:
    """Train the models `names` of the recipe (None: all), in that order.

    Raises:
        ConfigError, NotFinishedError: before any is trained, when one starts from something that is not there, or its
            view is not packed.
    """
    names = list(recipe.models) if names is None else names
    _check_models(recipe, names)
    return {name: run_train(recipe, name) for name in names}


def _check_models(recipe: Recipe, names: Sequence[str]) -> None:
    from cert_ray.training.models import check_there  # which imports transformers

    folders = RunFolders(recipe.run)
    for name in names:
        if not manifests.is_finished(folders.model(name)):
            model = recipe.models[name]
            if model.start in recipe.outside_bases:
                check_there(model.start, "start")
            if not manifests.is_finished(tokens := folders.tokens(model.view)):
                raise NotFinishedError(tokens, "pack")
