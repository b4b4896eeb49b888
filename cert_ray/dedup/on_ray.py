"""Dedup on Ray: key shards as work units, one task per band, components on the driver.

What moves between processes is edges and one skip bit per document; signatures stay in storage.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence

import numpy as np
import ray

from cert_ray import manifests
from cert_ray.dedup import survivors
from cert_ray.dedup.minhash import I64, MinHashConfig
from cert_ray.manifests import Manifest
from cert_ray.shards.on_ray import run_units
from cert_ray.shards.units import WorkUnit

logger = logging.getLogger(__name__)


def deduplicate(
    documents: str, manifest: Manifest, folder: str, config: MinHashConfig, workers: int | None = None
) -> Manifest:
    """Exact and near duplicates of the documents that `manifest` lists; writes `folder`, see `dedup.survivors`.

    Its note "generations" says how many shards each generation has; what one decided, later ones leave.
    """
    units = [WorkUnit(name=shard.shard, payload={"digest": shard.unit_digest}) for shard in manifest.shards]
    work = functools.partial(survivors.write_keys, documents=documents, folder=folder, config=config)
    keys = run_units(
        units, work, folder=folder, config_digest=config.digest(), stage="dedup", verb="preprocess", workers=workers
    )
    shards, rows = [report.shard for report in keys], [report.rows_kept for report in keys]
    ends = _documents_after(manifest.notes["generations"], rows)
    inputs = clusters_digest(manifest.inputs_digest, config)
    exact = survivors.exact_edges(folder, shards)
    skip = np.zeros(sum(rows), bool)
    skip[exact[:, 1]] = True
    edges = np.unique(np.concatenate([exact, *_near_edges(folder, shards, skip, config, workers)]), axis=0)
    clusters, differences = survivors.cluster_documents(documents, shards, edges, ends)
    reports = survivors.write_clusters(folder, shards, rows, clusters, exact, inputs)
    result = manifests.summarize("dedup", config, inputs, reports, notes=differences)
    manifests.write_manifest(folder, result)
    logger.info("dedup: %d documents, %d kept, dropped %s", result.rows_read, result.rows_kept, result.dropped)
    return result


def clusters_digest(documents_digest: str, config: MinHashConfig) -> str:
    """What the clusters are made from: the documents' inputs, and how they are compared."""
    return f"{documents_digest}-{config.digest()}"


def _documents_after(shards_of_generation: Sequence[int], rows: Sequence[int]) -> list[int]:
    """Documents after each generation, from its shards' counts."""
    ends = np.cumsum([0, *rows])
    return [int(ends[last]) for last in np.cumsum(shards_of_generation)]


def _near_edges(
    folder: str, shards: Sequence[str], skip: survivors.Bits, config: MinHashConfig, workers: int | None
) -> list[I64]:
    """Every band's edges, in band order, at most `workers` tasks at a time."""
    task = ray.remote(survivors.band_edges)
    skip_ref = ray.put(skip)
    pending: list[ray.ObjectRef] = []
    edges: list[I64] = []
    for band in range(config.bands):
        if workers and len(pending) - len(edges) >= workers:
            edges.append(ray.get(pending[len(edges)]))
        pending.append(task.options(num_cpus=1).remote(folder, shards, band, skip_ref, config))
    edges.extend(ray.get(pending[len(edges) :]))
    return edges
