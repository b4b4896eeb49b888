"""Documents shards from plain texts, and dedup over them in this process: what the run on Ray must equal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import xxhash

from cert_ray import storage
from cert_ray.dedup import survivors
from cert_ray.dedup.decisions import Clusters, rank_documents
from cert_ray.dedup.minhash import I64, U64, MinHashConfig
from cert_ray.shards.units import WorkUnit, shard_name


@dataclass(frozen=True)
class Deduplicated:
    """What one run in this process found."""

    shards: list[str]
    rows: list[int]
    first_D: I64
    clusters: Clusters
    edges: list[U64]  # of each task, between ranks
    differences: dict[str, int]  # from a rebuild in one generation


def write_documents(folder: Path, texts: Sequence[str], stars: Sequence[int | None], shard_rows: int) -> list[str]:
    """`texts` as documents shards of `shard_rows` rows, with the columns that dedup reads; returns the names."""
    names = []
    for start in range(0, len(texts), shard_rows):
        part = texts[start : start + shard_rows]
        encoded = [text.encode() for text in part]
        table = pa.table(
            {
                "content": pa.array(part, pa.string()),
                "content_hash": pa.array([xxhash.xxh3_128_digest(text) for text in encoded], pa.binary(16)),
                "stars": pa.array(stars[start : start + shard_rows], pa.int64()),
                "size_bytes": pa.array([len(text) for text in encoded], pa.int32()),
            }
        )
        names.append(shard_name(len(names)))
        storage.write_parquet(table, str(folder / f"{names[-1]}.parquet"))
    return names


def deduplicate_in_process(
    folder: Path,
    texts: Sequence[str],
    stars: Sequence[int | None],
    config: MinHashConfig,
    shard_rows: int = 1_000,
    ends: Sequence[int] | None = None,
) -> Deduplicated:
    """Every step of `dedup.on_ray.deduplicate`, one after the other; `ends` are documents after each generation."""
    documents, output = str(folder / "documents"), str(folder / "dedup")
    shards = write_documents(Path(documents), texts, stars, shard_rows)
    reports = [survivors.write_keys(WorkUnit(name=name, payload={}), documents, output, config) for name in shards]
    rows = [report.rows_kept for report in reports]
    ends = [len(texts)] if ends is None else ends
    columns = survivors.read_documents(output, shards, rows, ends)
    first_D = survivors.exact_firsts(columns)
    ranking = rank_documents(columns, first_D)
    edges = [
        survivors.band_edges(output, shards, *task, rows, ranking.rank_D, config)
        for task in survivors.band_tasks(config, len(ranking.number_R))
    ]
    clusters, differences = survivors.cluster_documents(output, shards, rows, ranking, edges, ends)
    return Deduplicated(shards, rows, first_D, clusters, edges, differences)
