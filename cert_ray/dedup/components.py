"""From equal keys to survivors: star edges, verification, connected components, one survivor per cluster.

In: numpy columns indexed by document number. Out: a keep bit, the survivor of each document, and cluster sizes.
Everything is a function of the set of documents and their numbers, never of an order of arrival. Memory is a small
multiple of 8 bytes per document and per edge; nothing is shuffled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from cert_ray.dedup.minhash import I64, U32, U64

# A bucket whose hub fails verification is compared pair by pair up to this many members; assumed, bounds the work.
PAIRWISE_LIMIT = 64


@dataclass(frozen=True, slots=True)
class Clusters:
    """For every document the number of its cluster's survivor, and that cluster's size (documents)."""

    survivor_D: I64
    size_D: I64

    @property
    def keep(self) -> npt.NDArray[np.bool_]:
        """Which documents survive."""
        return np.equal(self.survivor_D, np.arange(len(self.survivor_D)))


def candidate_edges(keys: U64, documents: I64, signature_DH: U32, threshold: float) -> I64:
    """Verified edges of one band: every member of a bucket is tied to the bucket's smallest document number.

    Members that are not similar to that hub are compared pair by pair, up to `PAIRWISE_LIMIT` of them.

    Args:
        keys: uint64[n], this band's key of each of `documents`. signature_DH: rows by document number.

    Returns:
        int64[edges, 2], smaller number first.
    """
    order = np.lexsort((documents, keys))
    keys, documents = keys[order], documents[order]
    first = np.concatenate([[True], keys[1:] != keys[:-1]]) if len(keys) else np.zeros(0, bool)
    bucket = np.cumsum(first) - 1
    hubs = documents[first][bucket]
    hub, spoke, bucket = hubs[~first], documents[~first], bucket[~first]
    similar = agreement(signature_DH, hub, spoke) >= threshold
    edges = [np.stack([hub[similar], spoke[similar]], axis=1)]
    failed, failed_bucket = spoke[~similar], bucket[~similar]
    for members in np.split(failed, np.flatnonzero(np.diff(failed_bucket)) + 1) if len(failed) else []:
        left, right = np.triu_indices(min(len(members), PAIRWISE_LIMIT), 1)
        pair_left, pair_right = members[left], members[right]
        close = agreement(signature_DH, pair_left, pair_right) >= threshold
        edges.append(np.stack([pair_left[close], pair_right[close]], axis=1))
    return np.concatenate(edges).astype(np.int64)


def agreement(signature_DH: U32, left: I64, right: I64) -> npt.NDArray[np.float64]:
    """Share of equal hashes of each pair: the unbiased estimate of their shingle sets' Jaccard similarity."""
    result = np.empty(len(left), np.float64)
    for start in range(0, len(left), 1 << 16):  # bounds the gathered rows at about 60 MB
        part = slice(start, start + (1 << 16))
        result[part] = (signature_DH[left[part]] == signature_DH[right[part]]).mean(axis=1)
    return result


def equal_edges(hashes: npt.NDArray[np.void]) -> I64:
    """Edges that tie every document to the smallest number with the same hash (exact duplicates)."""
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    hub = first[inverse]
    spoke = np.arange(len(hashes))
    return np.stack([hub[hub != spoke], spoke[hub != spoke]], axis=1).astype(np.int64)


def clusters_of(
    documents: int, edges: I64, stars_D: I64, size_bytes_D: I64, kept_before: npt.NDArray[np.bool_] | None = None
) -> Clusters:
    """Connected components of `edges`, each with the survivor of most stars, then of most bytes, then least number.

    Args:
        kept_before: bool[first documents], which of them survive already: where a component holds one of these, the
            best of them stands for it.
    """
    rank_D = np.zeros(documents, np.int8)
    if kept_before is not None:
        rank_D[: len(kept_before)] = kept_before
    graph = coo_array((np.ones(len(edges), np.int8), (edges[:, 0], edges[:, 1])), shape=(documents, documents))
    count, label_D = connected_components(graph.tocsr(), directed=False)
    by_quality = np.lexsort((np.arange(documents), -size_bytes_D, -stars_D, -rank_D))
    survivor_of_label = np.full(count, -1, np.int64)
    survivor_of_label[label_D[by_quality[::-1]]] = by_quality[::-1]  # the best of each label is written last
    sizes = np.bincount(label_D, minlength=count)
    return Clusters(survivor_of_label[label_D], sizes[label_D].astype(np.int64))


def generations_of(ends: Sequence[int], edges: I64, stars_D: I64, size_bytes_D: I64) -> Clusters:
    """Clusters of a corpus that grew: `ends` are the document counts after each generation, the last one's last.

    What was decided in a generation stays: its documents keep their survivors and their cluster sizes, and a later
    document that resembles one of them is dropped for it. So two old survivors stay where a new document joins them.
    """
    survivor_D, size_D = np.zeros(0, np.int64), np.zeros(0, np.int64)
    for end in ends:
        inside = edges[edges.max(axis=1, initial=-1) < end]
        kept = np.equal(survivor_D, np.arange(len(survivor_D)))
        clusters = clusters_of(end, inside, stars_D[:end], size_bytes_D[:end], kept)
        start = len(survivor_D)
        survivor_D = np.concatenate([survivor_D, clusters.survivor_D[start:]])
        size_D = np.concatenate([size_D, clusters.size_D[start:]])
    return Clusters(survivor_D, size_D)
