"""`cert-ray status`: how far a run is, read only from its folder, and what to run next.

In: a `Recipe`. Out: one `StageStatus` per stage, in pipeline order. Works on any machine that can read the run's
storage, without Ray. Nothing is changed or verified (a rerun checks checksums). A stage is finished when its manifest
is there; before that, its unit reports and checkpoints tell how much of it need not be repeated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from cert_ray import manifests, storage
from cert_ray.errors import CertRayError
from cert_ray.operations.recipe import Recipe, RunFolders
from cert_ray.shards.units import REPORTS_FOLDER
from cert_ray.training import checkpoints


class State(StrEnum):
    """Where a stage stands."""

    FINISHED = "finished"
    STARTED = "started"
    WAITING = "waiting"  # nothing of it is there
    UNUSABLE = "unusable"  # what is there is from another version


@dataclass(frozen=True, slots=True)
class StageStatus:
    """One stage: how many `unit`s (shards, steps) of it are done, of how many if that is known, and by which verb."""

    stage: str
    verb: str
    state: State
    done: int
    total: int | None
    unit: str
    detail: str


def run_status(recipe: Recipe) -> list[StageStatus]:
    """Every stage of `recipe`, in pipeline order."""
    folders = RunFolders(recipe.run)
    found: list[StageStatus] = []
    shards: int | None = None
    for stage in ("documents", "dedup", "dataset"):
        found.append(_units(storage.join(folders.run, stage), stage, stage, "preprocess", shards))
        shards = found[0].done if found[0].state == State.FINISHED else None
    if recipe.models:
        found.append(_units(folders.tokenizer, "tokenizer", "tokenizer", "tokenizer", 1))
    shards = found[2].done if found[2].state == State.FINISHED else None
    found += [_units(folders.tokens(view), f"tokens/{view}", "tokens", "pack", shards) for view in recipe.views]
    found += [_model(recipe, name) for name in recipe.models]
    return found


def _units(folder: str, name: str, stage: str, verb: str, total: int | None) -> StageStatus:
    if manifests.is_finished(folder):
        try:
            manifest = manifests.read_manifest(folder, stage, verb)
        except CertRayError as error:
            return StageStatus(name, verb, State.UNUSABLE, 0, None, "shards", str(error))
        detail = f"{manifest.rows_kept:,} of {manifest.rows_read:,} rows kept"
        shards = len(manifest.shards)
        return StageStatus(name, verb, State.FINISHED, shards, shards, "shards", detail)
    reports = storage.join(folder, REPORTS_FOLDER)
    done = sum(entry.url.endswith(".json") for entry in storage.list_files(reports)) if storage.exists(reports) else 0
    return StageStatus(name, verb, State.STARTED if done else State.WAITING, done, total, "shards", "")


def _model(recipe: Recipe, name: str) -> StageStatus:
    config = recipe.train_config(name)
    if manifests.is_finished(config.output):
        try:
            notes = manifests.read_manifest(config.output, "model", "train").notes
        except CertRayError as error:
            return StageStatus(f"models/{name}", "train", State.UNUSABLE, 0, config.steps, "steps", str(error))
        losses = f"loss {notes['last_loss']:.4f}"
        if notes["held_out_loss"] is not None:
            losses += f", held out {notes['held_out_loss']:.4f} nats/token"
        return StageStatus(f"models/{name}", "train", State.FINISHED, config.steps, config.steps, "steps", losses)
    newest = checkpoints.newest(checkpoints.folder_of(config.output))
    if newest is None:
        state = State.STARTED if storage.exists(config.output) else State.WAITING
        return StageStatus(f"models/{name}", "train", state, 0, config.steps, "steps", "")
    detail = f"newest checkpoint {storage.name_of(newest[1])}"
    return StageStatus(f"models/{name}", "train", State.STARTED, newest[0], config.steps, "steps", detail)


def next_verb(stages: Sequence[StageStatus]) -> str | None:
    """The verb that continues the run; None when every stage is finished."""
    return next((stage.verb for stage in stages if stage.state != State.FINISHED), None)


def render_status(stages: Sequence[StageStatus], arguments: str, last_job: str | None = None) -> str:
    """A table for people; below it, what the last job did and the command that continues the run.

    Args:
        arguments: the arguments that name the run.
        last_job: the line from `story.last_job`.
    """
    return "\n".join(_lines(stages, arguments, last_job))


def _lines(stages: Sequence[StageStatus], arguments: str, last_job: str | None) -> Iterator[str]:
    width = max(len(stage.stage) for stage in stages)
    for stage in stages:
        total = "?" if stage.total is None else f"{stage.total:,}"
        amount = f"{stage.done:,} of {total} {stage.unit}"
        yield f"{stage.stage:{width}}  {stage.state.value:8}  {amount:24}  {stage.detail}".rstrip()
    for stage in stages:
        if stage.state == State.UNUSABLE:
            yield f"{stage.stage}: {stage.detail}"
    if last_job is not None:
        yield f"last job: {last_job}"
    verb = next_verb(stages)
    yield "everything is finished" if verb is None else f"next: cert-ray {verb} {arguments}"
