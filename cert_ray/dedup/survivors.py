"""Dedup over folders: key shards, edges of one band, clusters of the whole corpus. Pure functions over storage.

In: the shards of the documents stage. Out, below the stage's folder:
    keys/<shard>.parquet        content hash and one column per band (about 130 bytes a document)
    signatures/<shard>.parquet  signatures, read only for documents that share a band with another
    clusters/<shard>.parquet    per document: keep, why not, number of the survivor, cluster size
Documents are numbered by (shard, row), made dense by prefix sums of the shards' row counts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cert_ray import storage
from cert_ray.dedup.components import Clusters, candidate_edges, clusters_of, equal_edges, generations_of
from cert_ray.dedup.minhash import I64, U32, MinHashConfig, band_keys, signatures
from cert_ray.manifests import ShardReport
from cert_ray.schemas import DropReason
from cert_ray.shards.units import WorkUnit, write_table

Bits = npt.NDArray[np.bool_]


def write_keys(unit: WorkUnit, documents: str, folder: str, config: MinHashConfig) -> ShardReport:
    """Keys and signatures of one shard of `documents`."""
    table = storage.read_parquet(storage.join(documents, f"{unit.name}.parquet"), ["content", "content_hash"])
    contents = table.column("content").combine_chunks()
    signature_DH, has_shingle = signatures(contents, config)
    keys_DB = band_keys(signature_DH, config)
    keys = {"content_hash": table.column("content_hash").combine_chunks(), "has_shingle": pa.array(has_shingle)}
    keys |= {_band_column(band): pa.array(keys_DB[:, band]) for band in range(config.bands)}
    rows = pa.array(signature_DH.reshape(-1).view(np.uint8))
    packed = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(4 * config.hashes), len(table), [None, rows.buffers()[1]]
    )  # one row of bytes per document
    files = (
        write_table(folder, f"keys/{unit.name}.parquet", pa.table(keys)),
        write_table(folder, f"signatures/{unit.name}.parquet", pa.table({"signature": packed})),
    )
    return ShardReport(shard=unit.name, unit_digest="", files=files, rows_read=len(table), rows_kept=len(table))


def exact_edges(folder: str, shards: Sequence[str]) -> I64:
    """Edges between documents of equal content hash; 16 bytes per document in memory."""
    hashes = [_fixed_rows(_read_keys(folder, shard, "content_hash")).view("V16")[:, 0] for shard in shards]
    return equal_edges(np.concatenate(hashes)) if hashes else np.zeros((0, 2), np.int64)


def band_edges(folder: str, shards: Sequence[str], band: int, skip: Bits, config: MinHashConfig) -> I64:
    """Verified edges of one band among the documents that `skip` leaves (exact duplicates need no second look)."""
    keys = [_read_keys(folder, shard, _band_column(band)).to_numpy() for shard in shards]
    shingled = [_read_keys(folder, shard, "has_shingle").to_numpy(zero_copy_only=False) for shard in shards]
    rows = [len(column) for column in keys]
    members = np.flatnonzero(np.concatenate([*shingled, np.zeros(0, bool)]) & ~skip)
    member_keys = np.concatenate([*keys, np.zeros(0, np.uint64)])[members]
    _, inverse, counts = np.unique(member_keys, return_inverse=True, return_counts=True)
    shared = counts[inverse] > 1
    members, member_keys = members[shared], member_keys[shared]
    signature_MH = _read_signatures(folder, shards, rows, members, config)
    ranks = np.arange(len(members))
    return members[candidate_edges(member_keys, ranks, signature_MH, config.threshold)].astype(np.int64)


def cluster_documents(
    documents: str, shards: Sequence[str], edges: I64, ends: Sequence[int]
) -> tuple[Clusters, dict[str, int]]:
    """The clusters of the whole corpus; survivors by stars (unknown counts as 0), then size, then number.

    Args:
        ends: documents after each generation.

    Returns:
        The clusters, and how many documents are kept that a rebuild in one generation would drop, and the reverse.
    """
    tables = [
        storage.read_parquet(storage.join(documents, f"{shard}.parquet"), ["stars", "size_bytes"]) for shard in shards
    ]
    stars = np.concatenate([np.zeros(0), *(table.column("stars").fill_null(0).to_numpy() for table in tables)])
    sizes = np.concatenate([np.zeros(0), *(table.column("size_bytes").to_numpy() for table in tables)])
    quality = stars.astype(np.int64), sizes.astype(np.int64)
    clusters = generations_of(ends, edges, *quality)
    if len(ends) == 1:
        return clusters, {}
    rebuilt = clusters_of(len(stars), edges, *quality).keep
    return clusters, {
        "kept_unlike_a_rebuild": int((clusters.keep & ~rebuilt).sum()),
        "dropped_unlike_a_rebuild": int((rebuilt & ~clusters.keep).sum()),
    }


def write_clusters(
    folder: str, shards: Sequence[str], rows: Sequence[int], clusters: Clusters, exact: I64, digest: str
) -> list[ShardReport]:
    """One clusters file per shard, and the drops by reason.

    A dropped document is an exact duplicate when another document with its content stands for it or survives.
    """
    is_copy = np.zeros(len(clusters.survivor_D), bool)
    is_copy[exact[:, 1]] = True
    group = np.arange(len(is_copy))
    group[exact[:, 1]] = exact[:, 0]
    is_copy |= group == group[clusters.survivor_D]
    reports, first = [], 0
    for shard, count in zip(shards, rows, strict=True):
        part = slice(first, first + count)
        keep = clusters.keep[part]
        copies = is_copy[part] & ~keep
        reason = np.where(copies, DropReason.EXACT_DUPLICATE, DropReason.NEAR_DUPLICATE)
        table = pa.table(
            {
                "keep": pa.array(keep),
                "reason": pa.array(reason.astype(object), pa.string(), mask=keep),
                "survivor": pa.array(clusters.survivor_D[part]),
                "cluster_size": pa.array(clusters.size_D[part], pa.int32()),
            }
        )
        file = write_table(folder, f"clusters/{shard}.parquet", table)
        dropped = {
            DropReason.EXACT_DUPLICATE: int(copies.sum()),
            DropReason.NEAR_DUPLICATE: int((~keep & ~copies).sum()),
        }
        reports.append(
            ShardReport(
                shard=shard, unit_digest=digest, files=(file,), rows_read=count, rows_kept=int(keep.sum()),
                dropped={str(name): number for name, number in dropped.items() if number},
            )
        )  # fmt: skip
        first += count
    return reports


def _band_column(band: int) -> str:
    return f"band_{band:02d}"


def _read_keys(folder: str, shard: str, column: str) -> pa.ChunkedArray:
    return storage.read_parquet(storage.join(folder, "keys", f"{shard}.parquet"), [column]).column(column)


def _fixed_rows(column: pa.ChunkedArray) -> npt.NDArray[np.uint8]:
    """uint8[rows, width] over the buffer of a fixed-size binary column without nulls: no Python object per row."""
    array, width = column.combine_chunks(), column.type.byte_width
    values = np.frombuffer(array.buffers()[1], np.uint8)
    return values[array.offset * width : (array.offset + len(array)) * width].reshape(len(array), width)


def _read_signatures(
    folder: str, shards: Sequence[str], rows: Sequence[int], members: I64, config: MinHashConfig
) -> U32:
    """uint32[members, hashes], reading only the shards that hold one of `members` (sorted)."""
    parts, first = [np.zeros((0, config.hashes), np.uint32)], 0
    for shard, count in zip(shards, rows, strict=True):
        wanted = members[np.searchsorted(members, first) : np.searchsorted(members, first + count)] - first
        if len(wanted):
            column = storage.read_parquet(storage.join(folder, "signatures", f"{shard}.parquet")).column("signature")
            parts.append(_fixed_rows(column.take(pa.array(wanted))).view(np.uint32))
        first += count
    return np.concatenate(parts)
