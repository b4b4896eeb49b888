"""From equal keys to verified edges, with the signatures of a bounded number of documents in memory.

In: keys of documents, and their ranks, which come from contents; a better document has a lower rank. Out: edges between
ranks, the better document first. A bucket holds the documents with one key, in order of rank. Its first document is a
hub. Each later one is compared with the bucket's hubs until `TIES` of them are similar; if fewer are, it becomes a hub
itself, up to `HUBS_PER_BUCKET` hubs. So edges depend only on contents, a bucket of equal texts has at most `TIES` edges
per document whatever its size, and one without similar documents costs `HUBS_PER_BUCKET` comparisons per document.

Pairs of 32-bit numbers (key and rank, rank and rank) are joined into 64 bits, the first high, so they sort as pairs.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from cert_ray.dedup.minhash import I64, U8, U32, U64, agreement

HUBS_PER_BUCKET = 32  # limits the comparisons per document in a bucket; assumed
# The second tie is for a hub that is itself dropped, for a better document that its members do not resemble.
TIES = 2

_HALF = np.uint64(32)


def joined(first: U32, second: U32) -> U64:
    """Both numbers in one: `first` in the high 32 bits."""
    pairs = first.astype(np.uint64)
    pairs <<= _HALF
    pairs |= second
    return pairs


def first_of(pairs: U64) -> U32:
    """The first of the numbers that were joined."""
    return (pairs >> _HALF).astype(np.uint32)


def second_of(pairs: U64) -> U32:
    """The second of the numbers that were joined."""
    return pairs.astype(np.uint32)


def sharing(places: U64) -> U64:
    """Those of `places` (key and rank) whose key occurs more than once, sorted. Sorts `places` in place."""
    places.sort()
    equal = np.zeros(len(places) + 1, bool)  # to the previous place
    if len(places):
        keys = first_of(places)
        np.equal(keys[1:], keys[:-1], out=equal[1:-1])
    return places[equal[1:] | equal[:-1]]


def bucket_edges(places: U64, read_signatures: Callable[[U32], U8], threshold: float, at_a_time: int) -> U64:
    """Verified edges within the buckets of `places`.

    Args:
        places: key and rank of every document, as `sharing` returns them.
        read_signatures: returns the signatures of the documents with the given ranks, one row each.
        threshold: the lowest estimated Jaccard similarity of an edge.
        at_a_time: signatures in memory, besides those of one bucket's hubs.

    Returns:
        Ranks of both ends, the better one first; sorted, each edge once, independent of `at_a_time`.
    """
    edges = np.zeros(0, np.uint64)
    hubs = places[:0]  # of the bucket that continues in the next part, to be compared with the rest of it
    for start in range(0, len(places), at_a_time):
        part = np.concatenate([hubs, places[start : start + at_a_time]])
        ranks = second_of(part)
        found, is_hub = _similar_to_hubs(first_of(part), read_signatures(ranks), threshold)
        edges = np.unique(np.concatenate([edges, *(joined(ranks[hub], ranks[member]) for hub, member in found)]))
        goes_on = first_of(part) == first_of(places[start + at_a_time : start + at_a_time + 1]).max(initial=0)
        hubs = part[is_hub & goes_on]
    return edges


def _similar_to_hubs(
    keys: U32, signature_MK: U8, threshold: float
) -> tuple[list[tuple[I64, I64]], npt.NDArray[np.bool_]]:
    """Positions of hubs and of members similar to them (the nth hubs of all buckets at once), and who is a hub."""
    found, is_hub_M, ties_M = [], np.zeros(len(keys), bool), np.zeros(len(keys), np.int8)
    left = np.arange(len(keys))  # positions with too few ties so far, bucket by bucket
    for _ in range(HUBS_PER_BUCKET):
        if not len(left):
            break
        first = np.concatenate([[True], keys[left[1:]] != keys[left[:-1]]])
        is_hub_M[left[first]] = True
        hub, member = left[first][np.cumsum(first) - 1][~first], left[~first]
        similar = agreement(signature_MK, hub, member) >= threshold
        found.append((hub[similar], member[similar]))
        ties_M[member[similar]] += 1
        left = member[ties_M[member] < TIES]
    return found, is_hub_M
