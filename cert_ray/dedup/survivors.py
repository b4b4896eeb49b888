"""Dedup over folders: key shards, edges of one band, clusters of the whole corpus. Pure functions over storage.

In: the shards of the documents stage. Out, below the stage's folder:
    keys/<shard>.parquet        content hash and one column per band (about 130 bytes a document)
    signatures/<shard>.parquet  signatures, read only for documents that share a band with another
    clusters/<shard>.parquet    per document: keep, why not, number of the survivor, cluster size
Documents are numbered by (shard, row), made dense by prefix sums of the shards' row counts.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cert_ray import storage
from cert_ray.dedup.components import Clusters, candidate_edges, clusters_of, first_of_equal, sharing, tie
from cert_ray.dedup.minhash import I64, U32, U64, MinHashConfig, band_keys, signatures
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


def exact_firsts(folder: str, shards: Sequence[str], rows: Sequence[int]) -> I64:
    """For every document the least number with the same content."""
    return first_of_equal(_content_hashes(folder, shards, rows))


def band_edges(
    folder: str, shards: Sequence[str], band: int, skip: Bits, ends: Sequence[int], config: MinHashConfig
) -> I64:
    """Verified edges of one band among the documents that `skip` leaves (exact duplicates need no second look).

    Args:
        ends: documents after each generation.
    """
    members, member_keys, rows = _band_members(folder, shards, band, skip)
    shared = sharing(member_keys)
    shared.sort()  # by number, as files are read
    members, member_keys = members[shared], member_keys[shared]
    hashes_M2 = _content_hashes(folder, shards, rows, members)
    signature_MH = _read_signatures(folder, shards, rows, members, config)
    generation_M = np.searchsorted(ends, members, side="right")
    return members[candidate_edges(member_keys, hashes_M2, signature_MH, config.threshold, generation_M)]


def cluster_documents(
    documents: str,
    folder: str,
    shards: Sequence[str],
    rows: Sequence[int],
    first_D: I64,
    edges: Iterable[I64],
    ends: Sequence[int],
) -> tuple[Clusters, dict[str, int]]:
    """The clusters of the whole corpus from exact duplicates (`first_D`) and every band's `edges`, in any order.

    A cluster's survivor has the most stars (unknown counts as 0), then the most bytes, then the least content hash.
    Copies of the surviving content that still tie are told apart by their number alone.

    What was decided in a generation stays: its documents keep their survivors and cluster sizes, and a later document
    in the cluster of an old survivor is dropped for it. So two old survivors stay where a new document joins them.

    Args:
        ends: documents after each generation. Each generation takes 8 bytes per document up to its end.

    Returns:
        The clusters, and how many documents are kept that a rebuild in one generation would drop, and the reverse.
    """
    labels = [first_D[:end] for end in ends]
    for batch in edges:
        last = batch.max(axis=1, initial=-1) if len(ends) > 1 else None
        for index, end in enumerate(ends):
            labels[index] = tie(labels[index], batch if last is None else batch[last < end])
    if len(labels) == 1:
        return clusters_of(labels[0], _precedence(documents, folder, shards, rows)), {}
    survivor_D, size_D = np.zeros(0, np.int64), np.zeros(0, np.int64)
    for label in labels:
        start, end = len(survivor_D), len(label)
        new = np.ones(end, np.int64)
        new[:start] = survivor_D != np.arange(start)  # dropped before, and so are not to stand for anything
        precedence = (column[:end] for column in _precedence(documents, folder, shards, rows))
        clusters = clusters_of(label, itertools.chain([new], precedence))
        survivor_D = np.concatenate([survivor_D, clusters.survivor_D[start:]])
        size_D = np.concatenate([size_D, clusters.size_D[start:]])
    decided = Clusters(survivor_D, size_D)
    rebuilt = clusters_of(labels[-1], _precedence(documents, folder, shards, rows)).keep
    return decided, {
        "kept_unlike_a_rebuild": int((decided.keep & ~rebuilt).sum()),
        "dropped_unlike_a_rebuild": int((rebuilt & ~decided.keep).sum()),
    }


def _precedence(documents: str, folder: str, shards: Sequence[str], rows: Sequence[int]) -> Iterator[I64 | U64]:
    for column in ("stars", "size_bytes"):
        values = np.empty(sum(rows), np.int64)
        for shard, part in _parts(shards, rows):
            read = storage.read_parquet(storage.join(documents, f"{shard}.parquet"), [column]).column(column)
            np.negative(read.fill_null(0).to_numpy(), out=values[part])
        yield values
    for half in range(2):
        yield np.ascontiguousarray(_content_hashes(folder, shards, rows)[:, half])


def write_clusters(
    folder: str, shards: Sequence[str], rows: Sequence[int], clusters: Clusters, first_D: I64, digest: str
) -> list[ShardReport]:
    """One clusters file per shard, and the drops by reason.

    A dropped document is an exact duplicate when another document with its content stands for it or survives.
    """
    reports = []
    for shard, part in _parts(shards, rows):
        numbers = np.arange(part.start, part.stop)
        survivor, size, first = clusters.survivor_D[part], clusters.size_D[part], first_D[part]
        keep = survivor == numbers
        copies = ((first != numbers) | (first == first_D[survivor])) & ~keep
        reason = np.where(copies, DropReason.EXACT_DUPLICATE, DropReason.NEAR_DUPLICATE)
        table = pa.table(
            {
                "keep": pa.array(keep),
                "reason": pa.array(reason.astype(object), pa.string(), mask=keep),
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


def _parts(shards: Sequence[str], rows: Sequence[int]) -> Iterator[tuple[str, slice]]:
    """Every shard with the range of its documents' numbers."""
    first = 0
    for shard, count in zip(shards, rows, strict=True):
        yield shard, slice(first, first + count)
        first += count


