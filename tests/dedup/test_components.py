"""Clusters against brute force, and hubs and survivors under permutation."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cert_ray.dedup import components
from cert_ray.dedup.components import HUBS_PER_BUCKET, candidate_edges, clusters_of, first_of_equal, sharing, tie
from cert_ray.dedup.minhash import I64, U64, MinHashConfig

CONFIG = MinHashConfig()


def halves(*values: int) -> U64:
    return np.array([[value, value] for value in values], np.uint64).reshape(-1, 2)


def components_of(documents: int, edges: list[tuple[int, int]]) -> list[int]:
    """The least number that each document reaches, by hand."""
    label = list(range(documents))
    for _ in range(documents):
        for left, right in edges:
            label[left] = label[right] = min(label[left], label[right])
    return label


edge_lists = st.integers(1, 30).flatmap(
    lambda documents: st.tuples(
        st.just(documents),
        st.lists(st.lists(st.tuples(*[st.integers(0, documents - 1)] * 2), max_size=20), max_size=4),
    )
)


@given(edge_lists)
def test_ties_in_any_order_are_the_components_of_all_edges(case: tuple[int, list[list[tuple[int, int]]]]) -> None:
    documents, batches = case
    expected = components_of(documents, [edge for batch in batches for edge in batch])
    for order in (batches, batches[::-1]):
        label_D: I64 = np.arange(documents)
        for batch in order:
            label_D = tie(label_D, np.array(batch, np.int64).reshape(-1, 2))
        assert label_D.tolist() == expected


@given(st.lists(st.integers(0, 5), max_size=40))
def test_sharing_finds_every_key_that_is_there_twice(keys: list[int]) -> None:
    found = sharing(np.array(keys, np.uint64))
    assert sorted(found.tolist()) == [position for position, key in enumerate(keys) if keys.count(key) > 1]
    values = [keys[position] for position in found]
    assert values == sorted(values)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), max_size=40))
def test_equal_hashes_tie_to_the_least_number(pairs: list[tuple[int, int]]) -> None:
    hashes_D2 = np.array(pairs, np.uint64).reshape(-1, 2)
    assert first_of_equal(hashes_D2).tolist() == [pairs.index(pair) for pair in pairs]


@given(st.lists(st.tuples(*[st.integers(0, 3)] * 4), min_size=1, max_size=30))
def test_survivor_is_the_first_by_every_column_in_turn(rows: list[tuple[int, int, int, int]]) -> None:
    cluster = [row[0] for row in rows]
    label_D = np.array([cluster.index(value) for value in cluster])
    columns = [np.array([row[column] for row in rows]) for column in (1, 2, 3)]
    clusters = clusters_of(label_D, iter(columns))
    for number, value in enumerate(cluster):
        members = [other for other, theirs in enumerate(cluster) if theirs == value]
        assert clusters.survivor_D[number] == min(members, key=lambda other: (*rows[other][1:], other))
        assert clusters.size_D[number] == len(members)


def test_hub_is_the_least_hash_wherever_it_stands() -> None:
    signature_MH = np.zeros((3, CONFIG.hashes), np.uint32)
    edges = candidate_edges(np.zeros(3, np.uint64), halves(9, 5, 7), signature_MH, 0.7)
    assert sorted(map(tuple, edges.tolist())) == [(1, 0), (1, 2)]


members = st.lists(st.tuples(st.integers(0, 1), st.lists(st.integers(0, 1), min_size=4, max_size=4)), max_size=12)


@given(members, st.randoms(use_true_random=False))
def test_edges_do_not_depend_on_the_order_of_members(drawn: list[tuple[int, list[int]]], random: Random) -> None:
    """Half of the hashes must agree here, so who is whose hub decides who is tied."""

    def edges(order: list[int]) -> set[tuple[int, int]]:
        keys = np.array([drawn[member][0] for member in order], np.uint64)
        signature_MH = np.array([drawn[member][1] for member in order], np.uint32).reshape(-1, 4)
        found = candidate_edges(keys, halves(*order), signature_MH, 0.5)
        return {(order[hub], order[spoke]) for hub, spoke in found.tolist()}

    order = list(range(len(drawn)))
    random.shuffle(order)
    assert edges(order) == edges(sorted(order))


def test_dissimilar_hub_does_not_hide_its_bucket() -> None:
    signature_MH = np.zeros((4, CONFIG.hashes), np.uint32)
    signature_MH[0] = np.arange(CONFIG.hashes)
    edges = candidate_edges(np.array([7, 7, 7, 8], np.uint64), halves(0, 1, 2, 3), signature_MH, 0.7)
    assert edges.tolist() == [[1, 2]]


@pytest.mark.parametrize("outliers", [0, 1, HUBS_PER_BUCKET - 1])
def test_bucket_of_a_hundred_thousand_costs_a_few_comparisons_a_member(
    outliers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Near-equal members behind `outliers` hubs that match nobody are all found, by fewer edges than members."""
    members = 100_000
    signature_MH = np.zeros((members, 8), np.uint32)
    signature_MH[:outliers] = np.arange(1, outliers + 1)[:, None]
    compared = []
    measure = components.agreement
    monkeypatch.setattr(components, "agreement", lambda *given: compared.append(len(given[1])) or measure(*given))
    edges = candidate_edges(
        np.zeros(members, np.uint64), np.repeat(np.arange(members, dtype=np.uint64)[:, None], 2, 1), signature_MH, 0.7
    )
    assert len(edges) == members - outliers - 1
    assert (edges[:, 0] == outliers).all()
    assert sum(compared) <= (outliers + 1) * members


def test_bucket_where_nobody_matches_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    members = 5_000
    signature_MH = np.repeat(np.arange(members, dtype=np.uint32)[:, None], 8, 1)
    compared = []
    measure = components.agreement
    monkeypatch.setattr(components, "agreement", lambda *given: compared.append(len(given[1])) or measure(*given))
    hashes_M2 = np.repeat(np.arange(members, dtype=np.uint64)[:, None], 2, 1)
    assert len(candidate_edges(np.zeros(members, np.uint64), hashes_M2, signature_MH, 0.7)) == 0
    assert sum(compared) <= HUBS_PER_BUCKET * members


def test_no_documents_give_no_clusters() -> None:
    empty: I64 = np.zeros(0, np.int64)
    assert len(clusters_of(tie(empty, np.zeros((0, 2), np.int64)), [empty]).keep) == 0
    assert first_of_equal(halves()).shape == (0,)
    assert candidate_edges(np.zeros(0, np.uint64), halves(), np.zeros((0, 112), np.uint32), 0.7).shape == (0, 2)
