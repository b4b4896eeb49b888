"""Decides which documents stay: the best of equal contents, then each that resembles no better document that stays.

In: numpy columns by document number, then verified edges between ranks. Out: the survivor of each document, and how
many documents it stands for. Numbers only name documents and break ties between equal contents. Ranks come from what
documents contain, so permuting the input gives the same clusters and the same surviving contents.

A document is dropped exactly when an edge ties it to a better one that stays. So each dropped document resembles its
survivor, however long the chains in a group of similar files, and no edge has two survivors. (This is the first maximal
independent set by rank. Dropped members of a group link no others.) Memory is a few dozen bytes per document, plus the
edges that the first pass leaves undecided.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cert_ray.dedup.buckets import first_of, joined, second_of
from cert_ray.dedup.minhash import I64, U32, U64

Bits = npt.NDArray[np.bool_]

UNRANKED = np.uint32(0xFFFFFFFF)  # a copy of another document, or too short to be compared

# The bits of a precedence, high to low. A lower precedence is better.
_GENERATION_BITS, _STARS_BITS, _SIZE_BITS = 12, 20, 32
MOST_GENERATIONS = 1 << _GENERATION_BITS


@dataclass(frozen=True, slots=True)
class Clusters:
    """For every document, the number of its survivor, and how many documents that one stands for (itself included)."""

    survivor_D: I64
    size_D: I64

    @property
    def keep(self) -> Bits:
        """Which documents survive."""
        return np.equal(self.survivor_D, np.arange(len(self.survivor_D)))


@dataclass(frozen=True, slots=True)
class Documents:
    """What decides between documents, by number: both halves of the content hash (high first), precedence, shingles."""

    hashes_D2: U64
    precedence_D: U64
    has_shingle_D: Bits


@dataclass(frozen=True, slots=True)
class Ranking:
    """Which document stands for equal contents, and which of similar documents is preferred."""

    first_D: I64  # number of the best document with the same content
    rank_D: U32  # from 0; `UNRANKED` without a rank
    number_R: U32  # document number by rank


def precedence(stars_D: npt.NDArray[np.integer], size_D: npt.NDArray[np.integer], ends: Sequence[int]) -> U64:
    """One number per document. It is lower for an earlier generation, then for more stars, then for more bytes.

    More than a million stars count as a million.

    Args:
        ends: documents after each generation.
    """
    assert len(ends) <= MOST_GENERATIONS, "more generations than bits for them"
    before: U64 = np.uint64((1 << _STARS_BITS) - 1) - np.clip(stars_D, 0, (1 << _STARS_BITS) - 1).astype(np.uint64)
    before <<= np.uint64(_SIZE_BITS)
    before |= np.uint64((1 << _SIZE_BITS) - 1) - size_D.astype(np.uint64)
    for end in ends[:-1]:
        before[end:] += np.uint64(1 << (_STARS_BITS + _SIZE_BITS))
    return before


def in_one_generation(documents: Documents) -> Documents:
    """The same documents as if they had all come in one generation."""
    bits = np.uint64((1 << (_STARS_BITS + _SIZE_BITS)) - 1)
    return dataclasses.replace(documents, precedence_D=documents.precedence_D & bits)


def best_of_equal(documents: Documents) -> I64:
    """For every document, the one with the same content hash and lowest precedence; of several, the lowest number."""
    hashes_D2 = documents.hashes_D2
    first_D = np.arange(len(hashes_D2))
    order = np.argsort(hashes_D2[:, 0])
    ordered = hashes_D2[order, 0]
    equal = np.zeros(len(order) + 1, bool)  # to the previous one
    equal[1 : len(order)] = ordered[1:] == ordered[:-1]
    members = order[equal[1:] | equal[:-1]]
    del order, ordered
    columns = (members, documents.precedence_D[members], hashes_D2[members, 1], hashes_D2[members, 0])
    members = members[np.lexsort(columns)]
    new = np.concatenate([[True], (hashes_D2[members[1:]] != hashes_D2[members[:-1]]).any(axis=1)])[: len(members)]
    first_D[members] = members[new][np.cumsum(new) - 1]
    return first_D


def rank_documents(documents: Documents, first_D: I64) -> Ranking:
    """Ranks by precedence, then by content hash. Of equal contents, only the best document has a rank.

    Args:
        first_D: what `best_of_equal` returns.
    """
    count = len(first_D)
    assert count < int(UNRANKED), "documents are numbered in 32 bits"
    compared = np.flatnonzero(documents.has_shingle_D & (first_D == np.arange(count))).astype(np.uint32)
    # The high half of the hash suffices: different contents of equal precedence do not share it in practice.
    order = np.lexsort((documents.hashes_D2[compared, 0], documents.precedence_D[compared]))
    number_R = compared[order]
    rank_D = np.full(count, UNRANKED, np.uint32)
    rank_D[number_R] = np.arange(len(number_R), dtype=np.uint32)
    return Ranking(first_D, rank_D, number_R)


def choose_survivors(batches: Iterable[U64], documents: int) -> U32:
    """By rank, the rank of the best survivor that an edge ties a document to; its own rank if it survives.

    Args:
        batches: edges, the better rank first, in any order, possibly repeated; iterated over four times.
        documents: how many ranks there are.
    """
    stays_R = np.ones(documents, bool)
    for edges in batches:
        stays_R[second_of(edges)] = False  # not yet: all its better neighbours may be dropped
    dropped_R = np.zeros(documents, bool)
    for edges in batches:
        dropped_R[second_of(edges)[stays_R[first_of(edges)]]] = True
    undecided = np.zeros(0, np.uint64)  # few edges: most documents fall to one without better neighbours
    for edges in batches:
        undecided = np.unique(np.concatenate([undecided, edges[_is_open(edges, stays_R, dropped_R)]]))
    _decide(undecided, stays_R, dropped_R)
    survivor_R = np.full(documents, UNRANKED, np.uint32)
    survivor_R[stays_R] = np.flatnonzero(stays_R)
    for edges in batches:
        ties = edges[stays_R[first_of(edges)]]
        np.minimum.at(survivor_R, second_of(ties), first_of(ties))
    return survivor_R


def _is_open(edges: U64, stays_R: Bits, dropped_R: Bits) -> Bits:
    """Whether the fate of an edge's other end still depends on the better end."""
    better = first_of(edges)
    return ~(stays_R[better] | dropped_R[better] | dropped_R[second_of(edges)])


