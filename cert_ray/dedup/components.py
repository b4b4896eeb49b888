"""From equal keys to survivors: star edges, verification, connected components, one survivor per cluster.

In: numpy columns indexed by document number. Out: a keep bit, the survivor of each document, and cluster sizes.
Numbers name documents, and decide nothing but between equal contents: hubs and survivors are chosen by what stands in
a document, so permuting the input gives the same clusters and the same surviving contents. Nothing is shuffled, and no
more than one band's edges are held; memory is a few dozen bytes per document.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from cert_ray.dedup.minhash import I64, U32, U64

# A bucket whose hub does not match a member gets further hubs, up to this many in all; assumed, bounds the work at so
# many comparisons a member. Copies of one text need one more, whatever their number.
HUBS_PER_BUCKET = 32


@dataclass(frozen=True, slots=True)
class Clusters:
    """For every document the number of its cluster's survivor, and that cluster's size (documents)."""

    survivor_D: I64
    size_D: I64

    @property
    def keep(self) -> npt.NDArray[np.bool_]:
        """Which documents survive."""
        return np.equal(self.survivor_D, np.arange(len(self.survivor_D)))


def sharing(keys: U64) -> I64:
    """Positions in `keys` of those that are there more than once, equal keys side by side."""
    order = np.argsort(keys)
    ordered = keys[order]
    equal = ordered[1:] == ordered[:-1]
    return order[np.concatenate([[False], equal]) | np.concatenate([equal, [False]])] if len(keys) else order


def first_of_equal(hashes_D2: U64) -> I64:
    """For every document the least number with the same 128-bit hash (exact duplicates); its own when there is none.

    Args:
        hashes_D2: the halves of each document's hash.
    """
    first_D = np.arange(len(hashes_D2))
    members = sharing(np.ascontiguousarray(hashes_D2[:, 0]))
    members = members[np.lexsort((members, hashes_D2[members, 1], hashes_D2[members, 0]))]
    new = np.concatenate([[True], (hashes_D2[members[1:]] != hashes_D2[members[:-1]]).any(axis=1)])[: len(members)]
    first_D[members] = members[new][np.cumsum(new) - 1]
    return first_D


def candidate_edges(
    keys: U64, hashes_M2: U64, signature_MH: U32, threshold: float, generation_M: npt.NDArray[np.integer] | None = None
) -> I64:
    """Verified edges of one band: every member of a bucket is tied to the bucket's hub, the one of least content hash.

    Members of an earlier generation come first, so those among them are tied as if there were no later ones.

    Members that are not similar to that hub get the next of them as a hub, and so on up to `HUBS_PER_BUCKET`. So there
    are fewer edges than members, and which ones depends on the contents alone.

    Args:
        keys: uint64[members], this band's key of each document. hashes_M2: the halves of its content hash, no two
            equal. signature_MH: its signature. generation_M: the generation it came with; None where there is one.

    Returns:
        int64[edges, 2], positions in `keys`, the hub first.
    """
    generation = np.zeros(len(keys), np.int8) if generation_M is None else generation_M
    left = np.lexsort((hashes_M2[:, 1], hashes_M2[:, 0], generation, keys))  # not yet tied members, bucket by bucket
    edges = [np.zeros((0, 2), np.int64)]
    for _ in range(HUBS_PER_BUCKET):
        if not len(left):
            break
        is_hub = np.concatenate([[True], keys[left[1:]] != keys[left[:-1]]])
        hub = left[is_hub][np.cumsum(is_hub) - 1][~is_hub]
        left = left[~is_hub]
        similar = agreement(signature_MH, hub, left) >= threshold
        edges.append(np.stack([hub[similar], left[similar]], axis=1))
        left = left[~similar]
    return np.concatenate(edges)


def agreement(signature_DH: U32, left: I64, right: I64) -> npt.NDArray[np.float64]:
    """Share of equal hashes of each pair: the unbiased estimate of their shingle sets' Jaccard similarity."""
    result = np.empty(len(left), np.float64)
    for start in range(0, len(left), 1 << 16):  # bounds the gathered rows at about 60 MB
        part = slice(start, start + (1 << 16))
        result[part] = (signature_DH[left[part]] == signature_DH[right[part]]).mean(axis=1)
    return result


def tie(label_D: I64, edges: I64) -> I64:
    """`label_D` with the clusters at both ends of every edge made one; a label is the least number of its cluster.

    Called for one batch of edges after another, in any order, it gives the connected components of all of them.
    """
    left, right = label_D[edges[:, 0]], label_D[edges[:, 1]]
    apart = left != right
    if not apart.any():
        return label_D
    documents = len(label_D)
    assert documents < 1 << 31, "scipy numbers nodes in 32 bits"
    ends = (left[apart].astype(np.int32), right[apart].astype(np.int32))
    del left, right
    graph = coo_array((np.ones(len(ends[0]), np.int8), ends), shape=(documents, documents)).tocsr()
    del ends
    count, component_D = connected_components(graph, directed=False)
    del graph
    least = np.empty(count, np.int64)
    least[component_D[::-1]] = np.arange(documents - 1, -1, -1)  # the least of each is written last
    return least[component_D[label_D]]


def clusters_of(label_D: I64, precedence: Iterable[npt.NDArray[np.int64] | U64]) -> Clusters:
    """The survivor and the size of every cluster of `label_D`.

    Args:
        precedence: columns by document number, the weightiest first; the least value survives. What no column decides
            goes to the least number. They are taken one after the other, so only one needs to be in memory.
    """
    documents = len(label_D)
    best_D = np.ones(documents, np.bool_)  # of its cluster, by the columns so far
    for column_D in precedence:
        least_D = np.full(documents, np.iinfo(column_D.dtype).max, column_D.dtype)  # by label
        np.minimum.at(least_D, label_D[best_D], column_D[best_D])
        best_D &= column_D == least_D[label_D]
        del least_D
    best = np.flatnonzero(best_D)[::-1]
    survivor_D = np.full(documents, -1, np.int64)  # by label
    survivor_D[label_D[best]] = best  # the least number is written last
    size_D = np.bincount(label_D, minlength=documents)
    return Clusters(survivor_D[label_D], size_D[label_D].astype(np.int64, copy=False))
