"""Dedup on Ray: key shards as work units, edges of some bands as tasks, decisions on the driver.

Only edges and one rank (4 bytes) per document move between processes; keys and signatures stay in storage.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import ray

from cert_ray import manifests, storage
from cert_ray.config import Config
from cert_ray.dedup import survivors
from cert_ray.dedup.contents import VERB, Originals
from cert_ray.dedup.decisions import Clusters, Ranking, rank_documents
from cert_ray.dedup.minhash import U64, MinHashConfig
from cert_ray.dedup.quality import QualityConfig, measure_quality
from cert_ray.manifests import Manifest, ShardReport
from cert_ray.on_ray import own_errors
from cert_ray.shards.on_ray import run_units
from cert_ray.shards.units import Attempt, WorkUnit, attempt, check_source, made_from, weight_after_cleaning

logger = logging.getLogger(__name__)

STAGE = "dedup"
# How many times faster keys and signatures are: 70 MB per second and core against 4.4, from a timeline of 969 MB on two
# cores (2026-11-26).
_FASTER_THAN_CLEANING = 16
_QUALITY_NOTE = "near_dedup_quality"


class DedupConfig(Config):
    """How duplicates are found, and how well that is measured."""

    minhash: MinHashConfig
    quality: QualityConfig | None


def deduplicate(
    documents: str,
    manifest: Manifest,
    folder: str,
    config: MinHashConfig,
    workers: int | None = None,
    quality: QualityConfig | None = None,
    originals: Originals | None = None,
) -> Manifest:
    """Find exact and near duplicates of the documents that `manifest` lists; write `folder`, see `dedup.survivors`.

    A finished and intact `folder` that was made from the same documents with the same options is reused. If only
    `quality` differs, its clusters are kept and measured again. The note "generations" of `manifest` says how many
    shards each generation has; a later generation does not change what an earlier one decided.

    Args:
        quality: how near-dedup is measured against brute force, for the manifest's notes; None: it is not measured.
        originals: where the texts that a takedown removed come from; picklable. None if it removed none.

    Raises:
        ConservationError: when a shard has keys of more or fewer documents than `manifest` says.
        InputError: when a text that was taken down is needed, but the input no longer gives it.
        ShardCorruptError: when a shard of documents, keys or signatures is damaged after it was found to be intact.
        SupersededError: when another run has begun in `folder`, or made other documents.
    """
    options = DedupConfig(minhash=config, quality=quality)
    inputs = "-".join([manifest.files_digest(), config.digest(), *map(str, manifest.notes["generations"])])
    finished = manifests.finished_manifest(folder, STAGE, VERB, options, inputs, but=["quality"])
    if finished is not None and options.decides_as(finished.config):
        logger.info("dedup: reused, %d documents, %d kept", finished.rows_read, finished.rows_kept)
        return finished
    with attempt(folder, STAGE, VERB, config.digest()) as run:
        with made_from(documents, manifest, VERB):
            if finished is not None:
                result = _measured_anew(documents, folder, finished, options, originals)
            else:
                result = _deduplicate(documents, manifest, run, options, inputs, workers, originals)
        manifests.write_manifest(folder, result)
    logger.info("dedup: %d documents, %d kept, dropped %s", result.rows_read, result.rows_kept, result.dropped)
    return result


def _deduplicate(
    documents: str,
    manifest: Manifest,
    run: Attempt,
    options: DedupConfig,
    inputs: str,
    workers: int | None,
    originals: Originals | None,
) -> Manifest:
    folder, config = run.folder, options.minhash
    units = [
        WorkUnit(
            name=shard.shard,
            payload={"documents": shard.files[0].identity},
            weight=weight_after_cleaning(shard, _FASTER_THAN_CLEANING),
        )
        for shard in manifest.shards
    ]
    work = functools.partial(_write_keys, documents=documents, folder=folder, config=config, originals=originals)
    keys = run_units(units, work, run, workers=workers)
    for before, after in zip(manifest.shards, keys, strict=True):
        manifests.check_handover(f"{STAGE}/{after.shard}", before.rows_kept, after.rows_read)
    shards, rows = [report.shard for report in keys], [report.rows_kept for report in keys]
    ends = _documents_after(manifest.notes["generations"], rows)
    columns = survivors.read_documents(folder, shards, rows, ends)
    first_D = survivors.exact_firsts(columns)
    ranking = rank_documents(columns, first_D)
    del columns
    edges = _Fetched(list(_near_edges(run, shards, rows, ranking, config, workers)))
    clusters, differences = survivors.cluster_documents(folder, shards, rows, ranking, edges, ends)
    reports = survivors.write_clusters(folder, shards, rows, clusters, first_D, inputs)
    del edges, ranking, first_D  # frees two dozen bytes per document before the sample below is drawn
    notes = {**differences, **_measured(documents, shards, rows, clusters, options, originals)}
    result = manifests.summarize(STAGE, options, inputs, reports, notes)
    manifests.check_handover(STAGE, manifest.rows_kept, result.rows_read)
    return result


def _write_keys(unit: WorkUnit, documents: str, **options: Any) -> ShardReport:
    """In a task: write the keys of a shard, then check that its documents are still those that `unit` names."""
    report = survivors.write_keys(unit, documents, **options)
    check_source(documents, unit.name, unit.payload["documents"])
    return report


def _measured(
    documents: str,
    shards: Sequence[str],
    rows: Sequence[int],
    clusters: Clusters,
    options: DedupConfig,
    originals: Originals | None,
) -> dict[str, Any]:
    """The manifest's note on how well near-dedup did; empty if it is not measured."""
    if options.quality is None:
        return {}
    quality = measure_quality(documents, shards, rows, clusters, options.minhash, options.quality, originals)
    return {_QUALITY_NOTE: quality}