def _decide(edges: U64, stays_R: Bits, dropped_R: Bits) -> None:
    """Decide, in place, the documents that neither stay nor are dropped yet; `edges` are the open ones among them."""
    waits_R = np.zeros(len(stays_R), bool)
    left = np.flatnonzero(~(stays_R | dropped_R))
    while len(left):
        better, other = first_of(edges), second_of(edges)
        waits_R[other] = True
        stays_R[left[~waits_R[left]]] = True  # at least the best one
        waits_R[other] = False
        dropped_R[other[stays_R[better]]] = True
        left = left[~(stays_R[left] | dropped_R[left])]
        edges = edges[_is_open(edges, stays_R, dropped_R)]


def clusters_of(ranking: Ranking, survivor_R: U32, ends: Sequence[int]) -> Clusters:
    """Survivors and cluster sizes by document number. Sizes in a generation count the documents up to its end."""
    best_D = ranking.rank_D[ranking.first_D]
    ranked = best_D != UNRANKED
    survivor_D = ranking.first_D.copy()
    survivor_D[ranked] = ranking.number_R[survivor_R[best_D[ranked]]]
    size_D = np.empty(len(survivor_D), np.int64)
    start = 0
    for end in ends:
        count = np.bincount(survivor_D[:end], minlength=1)
        size_D[start:end] = count[survivor_D[start:end]]
        start = end
    return Clusters(survivor_D, size_D)


def reranked(edges: U64, rank_R: U32) -> U64:
    """`edges` with the ranks `rank_R` instead, the better one first again."""
    one, other = rank_R[first_of(edges)], rank_R[second_of(edges)]
    return joined(np.minimum(one, other), np.maximum(one, other))
