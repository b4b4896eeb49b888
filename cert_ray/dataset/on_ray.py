"""All of preprocessing on Ray: inputs -> documents -> clusters -> annotated dataset -> card.

    <output>/documents   cleaned and parsed files, one shard per work unit, with `drops/`
                         and, with `decontaminate`, `contamination/report.md`
    <output>/dedup       keys, signatures and clusters
    <output>/removals.jsonl   files that `cert-ray remove` removed; no later run brings them back
    <output>/dataset     the annotated dataset, `drops/`, `statistics/`, `manifest.json` and `card/`

The dataset's manifest counts from the raw files on: read = kept + dropped, by every reason of every stage.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections import Counter
from collections.abc import Mapping
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
import pydantic
import xxhash

from cert_ray import manifests, storage
from cert_ray.config import Config
from cert_ray.corpus.decontamination import ProblemIndex
from cert_ray.corpus.documents import DocumentsConfig, documents_of_unit
from cert_ray.corpus.on_ray import REDACTED, Plan, clean, plan_documents
from cert_ray.corpus.on_ray import STAGE as DOCUMENTS_STAGE
from cert_ray.corpus.removals import holds_blanked, read_removals
from cert_ray.dataset.annotate import annotate, row_counts
from cert_ray.dataset.card import write_card
from cert_ray.dataset.options import AnnotateConfig, PreprocessConfig
from cert_ray.dataset.removal import apply_removals
from cert_ray.dataset.statistics import largest_clusters, shard_statistics, write_statistics
from cert_ray.dedup.contents import Originals
from cert_ray.dedup.on_ray import deduplicate
from cert_ray.errors import InputError, ShardCorruptError
from cert_ray.manifests import Manifest, ShardReport
from cert_ray.shards.on_ray import run_units
from cert_ray.shards.units import (
    WorkUnit,
    attempt,
    check_source,
    damage_named,
    made_from,
    was_rewritten,
    weight_after_cleaning,
    write_table,
)

logger = logging.getLogger(__name__)

STAGE = "dataset"
# How many times faster annotating is: about 10 MB per second and core against 4.4, from a timeline of 969 MB on two
# cores (2026-11-26). That is 2.3; 3 is assumed, for fewer and larger tasks.
_FASTER_THAN_CLEANING = 3

Intermediates = Literal["keep", "remove"]


class AnnotateUnit(Config):
    """Payload of one unit: the counts of its shard so far, and the checksums of what it is made from."""

    documents_checksum: str
    clusters_checksum: str
    rows_read: int
    dropped: dict[str, int] = pydantic.Field(default_factory=dict)
    redacted: dict[str, int] = pydantic.Field(default_factory=dict)  # in all documents, duplicates included


def write_annotated(unit: WorkUnit, output: str, config: AnnotateConfig) -> ShardReport:
    """Annotate one shard; its counts start at the raw files."""
    payload = AnnotateUnit.from_mapping(unit.payload, unit.name)
    folder = storage.join(output, STAGE)
    name = f"{unit.name}.parquet"
    documents_folder = storage.join(output, DOCUMENTS_STAGE)
    with damage_named(documents_folder, unit.name, "preprocess"):
        documents = storage.read_parquet(storage.join(documents_folder, name))
    clusters = _read_clusters(storage.join(output, "dedup", "clusters", name), payload.clusters_checksum)
    check_source(documents_folder, unit.name, payload.documents_checksum)
    manifests.check_handover(f"{STAGE}/{unit.name}", len(documents), len(clusters))
    rows, drops = annotate(documents, clusters, config.weights, config.sketch_kind)
    manifests.check_handover(f"{STAGE}/{unit.name}", len(documents), len(rows) + len(drops))
    files = (
        write_table(folder, name, rows),
        write_table(folder, f"drops/{name}", drops),
        write_statistics(folder, unit.name, shard_statistics(rows, largest_clusters(documents, clusters))),
    )
    dropped = Counter(payload.dropped) + Counter(drops.column("reason").to_pylist())
    return ShardReport(
        shard=unit.name,
        unit_digest="",
        files=files,
        rows_read=payload.rows_read,
        rows_kept=len(rows),
        dropped=dict(sorted(dropped.items())),
        counts={**row_counts(rows), **payload.redacted},
    )


def _read_clusters(url: str, checksum: str) -> pa.Table:
    """The clusters file at `url`, checked against dedup's manifest, since dedup's reports list only keys."""
    try:
        payload = storage.read_bytes(url)
    except FileNotFoundError as error:
        raise ShardCorruptError(url, f"xxh3 {checksum}", "no file", "preprocess") from error
    if (found := str(xxhash.xxh3_128_hexdigest(payload))) != checksum:
        raise ShardCorruptError(url, f"xxh3 {checksum}", f"xxh3 {found}", "preprocess")
    return pq.read_table(pa.BufferReader(payload))


def preprocess(
    config: PreprocessConfig, output: str, workers: int | None = None, intermediates: Intermediates = "keep"
) -> Manifest:
    """Make the annotated dataset `output`/dataset; whatever is finished and intact is reused.

    Args:
        intermediates: "remove" deletes the cleaned documents, keys and signatures once the dataset is finished. A run
            with other options must then make them again.

    Raises:
        InputError: when no file survived, with counts of the reasons.
        StorageFullError: before the disk is full.
    """
    output = storage.absolute(output)
    documents_config = DocumentsConfig(**{name: getattr(config, name) for name in DocumentsConfig.model_fields})
    plan = plan_documents(documents_config)
    if not all(removal.finished for removal in read_removals(output)):
        apply_removals(output)
    inputs = plan.inputs_digest
    documents = storage.join(output, DOCUMENTS_STAGE)
    folder, manifest = storage.join(output, STAGE), None
    rewritten = any(was_rewritten(unit, documents) for unit in plan.units)
    if not rewritten:
        manifest = manifests.finished_manifest(folder, STAGE, "preprocess", config, inputs)
    if manifest is None:
        if manifests.is_finished(folder):
            _tell_of_replacing(folder, STAGE, config, plan, rewritten=rewritten)
        elif manifests.is_finished(documents):
            _tell_of_replacing(documents, DOCUMENTS_STAGE, documents_config, plan, rewritten=rewritten)
    if rewritten:
        # Now, not later: if this run died after making the documents anew, nothing would show that the dataset is old.
        storage.remove(storage.join(folder, manifests.MANIFEST_NAME))
    if manifest is not None:
        logger.info("dataset: finished before, kept %d of %d files", manifest.rows_kept, manifest.rows_read)
    else:
        manifest = _preprocess(config, documents_config, plan, inputs, output, workers)
    if intermediates == "remove":
        _remove_intermediates(output, manifest)
    return manifest


def _tell_of_replacing(
    folder: str, stage: str, config: DocumentsConfig | PreprocessConfig, plan: Plan, *, rewritten: bool
) -> None:
    """Warn if what `stage` finished in `folder` will be replaced; adding generations is not worth a warning."""
    before = manifests.read_manifest(folder, stage, "preprocess")
    differ = config.differing(before.config, but=("dedup_quality",))  # changes a note, but no row
    earlier = before.config.get("appended", [])
    if differ == ["appended"] and config.model_dump(mode="json")["appended"][: len(earlier)] == earlier:
        differ = []
    names = [f"preprocess.{name}" for name in differ]
    if not differ and (rewritten or before.inputs_digest != plan.digest_of(1 + len(earlier))):
        names = ["contents of the inputs or problem files"]
    manifests.tell_of_replacing(folder, stage, names)


def _remove_intermediates(output: str, manifest: Manifest) -> None:
    """Delete what is large and can be made again; drops, clusters and manifests stay."""
    storage.remove(storage.join(output, "dedup", "keys"))
    storage.remove(storage.join(output, "dedup", "signatures"))
    for shard in manifest.shards:
        storage.remove(storage.join(output, DOCUMENTS_STAGE, f"{shard.shard}.parquet"))


def _preprocess(
    config: PreprocessConfig,
    documents_config: DocumentsConfig,
    plan: Plan,
    inputs: str,
    output: str,
    workers: int | None,
) -> Manifest:
    documents = clean(documents_config, storage.join(output, DOCUMENTS_STAGE), plan, workers, read_removals(output))
    clusters = deduplicate(
        storage.join(output, DOCUMENTS_STAGE),
        documents,
        storage.join(output, "dedup"),
        config.minhash,
        workers,
        config.dedup_quality,
        _originals(documents_config, plan, documents, output),
    )
    options = AnnotateConfig(weights=config.weights, sketch_kind=config.sketch_kind)
    units = [
        WorkUnit(
            name=before.shard,
            payload=AnnotateUnit(
                documents_checksum=before.files[0].identity,
                clusters_checksum=after.files[0].checksum,
                rows_read=before.rows_read,
                dropped=before.dropped,
                redacted={name: count for name, count in before.counts.items() if name.startswith(REDACTED)},
            ).model_dump(mode="json"),
            weight=weight_after_cleaning(before, _FASTER_THAN_CLEANING),
        )
        for before, after in zip(documents.shards, clusters.shards, strict=True)
    ]
    folder = storage.join(output, STAGE)
    work = functools.partial(write_annotated, output=output, config=options)
    with attempt(folder, STAGE, "preprocess", options.digest()) as run:
        with (
            made_from(storage.join(output, DOCUMENTS_STAGE), documents, "preprocess"),
            made_from(storage.join(output, "dedup"), clusters, "preprocess"),
        ):
            reports = run_units(units, work, run, workers=workers)
            manifest = _summarize(config, inputs, documents, clusters, reports)
        _withdraw_other(folder, manifest)
        write_card(folder, manifest)
        manifests.write_manifest(folder, manifest)
    logger.info("dataset: read %d, kept %d, dropped %s", manifest.rows_read, manifest.rows_kept, manifest.dropped)
    return manifest


def _withdraw_other(folder: str, manifest: Manifest) -> None:
    """Remove the manifest of `folder` unless it equals `manifest`: a kill must not leave it beside another's card."""
    if manifests.is_finished(folder) and manifests.read_manifest(folder, STAGE, "preprocess") != manifest:
        storage.check_commit()
        storage.remove(storage.join(folder, manifests.MANIFEST_NAME))


