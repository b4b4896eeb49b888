"""The documents stage on Ray: inputs become work units, each cleaned and parsed into one shard."""

from __future__ import annotations

import functools
import logging

from cert_ray import manifests, storage
from cert_ray.config import Config
from cert_ray.corpus.cleaning import CleaningConfig
from cert_ray.corpus.documents import documents_of_unit
from cert_ray.corpus.sources import SourceConfig, plan_units
from cert_ray.manifests import Manifest, ShardReport
from cert_ray.shards.on_ray import run_units
from cert_ray.shards.units import WorkUnit, inputs_digest, written_file

logger = logging.getLogger(__name__)

STAGE = "documents"


class DocumentsConfig(Config):
    """What is read, and what is kept of it."""

    sources: SourceConfig
    cleaning: CleaningConfig = CleaningConfig()


def write_documents(unit: WorkUnit, config: DocumentsConfig, folder: str) -> ShardReport:
    """Read, clean and parse one unit; writes `<shard>.parquet` and `drops/<shard>.parquet`."""
    documents, drops, rows_read = documents_of_unit(unit, config.sources, config.cleaning)
    files = []
    for name, table in ((f"{unit.name}.parquet", documents), (f"drops/{unit.name}.parquet", drops)):
        files.append(written_file(folder, name, len(table), storage.write_parquet(table, storage.join(folder, name))))
    reasons = drops.column("reason").value_counts().to_pylist()
    return ShardReport(
        shard=unit.name,
        unit_digest="",
        files=tuple(files),
        rows_read=rows_read,
        rows_kept=len(documents),
        dropped={entry["values"]: entry["counts"] for entry in reasons},
        counts={"content_bytes": sum(documents.column("size_bytes").to_pylist())},
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