def _measured_anew(
    documents: str, folder: str, finished: Manifest, options: DedupConfig, originals: Originals | None
) -> Manifest:
    """The manifest `finished`, with the same clusters, measured again with `options`."""
    shards, rows = [shard.shard for shard in finished.shards], [shard.rows_read for shard in finished.shards]
    notes = {name: note for name, note in finished.notes.items() if name != _QUALITY_NOTE}
    if options.quality is not None:
        clusters = survivors.read_clusters(folder, shards, rows)
        notes |= _measured(documents, shards, rows, clusters, options, originals)
    logger.info("dedup: clusters reused, %d documents, measured by other options", finished.rows_read)
    return finished.model_copy(update={"config": options.model_dump(mode="json"), "notes": notes})


def _documents_after(shards_of_generation: Sequence[int], rows: Sequence[int]) -> list[int]:
    """The number of documents at the end of each generation, from the rows of its shards."""
    after = np.cumsum([0, *rows])
    return [int(after[last]) for last in np.cumsum(shards_of_generation)]


class _Fetched:
    """Batches of edges, fetched one by one in each iteration: together they may be too many to hold."""

    def __init__(self, batches: Sequence[ray.ObjectRef]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[U64]:
        return (ray.get(batch) for batch in self._batches)


def _near_edges(
    run: Attempt,
    shards: Sequence[str],
    rows: Sequence[int],
    ranking: Ranking,
    config: MinHashConfig,
    workers: int | None,
) -> Iterator[ray.ObjectRef]:
    """The edges of each task when it is done, in the order of the tasks; at most `workers` tasks run at a time."""
    task = ray.remote(_band_edges)
    rank_ref = ray.put(ranking.rank_D)
    pending: list[ray.ObjectRef] = []
    for bands, key_range in survivors.band_tasks(config, len(ranking.number_R)):
        if workers and len(pending) >= workers:
            yield _done(pending.pop(0))
        # Like Ray Data's tasks, run again whenever a worker or node is lost. An error in the task itself ends the run.
        name = f"{STAGE} bands {bands[0]} to {bands[-1]}, part {key_range[0]}"
        options = {"num_cpus": 1, "max_retries": -1, "name": name}
        pending.append(task.options(**options).remote(run, shards, bands, key_range, rows, rank_ref, config))
    while pending:
        yield _done(pending.pop(0))


def _band_edges(run: Attempt, *given: Any) -> U64:
    """In a task: find edges. A shard that a later run has removed is not reported as damaged."""
    with storage.commits_guarded(run.check):
        return survivors.band_edges(run.folder, *given)


def _done(edges: ray.ObjectRef) -> ray.ObjectRef:
    with own_errors():
        ray.get(edges)
    return edges
