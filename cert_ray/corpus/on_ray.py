"""The documents stage on Ray: inputs become work units, each cleaned and parsed into one shard."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from cert_ray import manifests
from cert_ray.config import Config
from cert_ray.corpus.cleaning import CleaningConfig
from cert_ray.corpus.documents import documents_of_unit
from cert_ray.corpus.removals import Removal, blank, content_bytes
from cert_ray.corpus.sources import SourceConfig, plan_units
from cert_ray.manifests import Manifest, ShardReport
from cert_ray.shards.on_ray import run_units
from cert_ray.shards.units import WorkUnit, inputs_digest, write_table

logger = logging.getLogger(__name__)

STAGE = "documents"


@dataclass(frozen=True, slots=True)
class Plan:
    """All units, how many of them each generation has, and the digest of what they read."""

    units: list[WorkUnit]
    generations: tuple[int, ...]
    digest: str


class DocumentsConfig(Config):
    """What is read, and what is kept of it."""

    sources: SourceConfig
    appended: tuple[tuple[str, ...], ...] = ()  # the inputs of each later generation
    cleaning: CleaningConfig = CleaningConfig()

    def unit_options(self) -> str:
        """The digest of what decides a unit's outcome beside the unit: not which other inputs there are."""
        planned = {"inputs": (), "limit": None, "max_input_bytes": None}
        return self.model_copy(update={"sources": self.sources.model_copy(update=planned), "appended": ()}).digest()

    def plan(self) -> Plan:
        """The units of all generations."""
        units: list[WorkUnit] = []
        counts = []
        for inputs in (self.sources.inputs, *self.appended):
            planned = plan_units(self.sources.model_copy(update={"inputs": inputs}), len(units))
            units += planned
            counts.append(len(planned))
        return Plan(units, tuple(counts), inputs_digest(units))


def write_documents(
    unit: WorkUnit, config: DocumentsConfig, folder: str, removals: Sequence[Removal] = ()
) -> ShardReport:
    """Read, clean and parse one unit; writes `<shard>.parquet` and `drops/<shard>.parquet`."""
    documents, drops, rows_read = documents_of_unit(unit, config.sources, config.cleaning)
    documents = blank(documents, removals)
    name = f"{unit.name}.parquet"
    files = (write_table(folder, name, documents), write_table(folder, f"drops/{name}", drops))
    reasons = drops.column("reason").value_counts().to_pylist()
    return ShardReport(
        shard=unit.name,
        unit_digest="",
        files=files,
        rows_read=rows_read,
        rows_kept=len(documents),
        dropped={entry["values"]: entry["counts"] for entry in reasons},
        counts={"content_bytes": content_bytes(documents)},
    )


def clean(
    config: DocumentsConfig, folder: str, plan: Plan, workers: int | None = None, removals: Sequence[Removal] = ()
) -> Manifest:
    """Run the stage into `folder` on `config.plan()`; finished shards are reused.

    Args:
        removals: files whose text is left out of every shard made now. Shards made earlier are brought in line by
            `dataset.removal`, so a takedown makes no other shard again.
    """
    units, counts = plan.units, list(plan.generations)
    work = functools.partial(write_documents, config=config, folder=folder, removals=removals)
    reports = run_units(
        units, work, folder=folder, config_digest=config.unit_options(), stage=STAGE, verb="preprocess", workers=workers
    )
    notes = {"generations": counts}
    manifest = manifests.summarize(STAGE, config, plan.digest, reports, notes=notes)
    manifests.write_manifest(folder, manifest)
    logger.info("documents: read %d, kept %d, dropped %s", manifest.rows_read, manifest.rows_kept, manifest.dropped)
    return manifest
