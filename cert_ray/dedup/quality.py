"""Near-dedup against brute force: recall and precision of its decisions on a seeded sample, with intervals.

In: the finished clusters, and the documents' shards. Out: a mapping for the manifest's notes, which the card shows.

The sample is drawn by content hash: about half of it are whole clusters, half any documents, no two with equal
content. Every pair in it is judged by the exact Jaccard similarity of the two shingle sets, hashed to 64 bits. A pair
is *similar* from the threshold on, and *found* when at most one of its documents stays.

    recall = found and similar pairs / similar pairs
    precision = dropped documents that are similar to their survivor / dropped documents

A corpus no larger than the sample is judged whole. In a larger one, similar documents that dedup did not tie are seldom
sampled together, so recall is an upper estimate; `uniform_similar_pairs` and `uniform_found_similar_pairs` count only
the pairs that were not drawn as clusters. Intervals are Wilson's, as if pairs were independent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pydantic
from scipy.sparse import csr_array

from cert_ray import storage
from cert_ray.config import Config
from cert_ray.dedup.contents import VERB, Originals, texts_at
from cert_ray.dedup.decisions import Clusters
from cert_ray.dedup.minhash import I64, MinHashConfig, shingle_hashes
from cert_ray.shards.units import damage_named

_BLOCK_ROWS = 256  # of the sample, compared with all others at a time: limits the products in memory


class QualityConfig(Config):
    """How much of the corpus near-dedup is measured on; with these limits it takes seconds on any corpus."""

    documents: int = pydantic.Field(2_000, ge=2)  # assumed: two million pairs
    cluster_documents: int = pydantic.Field(32, ge=2)  # at most, of one cluster, so that none fills the sample; assumed
    sample_bytes: int = pydantic.Field(64 << 20, ge=1)  # at most, of text; assumed: 32 kB per document
    shards: int = pydantic.Field(32, ge=1)  # at most, to read; assumed: 1 GB of text
    seed: int = pydantic.Field(1, ge=0)


@dataclass(frozen=True, slots=True)
class _Sample:
    """Documents to compare, in the order of their numbers."""

    numbers: I64
    survivor: I64  # the position of each one's survivor in the sample; -1 if that was not drawn
    uniform: npt.NDArray[np.bool_]  # drawn regardless of its cluster


def measure_quality(
    documents: str,
    shards: Sequence[str],
    rows: Sequence[int],
    clusters: Clusters,
    minhash: MinHashConfig,
    config: QualityConfig,
    originals: Originals | None = None,
) -> dict[str, Any]:
    """Recall and precision of `clusters` on a sample; each is None if there was nothing to judge.

    Returns:
        Counts of documents and pairs, and `recall` and `precision`, each with `_low` and `_high` of its 95% interval.

    Raises:
        ShardCorruptError: when a shard of the sample is damaged.
        InputError: as `contents.read_contents`.
    """
    firsts = np.concatenate([[0], np.cumsum(rows, dtype=np.int64)])
    chosen = _choose_shards(firsts, clusters, config)
    sample = _draw(documents, shards, firsts, chosen, clusters, config)
    texts = _texts(documents, shards, firsts, sample.numbers, originals)
    sets = _shingle_sets(texts, minhash.shingle_tokens)
    counts = _count_pairs(sets, sample, minhash.threshold)
    return {
        "documents": len(sample.numbers),
        "uniform_documents": int(sample.uniform.sum()),
        "threshold": minhash.threshold,
        **counts,
        **_share("recall", counts["found_similar_pairs"], counts["similar_pairs"]),
        **_share("precision", counts["dropped_like_survivor"], counts["dropped_documents"]),
    }


def _share(name: str, hits: int, total: int) -> dict[str, float | None]:
    if not total:
        return {name: None, f"{name}_low": None, f"{name}_high": None}
    from scipy import stats  # takes half a second, which every worker of every stage would pay

    interval = stats.binomtest(hits, total).proportion_ci(0.95, method="wilson")
    return {name: hits / total, f"{name}_low": float(interval.low), f"{name}_high": float(interval.high)}


def _count_pairs(sets: csr_array, sample: _Sample, threshold: float) -> dict[str, int]:
    """Counts of pairs of the sample (similar, found), the same among its uniform documents, and of drops (correct)."""
    names = ("similar_pairs", "found_similar_pairs", "uniform_similar_pairs", "uniform_found_similar_pairs")
    counts = dict.fromkeys([*names, "dropped_documents", "dropped_like_survivor"], 0)
    sizes, all_rows = np.diff(sets.indptr), np.arange(len(sample.numbers))
    stays = sample.survivor == all_rows
    for first in range(0, len(sizes), _BLOCK_ROWS):
        block = slice(first, min(first + _BLOCK_ROWS, len(sizes)))
        rows = all_rows[block]
        common = (sets[block] @ sets.T).toarray()
        union = np.maximum(sizes[block, None] + sizes[None, :] - common, 1)
        alike = common / union >= threshold
        similar = alike & (all_rows[None, :] > rows[:, None])  # each pair once
        found = similar & ~(stays[block, None] & stays[None, :])
        uniform = sample.uniform[block, None] & sample.uniform[None, :]
        for name, pairs in zip(names, (similar, found, similar & uniform, found & uniform), strict=True):
            counts[name] += int(pairs.sum())
        judged = np.flatnonzero(~stays[block] & (sample.survivor[block] >= 0))
        counts["dropped_documents"] += len(judged)
        counts["dropped_like_survivor"] += int(alike[judged, sample.survivor[block][judged]].sum())
    return counts


def _shingle_sets(texts: Iterator[str], shingle_tokens: int) -> csr_array:
    """One row per text, one column per shingle that any of them holds."""
    sets = []
    for text in texts:
        buffer = np.frombuffer(text.encode(), np.uint8)
        hashes, _ = shingle_hashes(buffer, np.array([0, len(buffer)]), shingle_tokens)
        sets.append(np.unique(hashes))
    _, columns = np.unique(np.concatenate([np.zeros(0, np.uint64), *sets]), return_inverse=True)
    starts = np.concatenate([[0], np.cumsum([len(hashes) for hashes in sets], dtype=np.int64)])
    shape = (len(sets), int(columns.max(initial=-1)) + 1)
    return csr_array((np.ones(len(columns), np.int32), columns, starts), shape=shape)


def _choose_shards(firsts: I64, clusters: Clusters, config: QualityConfig) -> list[int]:
    """At most `config.shards` of the shards: some random ones, and those that hold the rest of their clusters."""
    count = len(firsts) - 1
    if count <= config.shards:
        return list(range(count))
    generator = np.random.default_rng(config.seed)
    chosen = set(generator.permutation(count)[: max(1, config.shards // 4)].tolist())
    touched = np.zeros(len(clusters.survivor_D), bool)  # by survivor: clusters with members in the chosen shards
    for shard in chosen:
        touched[clusters.survivor_D[firsts[shard] : firsts[shard + 1]]] = True
    touched &= clusters.size_D > 1
    members = np.flatnonzero(touched[clusters.survivor_D])
    members = members[np.argsort(clusters.survivor_D[members], kind="stable")]
    shard_of = np.searchsorted(firsts, members, side="right") - 1
    borders = np.flatnonzero(np.diff(clusters.survivor_D[members])) + 1
    families = np.split(shard_of, borders)
    for index in generator.permutation(len(families))[: config.documents]:
        more = chosen | set(families[index].tolist())
        if len(more) <= config.shards:
            chosen = more
    return sorted(chosen)


def _draw(
    documents: str, shards: Sequence[str], firsts: I64, chosen: list[int], clusters: Clusters, config: QualityConfig
) -> _Sample:
    """Draw half of the documents as clusters, ordered by their lowest hash, the others ordered by their own hash."""
    numbers, ranks, sizes = [np.zeros(0, np.int64)], [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
    for shard in chosen:
        with damage_named(documents, shards[shard], VERB):
            url = storage.join(documents, f"{shards[shard]}.parquet")
            table = storage.read_parquet(url, ["content_hash", "size_bytes"], use_threads=False)
        numbers.append(np.arange(firsts[shard], firsts[shard] + len(table)))
        sizes.append(table.column("size_bytes").to_numpy().astype(np.int64))
        hashes = np.frombuffer(b"".join(table.column("content_hash").to_pylist()), ">u8")
        ranks.append(hashes[::2].astype(np.uint64))
    scramble = np.random.default_rng(config.seed).integers(1 << 62, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    number, size = np.concatenate(numbers), np.concatenate(sizes)
    best = np.argsort(clusters.survivor_D[number] != number, kind="stable")  # of equal contents the survivor first
    rank, first = np.unique(np.concatenate(ranks)[best] * scramble, return_index=True)  # ascending, and no copies
    number, size = number[best][first], size[best][first]
    survivor = clusters.survivor_D[number]
    several = np.zeros(len(clusters.survivor_D), bool)  # by survivor: sizes of an earlier generation omit later copies
    several[survivor[clusters.size_D[number] > 1]] = True
    tied = np.flatnonzero(several[survivor])
    whole = tied[_whole_clusters(survivor[tied], (number == survivor)[tied], config.cluster_documents)]
    whole = whole[: config.documents // 2]
    whole = whole[np.cumsum(size[whole]) <= config.sample_bytes // 2]
    further = ~np.isin(np.arange(len(rank)), whole)
    uniform = (np.cumsum(further) <= config.documents - len(whole)) & (np.cumsum(size) <= config.sample_bytes // 2)
    taken = np.union1d(whole, np.flatnonzero(uniform))
    taken = taken[np.argsort(number[taken])]
    place = np.searchsorted(number[taken], survivor[taken])
    drawn = number[taken][np.minimum(place, len(taken) - 1)] == survivor[taken]
    return _Sample(number[taken], np.where(drawn, place, -1), uniform[taken])


def _whole_clusters(cluster: I64, stays: npt.NDArray[np.bool_], most: int) -> I64:
    """Positions whose cluster occurs more than once, cluster by cluster, at most `most` of each, survivors first."""
    _, first, inverse, count = np.unique(cluster, return_index=True, return_inverse=True, return_counts=True)
    order = np.lexsort((np.arange(len(cluster)), ~stays, first[inverse]))  # clusters by their first position
    order = order[count[inverse[order]] > 1]
    starts = np.flatnonzero(np.concatenate([[True], np.diff(inverse[order]) != 0])[: len(order)])
    place = np.arange(len(order)) - np.repeat(starts, np.diff(np.append(starts, len(order))))
    return order[place < most]


def _texts(
    documents: str, shards: Sequence[str], firsts: I64, numbers: I64, originals: Originals | None
) -> Iterator[str]:
    """The content of each of `numbers` (sorted), with part of a shard in memory at a time."""
    for shard in np.unique(np.searchsorted(firsts, numbers, side="right") - 1):
        wanted = numbers[slice(*np.searchsorted(numbers, firsts[shard : shard + 2]))] - firsts[shard]
        yield from texts_at(documents, shards[shard], wanted, originals)
