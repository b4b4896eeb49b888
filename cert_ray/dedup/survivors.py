"""Dedup over folders: key shards, edges of some bands, clusters of the whole corpus. Pure functions over storage.

In: the shards of the documents stage. Out, below the stage's folder:
    keys/<shard>.parquet        content hash, stars, size and one column per band (about 130 bytes per document)
    signatures/<shard>.parquet  signatures (512 bytes), read only for documents that share a band
    clusters/<shard>.parquet    per document: keep, why not, number of the survivor, cluster size
Documents are numbered in the order of shards and rows: a document's number is its row plus the rows of earlier shards.
"""

from __future__ import annotations

import errno
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from cert_ray import storage
from cert_ray.dedup import decisions
from cert_ray.dedup.buckets import bucket_edges, joined, second_of, sharing
from cert_ray.dedup.contents import VERB, Originals, read_contents
from cert_ray.dedup.decisions import UNRANKED, Clusters, Documents, Ranking
from cert_ray.dedup.minhash import BINS, I64, U8, U32, U64, MinHashConfig, signatures
from cert_ray.errors import StorageFullError
from cert_ray.manifests import ShardReport, WrittenFile
from cert_ray.schemas import DropReason
from cert_ray.shards.units import WorkUnit, damage_named, write_table

# Even small corpora are cut into this many tasks. Not more, because every task reads every shard of keys.
_LEAST_TASKS = 4


def write_keys(
    unit: WorkUnit, documents: str, folder: str, config: MinHashConfig, originals: Originals | None = None
) -> ShardReport:
    """Write keys and signatures of one shard of `documents`, including files that were taken down: see `contents`."""
    columns = ["content", "content_hash", "stars", "size_bytes"]
    table = read_contents(documents, unit.name, columns, originals)
    signature_DK, keys_DB, has_shingle_D = signatures(table.column("content").combine_chunks(), config)
    keys = {name: table.column(name).combine_chunks() for name in columns[1:]}
    keys["has_shingle"] = pa.array(has_shingle_D)
    keys |= {_band_column(band): pa.array(np.ascontiguousarray(keys_DB[:, band])) for band in range(config.bands)}
    rows = pa.array(signature_DK.reshape(-1))
    packed = pa.FixedSizeBinaryArray.from_buffers(pa.binary(BINS), len(table), [None, rows.buffers()[1]])
    files = (
        _write(folder, f"keys/{unit.name}.parquet", pa.table(keys)),
        _write(folder, f"signatures/{unit.name}.parquet", pa.table({"signature": packed})),
    )
    return ShardReport(shard=unit.name, unit_digest="", files=files, rows_read=len(table), rows_kept=len(table))


