"""The documents stage on Ray: inputs become work units, each cleaned and parsed into one shard."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import xxhash

from cert_ray import manifests, storage
from cert_ray.corpus.decontamination import ProblemIndex
from cert_ray.corpus.decontamination_report import write_report
from cert_ray.corpus.documents import DocumentsConfig, documents_of_unit
from cert_ray.corpus.removals import Removal, blank, content_bytes
from cert_ray.corpus.sources import plan_units
from cert_ray.manifests import Manifest, ShardReport
from cert_ray.shards.on_ray import run_units
from cert_ray.shards.units import WorkUnit, attempt, damage_named, inputs_digest, write_table

logger = logging.getLogger(__name__)

STAGE = "documents"
REDACTED = "redacted_"  # counts: secrets in the documents, by kind


@dataclass(frozen=True, slots=True)
class Plan:
    """All units, how many each generation has, the problems to search for, and digests of these."""

    units: list[WorkUnit]
    generations: tuple[int, ...]
    problems: ProblemIndex | None
    options_digest: str  # of all that decides a unit's outcome, except the unit itself

    @property
    def inputs_digest(self) -> str:
        """The digest of everything that is read."""
        return self.digest_of(len(self.generations))

    def digest_of(self, generations: int) -> str:
        """The digest of everything that the first `generations` read."""
        read = inputs_digest(self.units[: sum(self.generations[:generations])])
        return read if self.problems is None else f"{read}-{_checksums(self.problems)}"


def plan_documents(config: DocumentsConfig) -> Plan:
    """The units of all generations.

    Raises:
        InputError: for an input that cannot be read, or a problem file that cannot be used.
    """
    units: list[WorkUnit] = []
    counts = []
    for inputs in (config.sources.inputs, *config.appended):
        planned = plan_units(config.sources.model_copy(update={"inputs": inputs}), len(units))
        units += planned
        counts.append(len(planned))
    options = units_digest(config)
    problems = ProblemIndex.read(config.decontaminate) if config.decontaminate.problems else None
    return Plan(units, tuple(counts), problems, options if problems is None else f"{options}-{_checksums(problems)}")


def _checksums(problems: ProblemIndex) -> str:
    return "-".join(problems.checksums.values())


def units_digest(config: DocumentsConfig) -> str:
    """The digest of the options that decide a unit's outcome; which inputs there are does not."""
    elsewhere = {"inputs": (), "limit": None, "max_input_bytes": None}
    return config.model_copy(update={"sources": config.sources.model_copy(update=elsewhere), "appended": ()}).digest()


def write_documents(
    unit: WorkUnit,
    config: DocumentsConfig,
    problems: ProblemIndex | None,
    folder: str,
    removals: Sequence[Removal] = (),
) -> ShardReport:
    """Read, clean and parse one unit; write `<shard>.parquet`, its `drops/` and, given `problems`, `contamination/`."""
    result = documents_of_unit(unit, config, problems)
    documents = blank(result.documents, removals)
    name = f"{unit.name}.parquet"
    written = write_table(folder, name, documents)
    if documents is not result.documents:  # keys and clusters are always those of the whole texts
        whole = storage.parquet_bytes(result.documents)
        written = written.model_copy(update={"stands_for": str(xxhash.xxh3_128_hexdigest(whole))})
    files = [written, write_table(folder, f"drops/{name}", result.drops)]
    if problems:
        files.append(write_table(folder, f"contamination/{name}", result.contamination))
    reasons = result.drops.column("reason").value_counts().to_pylist()
    return ShardReport(
        shard=unit.name,
        unit_digest="",
        files=tuple(files),
        rows_read=result.rows_read,
        rows_kept=len(documents),
        dropped={entry["values"]: entry["counts"] for entry in reasons},
        counts={
            "content_bytes": content_bytes(documents),
            **{f"{REDACTED}{kind}": count for kind, count in sorted(result.redacted.items())},
        },
    )


def clean(
    config: DocumentsConfig, folder: str, plan: Plan, workers: int | None = None, removals: Sequence[Removal] = ()
) -> Manifest:
    """Run the stage into `folder` on the plan of `config`; finished shards are reused.

    Args:
        removals: files whose text is left out of the shards made now. `dataset.removal` updates the shards made
            earlier, so no other shard is made again because of a takedown.
    """
    problems = plan.problems
    work = functools.partial(write_documents, config=config, problems=problems, folder=folder, removals=removals)
    with attempt(folder, STAGE, "preprocess", plan.options_digest) as run:
        reports = run_units(plan.units, work, run, workers=workers)
        notes: dict[str, Any] = {"generations": list(plan.generations)}
        if problems:
            notes["problem_files"] = problems.checksums
        manifest = manifests.summarize(STAGE, config, plan.inputs_digest, reports, notes)
        if problems:
            parts = [_contamination(folder, report.shard) for report in reports]
            write_report(folder, pa.concat_tables(parts), problems)
        manifests.write_manifest(folder, manifest)
    logger.info("documents: read %d, kept %d, dropped %s", manifest.rows_read, manifest.rows_kept, manifest.dropped)
    return manifest


def _contamination(folder: str, shard: str) -> pa.Table:
    with damage_named(folder, shard, "preprocess"):
        return storage.read_parquet(storage.join(folder, "contamination", f"{shard}.parquet"))
