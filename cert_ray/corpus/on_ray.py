"""The documents stage on Ray: inputs become work units, each cleaned and parsed into one shard."""

from __future__ import annotations

import functools
import logging

import pyarrow as pa
import pyarrow.compute as pc

from cert_ray import manifests, storage
from cert_ray.corpus.decontamination import ProblemIndex
from cert_ray.corpus.decontamination_report import write_report
from cert_ray.corpus.documents import DocumentsConfig, documents_of_unit
from cert_ray.corpus.sources import plan_units
from cert_ray.manifests import Manifest, ShardReport
from cert_ray.shards.on_ray import run_units
from cert_ray.shards.units import WorkUnit, inputs_digest, write_table

logger = logging.getLogger(__name__)

STAGE = "documents"
REDACTED = "redacted_"  # counts: secrets in the documents, by kind


def write_documents(unit: WorkUnit, config: DocumentsConfig, problems: ProblemIndex | None, folder: str) -> ShardReport:
    """Read, clean and parse one unit; writes `<shard>.parquet`, its `drops/` and, if asked for, `contamination/`."""
    result = documents_of_unit(unit, config, problems)
    name = f"{unit.name}.parquet"
    files = [write_table(folder, name, result.documents), write_table(folder, f"drops/{name}", result.drops)]
    if problems:
        files.append(write_table(folder, f"contamination/{name}", result.contamination))
    reasons = result.drops.column("reason").value_counts().to_pylist()
    return ShardReport(
        shard=unit.name,
        unit_digest="",
        files=tuple(files),
        rows_read=result.rows_read,
        rows_kept=len(result.documents),
        dropped={entry["values"]: entry["counts"] for entry in reasons},
        counts={
            "content_bytes": pc.sum(result.documents.column("size_bytes"), min_count=0).as_py(),
            **{f"{REDACTED}{kind}": count for kind, count in sorted(result.redacted.items())},
        },
    )


def clean(config: DocumentsConfig, folder: str, workers: int | None = None) -> Manifest:
    """Run the stage into `folder`; finished shards are reused.

    Raises:
        InputError: for an input that cannot be read, or a problem file that cannot be used.
    """
    problems = ProblemIndex.read(config.decontaminate) if config.decontaminate.problems else None
    units = plan_units(config.sources)
    work = functools.partial(write_documents, config=config, problems=problems, folder=folder)
    digest = problems.digest(config) if problems else config.digest()
    reports = run_units(
        units, work, folder=folder, config_digest=digest, stage=STAGE, verb="preprocess", workers=workers
    )
    notes = {"problem_files": problems.checksums} if problems else None
    manifest = manifests.summarize(STAGE, config, inputs_digest(units), reports, notes)
    if problems:
        tables = [storage.read_parquet(storage.join(folder, "contamination", f"{r.shard}.parquet")) for r in reports]
        write_report(folder, pa.concat_tables(tables), problems)
    manifests.write_manifest(folder, manifest)
    logger.info("documents: read %d, kept %d, dropped %s", manifest.rows_read, manifest.rows_kept, manifest.dropped)
    return manifest