def _write(folder: str, name: str, table: pa.Table) -> WrittenFile:
    """Write hashes without a dictionary, since values do not repeat, and with the fastest compression."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="lz4", use_dictionary=False, write_statistics=False)
    written = storage.write_bytes(storage.join(folder, name), sink.getvalue())
    return WrittenFile.of(name, written, len(table))


def read_documents(folder: str, shards: Sequence[str], rows: Sequence[int], ends: Sequence[int]) -> Documents:
    """What decides between documents: 25 bytes for each.

    Args:
        ends: documents after each generation.

    Raises:
        ShardCorruptError: when a shard of keys is damaged.
    """
    count = sum(rows)
    hashes_D2, has_shingle_D = np.empty((count, 2), np.uint64), np.empty(count, bool)
    stars_D, size_D = np.empty(count, np.int32), np.empty(count, np.int32)
    for shard, part in _parts(shards, rows):
        columns = ["content_hash", "has_shingle", "stars", "size_bytes"]
        table = _read(folder, "keys", shard, columns, part, use_threads=False)
        hashes_D2[part] = _fixed_rows(table.column("content_hash")).view(">u8")
        has_shingle_D[part] = table.column("has_shingle").to_numpy()
        stars_D[part] = np.minimum(table.column("stars").fill_null(0).to_numpy(), np.iinfo(np.int32).max)
        size_D[part] = table.column("size_bytes").to_numpy()
    return Documents(hashes_D2, decisions.precedence(stars_D, size_D, ends), has_shingle_D)


def exact_firsts(documents: Documents) -> I64:
    """For every document, the one that stands for its content: see `decisions.precedence`."""
    return decisions.best_of_equal(documents)


def band_tasks(config: MinHashConfig, documents: int) -> list[tuple[tuple[int, ...], tuple[int, int]]]:
    """The bands of each task, and which range of their keys, of how many: several bands, or a part of one."""
    parts = max(1, math.ceil(documents / config.keys_in_memory))
    most = max(1, min(config.keys_in_memory // max(documents, 1), math.ceil(config.bands / _LEAST_TASKS)))
    groups = [tuple(range(first, min(first + most, config.bands))) for first in range(0, config.bands, most)]
    return [(group, (part, parts)) for group in groups for part in range(parts)]


def band_edges(
    folder: str,
    shards: Sequence[str],
    bands: Sequence[int],
    key_range: tuple[int, int],
    rows: Sequence[int],
    rank_D: U32,
    config: MinHashConfig,
) -> U64:
    """Verified edges between ranks (see `buckets`), for some bands and one range of their keys.

    Memory is a few dozen bytes per key of the range, and `config.signatures_in_memory` signatures. If more documents
    than that share keys, their signatures are kept in a temporary file.

    Args:
        key_range: which range, from 0, and of how many equal ranges.

    Raises:
        ShardCorruptError: when a shard of keys or signatures is damaged.
    """
    places = [sharing(of_band) for of_band in _places(folder, shards, rows, bands, key_range, rank_D)]
    members = np.unique(np.concatenate([second_of(of_band) for of_band in places]))
    shape, most = (len(members), BINS), config.signatures_in_memory
    with tempfile.TemporaryFile() as spool:
        signature_MK: U8
        if len(members) > most:
            _reserve(spool.fileno(), len(members) * BINS)
            signature_MK = np.memmap(spool, np.uint8, "r+", shape=shape)
        else:
            signature_MK = np.empty(shape, np.uint8)
        _read_signatures(folder, shards, rows, rank_D, members, signature_MK)

        def read(ranks: U32) -> U8:
            return np.asarray(signature_MK[np.searchsorted(members, ranks)])

        edges = [bucket_edges(of_band, read, config.verified_from, most) for of_band in places]
    return np.unique(np.concatenate(edges))


def cluster_documents(
    folder: str,
    shards: Sequence[str],
    rows: Sequence[int],
    ranking: Ranking,
    batches: Iterable[U64],
    ends: Sequence[int],
) -> tuple[Clusters, dict[str, int]]:
    """The clusters of the whole corpus from the edges of all bands, in any order; `batches` is iterated several times.

    Decisions of a generation are final: earlier documents have lower ranks, so later ones change nothing among them,
    and one that resembles an old survivor is dropped for it, however good it is.

    Args:
        ends: documents after each generation.

    Returns:
        The clusters; and how many documents are kept that a rebuild in one generation would drop, and the reverse.
    """
    clusters = decisions.clusters_of(ranking, decisions.choose_survivors(batches, len(ranking.number_R)), ends)
    if len(ends) == 1:
        return clusters, {}
    rebuilt = _rebuilt(read_documents(folder, shards, rows, ends), ranking, batches)
    return clusters, {
        "kept_unlike_a_rebuild": int((clusters.keep & ~rebuilt).sum()),
        "dropped_unlike_a_rebuild": int((rebuilt & ~clusters.keep).sum()),
    }


def _rebuilt(documents: Documents, ranking: Ranking, batches: Iterable[U64]) -> decisions.Bits:
    """Which documents the same edges would keep if all documents had come in one generation."""
    documents = decisions.in_one_generation(documents)
    anew = decisions.rank_documents(documents, decisions.best_of_equal(documents))
    rank_R = anew.rank_D[anew.first_D[ranking.number_R]]
    survivor_R = decisions.choose_survivors(_Reranked(batches, rank_R), len(anew.number_R))
    return decisions.clusters_of(anew, survivor_R, [len(anew.first_D)]).keep


class _Reranked:
    """Batches of edges with other ranks, which can be iterated over repeatedly."""

    def __init__(self, batches: Iterable[U64], rank_R: U32) -> None:
        self._batches, self._rank_R = batches, rank_R

    def __iter__(self) -> Iterator[U64]:
        return (decisions.reranked(edges, self._rank_R) for edges in self._batches)


def write_clusters(
    folder: str, shards: Sequence[str], rows: Sequence[int], clusters: Clusters, first_D: I64, digest: str
) -> list[ShardReport]:
    """Write a clusters file per shard, and count drops by reason. `first_D` tells exact from near duplicates."""
    reports = []
    for shard, part in _parts(shards, rows):
        numbers = np.arange(part.start, part.stop)
        survivor, size = clusters.survivor_D[part], clusters.size_D[part]
        keep, copies = survivor == numbers, first_D[part] != numbers
        reasons = pa.array([DropReason.NEAR_DUPLICATE, DropReason.EXACT_DUPLICATE], pa.string())
        reason = pa.DictionaryArray.from_arrays(pa.array(copies.astype(np.int8), mask=keep), reasons)
        table = pa.table(
            {
                "keep": pa.array(keep),
                "reason": reason.cast(pa.string()),
                "survivor": pa.array(survivor),
                "cluster_size": pa.array(size, pa.int32()),
            }
        )
        file = write_table(folder, f"clusters/{shard}.parquet", table)
        dropped = {
            DropReason.EXACT_DUPLICATE: int(copies.sum()),
            DropReason.NEAR_DUPLICATE: int((~keep & ~copies).sum()),
        }
        reports.append(
            ShardReport(
                shard=shard, unit_digest=digest, files=(file,), rows_read=len(keep), rows_kept=int(keep.sum()),
                dropped={str(name): number for name, number in dropped.items() if number},
            )
        )  # fmt: skip
    return reports


def read_clusters(folder: str, shards: Sequence[str], rows: Sequence[int]) -> Clusters:
    """What `write_clusters` wrote."""
    clusters = Clusters(np.empty(sum(rows), np.int64), np.empty(sum(rows), np.int64))
    for shard, part in _parts(shards, rows):
        url = storage.join(folder, f"clusters/{shard}.parquet")
        table = storage.read_parquet(url, ["survivor", "cluster_size"], use_threads=False)
        clusters.survivor_D[part] = table.column("survivor").to_numpy()
        clusters.size_D[part] = table.column("cluster_size").to_numpy()
    return clusters


def _parts(shards: Sequence[str], rows: Sequence[int]) -> Iterator[tuple[str, slice]]:
    """Each shard with the range of its documents' numbers."""
    first = 0
    for shard, count in zip(shards, rows, strict=True):
        yield shard, slice(first, first + count)
        first += count