def _band_column(band: int) -> str:
    return f"band_{band:02d}"


def _read_keys(folder: str, shard: str, column: str) -> pa.ChunkedArray:
    return storage.read_parquet(storage.join(folder, "keys", f"{shard}.parquet"), [column]).column(column)


def _fixed_rows(column: pa.ChunkedArray) -> npt.NDArray[np.uint8]:
    """uint8[rows, width] over the buffer of a fixed-size binary column without nulls: no Python object per row."""
    array, width = column.combine_chunks(), column.type.byte_width
    values = np.frombuffer(array.buffers()[1], np.uint8)
    return values[array.offset * width : (array.offset + len(array)) * width].reshape(len(array), width)


def _band_members(folder: str, shards: Sequence[str], band: int, skip: Bits) -> tuple[I64, U64, list[int]]:
    """Numbers and keys of the documents with a key that `skip` leaves, and the rows of each shard."""
    members, keys, rows = np.empty(len(skip), np.int64), np.empty(len(skip), np.uint64), []
    first = filled = 0
    for shard in shards:
        table = storage.read_parquet(
            storage.join(folder, "keys", f"{shard}.parquet"), [_band_column(band), "has_shingle"]
        )
        shingled = table.column("has_shingle").to_numpy()
        chosen = np.flatnonzero(shingled & ~skip[first : first + len(table)])
        part = slice(filled, filled + len(chosen))
        members[part] = chosen + first
        keys[part] = table.column(_band_column(band)).to_numpy()[chosen]
        rows.append(len(table))
        first, filled = first + len(table), part.stop
    return members[:filled], keys[:filled], rows


def _content_hashes(folder: str, shards: Sequence[str], rows: Sequence[int], members: I64 | None = None) -> U64:
    """uint64[members, 2], the halves of content hashes: of every document, or of `members` (sorted)."""
    hashes_M2 = np.empty((sum(rows) if members is None else len(members), 2), np.uint64)
    for shard, part in _parts(shards, rows):
        wanted = part if members is None else slice(*np.searchsorted(members, (part.start, part.stop)))
        if wanted.start == wanted.stop:
            continue
        column = _read_keys(folder, shard, "content_hash")
        of_shard = _fixed_rows(column).view(">u8")
        hashes_M2[wanted] = of_shard if members is None else of_shard[members[wanted] - part.start]
    return hashes_M2


def _read_signatures(
    folder: str, shards: Sequence[str], rows: Sequence[int], members: I64, config: MinHashConfig
) -> U32:
    """uint32[members, hashes], reading only the shards that hold one of `members` (sorted)."""
    signature_MH = np.empty((len(members), config.hashes), np.uint32)
    for shard, part in _parts(shards, rows):
        wanted = slice(*np.searchsorted(members, (part.start, part.stop)))
        if wanted.start < wanted.stop:
            column = storage.read_parquet(storage.join(folder, "signatures", f"{shard}.parquet")).column("signature")
            signature_MH[wanted] = _fixed_rows(column).view(np.uint32)[members[wanted] - part.start]
    return signature_MH
