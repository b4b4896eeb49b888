"""The documents stage on Ray: inputs become work units, each cleaned and parsed into one shard."""

from __future__ import annotations

import functools
import logging

import pyarrow.compute as pc

from cert_ray import manifests
from cert_ray.config import Config
from cert_ray.corpus.cleaning import CleaningConfig
from cert_ray.corpus.documents import documents_of_unit
from cert_ray.corpus.sources import SourceConfig, plan_units
from cert_ray.manifests import Manifest, ShardReport
from cert_ray.shards.on_ray import run_units
from cert_ray.shards.units import WorkUnit, inputs_digest, write_table

logger = logging.getLogger(__name__)

STAGE = "documents"


class DocumentsConfig(Config):
    """What is read, and what is kept of it."""

    sources: SourceConfig
    cleaning: CleaningConfig = CleaningConfig()


def write_documents(unit: WorkUnit, config: DocumentsConfig, folder: str) -> ShardReport:
    """Read, clean and parse one unit; writes `<shard>.parquet` and `drops/<shard>.parquet`."""
    documents, drops, rows_read = documents_of_unit(unit, config.sources, config.cleaning)
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
        counts={"content_bytes": pc.sum(documents.column("size_bytes"), min_count=0).as_py()},
    )


def clean(config: DocumentsConfig, folder: str, workers: int | None = None) -> Manifest:
    """Run the stage into `folder`; finished shards are reused."""
    units = plan_units(config.sources)
    work = functools.partial(write_documents, config=config, folder=folder)
    reports = run_units(
        units, work, folder=folder, config_digest=config.digest(), stage=STAGE, verb="preprocess", workers=workers
    )
    manifest = manifests.summarize(STAGE, config, inputs_digest(units), reports)
    manifests.write_manifest(folder, manifest)
    logger.info("documents: read %d, kept %d, dropped %s", manifest.rows_read, manifest.rows_kept, manifest.dropped)
    return manifest