def _originals(config: DocumentsConfig, plan: Plan, documents: Manifest, output: str) -> Originals | None:
    """What recreates the texts of files that were taken down, for dedup; None if none was.

    Earlier versions did not note in a shard's report that files had been taken down when it was made. So after a
    takedown the shards themselves are checked, too.
    """
    folder, asked = storage.join(output, DOCUMENTS_STAGE), bool(read_removals(output))
    units = {
        unit.name: unit
        for unit, shard in zip(plan.units, documents.shards, strict=True)
        if shard.files[0].stands_for or (asked and holds_blanked(storage.join(folder, shard.files[0].name)))
    }
    return functools.partial(_original, units=units, config=config, problems=plan.problems) if units else None


def _original(
    shard: str, units: Mapping[str, WorkUnit], config: DocumentsConfig, problems: ProblemIndex | None
) -> pa.Table | None:
    return documents_of_unit(units[shard], config, problems).documents if shard in units else None


def _summarize(
    config: PreprocessConfig, inputs: str, documents: Manifest, clusters: Manifest, reports: list[ShardReport]
) -> Manifest:
    """The dataset's manifest, after checking that its rows add up with those of the stages before.

    Raises:
        InputError: when no file survived, with counts of the reasons.
    """
    notes = {**documents.notes, **clusters.notes}
    manifest = manifests.summarize(STAGE, config, inputs, reports, notes=notes)
    manifests.check_handover(STAGE, documents.rows_read, manifest.rows_read)
    for reason, rows in (Counter(documents.dropped) + Counter(clusters.dropped)).items():
        manifests.check_handover(f"{STAGE}: {reason}", rows, manifest.dropped.get(reason, 0))
    if manifest.rows_kept == 0:
        reasons = ", ".join(f"{reason} {count}" for reason, count in manifest.dropped.items()) or "no file matched"
        raise InputError(
            ", ".join([*config.sources.inputs, *itertools.chain(*config.appended)]),
            f"none of {manifest.rows_read} files is left ({reasons})",
            "Give other inputs, or loosen `cleaning` in the recipe.",
        )
    return manifest
