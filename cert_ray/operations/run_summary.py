"""`cert-ray summary`: one page about a run, RUN/summary.html. How far, rows in and out, who did what when, links.

In: a `Recipe`. Out: HTML that needs no network. Its links are relative, so they still work in a copy of the run's
folder. Everything is read from the run's folder, as in `status`.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import dataclass

import jinja2
import yaml

from cert_ray import manifests, storage
from cert_ray.errors import CertRayError
from cert_ray.evaluation.report import template_engine
from cert_ray.operations.recipe import Recipe, RunFolders
from cert_ray.operations.status import StageStatus, next_verb, run_status
from cert_ray.operations.story import attempts, read_story, render_line
from cert_ray.training.records import PICTURE_NAME

PAGE_NAME = "summary.html"
_LINES = 2_000  # the newest of the story; assumed: what a browser shows at once
_MODEL = "model"  # what its manifest calls the stage of models/NAME
_PAGES = (
    ("dataset card", "dataset/card/card.html"),
    ("evaluation", "evaluation/report.html"),
    ("evaluations, swept", "evaluation/sweep.html"),
    ("claim", "claim/claim.html"),
)


@dataclass(frozen=True, slots=True)
class Made:
    """What a finished stage's manifest says: which Python made it, and how many rows, bytes and files."""

    stage: str
    python: str
    rows_read: int
    rows_kept: int
    dropped: dict[str, int]
    files: int
    size_bytes: int
    inputs_digest: str


def write_summary(recipe: Recipe) -> str:
    """Write the page below the run, and return its URL."""
    url = storage.join(RunFolders(recipe.run).run, PAGE_NAME)
    storage.write_text(url, render_summary(recipe))
    return url


def render_summary(recipe: Recipe) -> str:
    """The page."""
    folders = RunFolders(recipe.run)
    stages = run_status(recipe)
    lines = read_story(folders.run)
    engine = template_engine(jinja2.PackageLoader("cert_ray.operations", ""), html=True)
    return engine.get_template("run_summary.html.j2").render(
        run=folders.run,
        stages=stages,
        next_verb=next_verb(stages),
        made=list(_made(folders.run, stages)),
        attempts=attempts(lines),
        lines=[render_line(line) for line in lines if not line.shard][-_LINES:],
        shard_lines=sum(bool(line.shard) for line in lines),
        pages=[(name, path) for name, path in _PAGES if storage.exists(storage.join(folders.run, path))],
        pictures=list(_pictures(recipe, folders)),
        recipe=yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False),
    )


def _pictures(recipe: Recipe, folders: RunFolders) -> Iterator[tuple[str, str, str]]:
    """Each trained model's name, its folder in the run, and its loss curves in base64."""
    for name in recipe.models:
        url = storage.join(folders.model(name), PICTURE_NAME)
        if storage.exists(url):
            yield name, f"models/{name}", base64.b64encode(storage.read_bytes(url)).decode()


def _made(run: str, stages: list[StageStatus]) -> Iterator[Made]:
    for stage in stages:
        folder = storage.join(run, stage.stage)
        if not manifests.is_finished(folder):
            continue
        kind = _MODEL if stage.verb == "train" else stage.stage.partition("/")[0]
        try:
            manifest = manifests.read_manifest(folder, kind, stage.verb)
        except CertRayError:
            continue  # the table of stages says why
        yield Made(
            stage=stage.stage,
            python=manifest.python_version,
            rows_read=manifest.rows_read,
            rows_kept=manifest.rows_kept,
            dropped=dict(sorted(manifest.dropped.items(), key=lambda item: -item[1])),
            files=len(manifest.files),
            size_bytes=sum(file.size_bytes for file in manifest.files),
            inputs_digest=manifest.inputs_digest,
        )
