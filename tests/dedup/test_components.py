"""Clusters against brute force, and survivors under permutation."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from cert_ray.dedup.components import Clusters, candidate_edges, clusters_of, equal_edges, generations_of
from cert_ray.dedup.minhash import MinHashConfig, band_keys, signatures

CONFIG = MinHashConfig()


def cluster(texts: list[str], stars: list[int]) -> Clusters:
    signature_DH, has_shingle = signatures(pa.array(texts), CONFIG)
    keys = band_keys(signature_DH, CONFIG)
    members = np.flatnonzero(has_shingle)
    edges = [
        candidate_edges(keys[members, band], members, signature_DH, CONFIG.threshold) for band in range(CONFIG.bands)
    ]
    sizes = np.array([len(text) for text in texts])
    return clusters_of(len(texts), np.concatenate(edges), np.array(stars), sizes)


def family(seed: int, edits: int) -> str:
    words = [f"w{seed}_{index}" for index in range(400)]
    for edit in range(edits):
        words[edit * 7] = f"edit{edit}"
    return " ".join(words)


def test_near_copies_cluster_and_strangers_do_not() -> None:
    texts = [family(1, 0), family(2, 0), family(1, 3), family(1, 5), family(3, 0)]
    clusters = cluster(texts, [0, 0, 0, 9, 0])
    assert clusters.survivor_D.tolist() == [3, 1, 3, 3, 4]  # most stars survives
    assert clusters.size_D.tolist() == [3, 1, 3, 3, 1]


def test_survivor_does_not_depend_on_input_order() -> None:
    texts = [family(seed, edits) for seed in range(6) for edits in (0, 2, 4)]
    stars = [(7 * index) % 5 for index in range(len(texts))]
    kept = {texts[i] for i in np.flatnonzero(cluster(texts, stars).keep)}
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(len(texts))
        shuffled = cluster([texts[i] for i in order], [stars[i] for i in order])
        assert {texts[order[i]] for i in np.flatnonzero(shuffled.keep)} == kept
    assert len(kept) == 6


def test_equal_hashes_tie_to_the_smallest_number() -> None:
    hashes = np.array([b"b" * 16, b"a" * 16, b"b" * 16, b"b" * 16], "V16")
    assert sorted(map(tuple, equal_edges(hashes).tolist())) == [(0, 2), (0, 3)]


def test_dissimilar_hub_does_not_hide_its_bucket() -> None:
    signature_DH = np.zeros((3, CONFIG.hashes), np.uint32)
    signature_DH[0] = np.arange(CONFIG.hashes)
    edges = candidate_edges(np.zeros(3, np.uint64), np.arange(3), signature_DH, 0.7)
    assert edges.tolist() == [[1, 2]]


def test_no_documents_give_no_clusters() -> None:
    empty = np.zeros(0, np.int64)
    assert len(clusters_of(0, np.zeros((0, 2), np.int64), empty, empty).keep) == 0
    assert candidate_edges(np.zeros(0, np.uint64), empty, np.zeros((0, 112), np.uint32), 0.7).shape == (0, 2)


def test_a_later_generation_leaves_what_was_decided() -> None:
    # 0 and 1 are alike in the first generation, 2 is alone; the second brings 3, which joins all, and 4 and 5.
    edges = np.array([[0, 1], [0, 3], [2, 3], [4, 5]])
    stars = np.array([0, 1, 0, 9, 0, 0])
    sizes = np.full(6, 100)
    grown = generations_of([3, 6], edges, stars, sizes)
    assert grown.survivor_D.tolist() == [1, 1, 2, 1, 4, 4]
    assert grown.size_D.tolist()[:3] == [2, 2, 1]  # as they were: 3 is counted nowhere among the old
    assert grown.size_D.tolist()[4:] == [2, 2]
    first = clusters_of(3, edges[:1], stars[:3], sizes[:3])
    assert grown.survivor_D[:3].tolist() == first.survivor_D.tolist()
    assert clusters_of(6, edges, stars, sizes).survivor_D.tolist() == [3, 3, 3, 3, 4, 4]  # a rebuild
