"""Edges within buckets: against plain Python, whatever is in memory at a time, and how much is compared."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cert_ray.dedup import buckets
from cert_ray.dedup.buckets import HUBS_PER_BUCKET, TIES, bucket_edges, first_of, joined, second_of, sharing
from cert_ray.dedup.minhash import BINS, U8, U32, U64

numbers = st.integers(0, 2**32 - 1)


def places_of(keys: list[int]) -> U64:
    """Of documents that are ranked as they stand."""
    return sharing(joined(np.array(keys, np.uint32), np.arange(len(keys), dtype=np.uint32)))


def pairs(edges: U64) -> list[tuple[int, int]]:
    return list(zip(first_of(edges).tolist(), second_of(edges).tolist(), strict=True))


@given(st.lists(st.tuples(numbers, numbers)))
def test_joined_numbers_come_apart_and_sort_as_pairs(drawn: list[tuple[int, int]]) -> None:
    ends = np.array(drawn, np.uint32).reshape(-1, 2)
    assert pairs(np.sort(joined(ends[:, 0], ends[:, 1]))) == sorted(drawn)


@given(st.lists(st.integers(0, 5), max_size=40))
def test_sharing_finds_every_key_that_is_there_twice_bucket_by_bucket(keys: list[int]) -> None:
    expected = sorted((key, rank) for rank, key in enumerate(keys) if keys.count(key) > 1)
    assert pairs(places_of(keys)) == expected


def edges_by_hand(keys: list[int], signature_MK: U8, threshold: float) -> set[tuple[int, int]]:
    """Of every bucket, one document after the other: its hubs are those that found fewer than `TIES` hubs alike."""
    found = set()
    for key in set(keys):
        hubs: list[int] = []
        for rank in (rank for rank, value in enumerate(keys) if value == key):
            ties = 0
            for hub in hubs:
                if ties < TIES and (signature_MK[hub] == signature_MK[rank]).mean() >= threshold:
                    ties += 1
                    found.add((hub, rank))
            if ties < TIES and len(hubs) < HUBS_PER_BUCKET:
                hubs.append(rank)
    return found


members = st.lists(st.tuples(st.integers(0, 2), st.lists(st.integers(0, 1), min_size=8, max_size=8)), max_size=40)


@given(members, st.integers(1, 45))
def test_edges_are_those_of_plain_python_whatever_is_in_memory(
    drawn: list[tuple[int, list[int]]], at_a_time: int
) -> None:
    keys = [key for key, _ in drawn]
    eighths = np.array([bits for _, bits in drawn], np.uint8).reshape(-1, 8)
    signature_MK = np.repeat(eighths, BINS // 8, axis=1)
    held = []

    def read(ranks: U32) -> U8:
        held.append(len(ranks))
        return signature_MK[ranks]

    found = bucket_edges(places_of(keys), read, 0.74, at_a_time)
    assert pairs(found) == sorted(edges_by_hand(keys, signature_MK, 0.75))  # chance, 1 in 255, is taken off
    assert max(held, default=0) <= at_a_time + HUBS_PER_BUCKET


class Comparisons:
    """Counts the pairs that are compared."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pairs = self.most_rows = 0
        self._measure = buckets.agreement
        monkeypatch.setattr(buckets, "agreement", self._compare)

    def _compare(self, signature_DK: U8, left: Any, right: Any) -> Any:
        self.pairs += len(left)
        self.most_rows = max(self.most_rows, len(signature_DK))
        return self._measure(signature_DK, left, right)


@pytest.mark.parametrize(("strangers", "count"), [(1, 100_000), (HUBS_PER_BUCKET - TIES, 20_000)])
def test_bucket_of_a_hundred_thousand_costs_a_few_comparisons_a_member(
    strangers: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Near-equal members behind `strangers` that match nobody are all found, with a bounded number in memory."""
    comparisons = Comparisons(monkeypatch)

    def read(ranks: U32) -> U8:
        signature_MK = np.zeros((len(ranks), BINS), np.uint8)
        signature_MK[ranks < strangers] = 1 + ranks[ranks < strangers, None]
        return signature_MK

    found = bucket_edges(places_of([7] * count), read, 0.7, at_a_time=10_000)
    hub, member = first_of(found), second_of(found)
    assert len(found) == TIES * (count - strangers) - 3  # the first has no tie, the second one
    assert set(hub.tolist()) == {strangers, strangers + 1}
    assert len(np.unique(member)) == count - strangers - 1
    assert comparisons.most_rows <= 10_000 + HUBS_PER_BUCKET
    hubs_again = (count // 10_000) * HUBS_PER_BUCKET**2
    assert comparisons.pairs <= (strangers + TIES) * count + hubs_again


def test_bucket_where_nobody_matches_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    count = 5_000
    comparisons = Comparisons(monkeypatch)
    signature_MK = np.random.default_rng(0).integers(0, 255, (count, BINS)).astype(np.uint8)
    assert len(bucket_edges(places_of([0] * count), signature_MK.__getitem__, 0.7, count)) == 0
    assert comparisons.pairs <= HUBS_PER_BUCKET * count