def _band_column(band: int) -> str:
    return f"band_{band:02d}"


def _read(
    folder: str, kind: str, shard: str, columns: list[str], documents: slice, use_threads: bool = True
) -> pa.Table:
    """Columns of the keys or signatures of a shard, checked to have a row for each of its `documents`."""
    url = storage.join(folder, kind, f"{shard}.parquet")
    with damage_named(folder, shard, VERB):
        table = storage.read_parquet(url, columns, use_threads=use_threads)
        if len(table) != documents.stop - documents.start:
            raise ValueError(f"{url}: {len(table)} rows for {documents.stop - documents.start} documents")
    return table


def _fixed_rows(column: pa.ChunkedArray) -> npt.NDArray[np.uint8]:
    """uint8[rows, width] over the buffer of a fixed-size binary column without nulls: no Python object per row."""
    array, width = column.combine_chunks(), column.type.byte_width
    values = np.frombuffer(array.buffers()[1], np.uint8)
    return values[array.offset * width : (array.offset + len(array)) * width].reshape(len(array), width)


def _places(
    folder: str,
    shards: Sequence[str],
    rows: Sequence[int],
    bands: Sequence[int],
    key_range: tuple[int, int],
    rank_D: U32,
) -> list[U64]:
    """For each band, key and rank of every ranked document whose key is in the range."""
    part, parts = key_range
    found: list[list[U64]] = [[np.zeros(0, np.uint64)] for _ in bands]
    for shard, documents in _parts(shards, rows):
        ranks = rank_D[documents]
        ranked = ranks != UNRANKED
        table = _read(folder, "keys", shard, [_band_column(band) for band in bands], documents)
        for column, places in zip(table.columns, found, strict=True):
            keys = column.to_numpy()
            chosen = ranked if parts == 1 else ranked & (keys.astype(np.uint64) * parts >> 32 == part)
            places.append(joined(keys[chosen], ranks[chosen]))
    return [np.concatenate(found.pop(0)) for _ in bands]


def _reserve(descriptor: int, size_bytes: int) -> None:
    """Allocate the open file's space now: a full disk under a memory map would kill the process without a message.

    Raises:
        StorageFullError: when the temporary folder has too little room.
    """
    try:
        os.posix_fallocate(descriptor, 0, size_bytes)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        free_bytes = shutil.disk_usage(tempfile.gettempdir()).free
        raise StorageFullError(tempfile.gettempdir(), size_bytes, free_bytes) from error


def _read_signatures(
    folder: str, shards: Sequence[str], rows: Sequence[int], rank_D: U32, members: U32, signature_MK: U8
) -> None:
    """Fill in the signatures of the ranks `members` (sorted), reading only the shards that hold one of them."""
    wanted_R = np.zeros(int(members.max(initial=0)) + 2, bool)  # the last belongs to no rank
    wanted_R[members] = True
    for shard, part in _parts(shards, rows):
        ranks = rank_D[part]
        wanted = np.flatnonzero(wanted_R[np.minimum(ranks, len(wanted_R) - 1)])
        if len(wanted):
            column = _read(folder, "signatures", shard, ["signature"], part).column("signature")
            signature_MK[np.searchsorted(members, ranks[wanted])] = _fixed_rows(column)[wanted]
