"""Counts of a shard, and their sums: against hand counts, `re` and numpy."""

from __future__ import annotations

import re

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from cert_ray.dataset.statistics import (
    Statistics,
    bin_of,
    largest_clusters,
    lexical_tokens,
    lower_edge,
    median,
    shard_statistics,
)
from tests.dataset.builders import annotated_rows

TOKEN = re.compile(rb"[\w\x80-\xff]+|[^\w\x80-\xff\x00-\x20\x7f]")


def test_lexical_tokens_by_hand() -> None:
    texts = ["x = 1\n", "df.read_csv('a b')  # naïve\n", "\n", "a", "b"]
    assert lexical_tokens(pa.chunked_array([texts[:2], texts[2:]])).tolist() == [3, 11, 0, 1, 1]


@given(st.lists(st.text(max_size=30), max_size=6), st.booleans())
def test_lexical_tokens_equal_a_regular_expression(texts: list[str], wide: bool) -> None:
    column = pa.chunked_array([pa.array(texts, pa.large_string() if wide else pa.string())])
    assert lexical_tokens(column).tolist() == [len(TOKEN.findall(text.encode())) for text in texts]


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=50))
def test_median_of_the_bins_is_near_the_median(values: list[int]) -> None:
    numbers, counts = np.unique(bin_of(np.array(values)), return_counts=True)
    assert all(lower_edge(n) <= v * 1.0001 for n, v in zip(bin_of(np.array(values)).tolist(), values, strict=True))
    exact = sorted(values)[(len(values) - 1) // 2]
    assert abs(median(dict(zip(numbers.tolist(), counts.tolist(), strict=True))) / exact - 1) <= 0.022 + 0.5 / exact


def test_shards_add_up_to_the_whole() -> None:
    rows = annotated_rows(["import numpy\nx = 'a'\n" * (i + 1) for i in range(7)], cluster_size=[1, 1, 2, 9, 1, 1, 2])
    whole, parts = Statistics(), Statistics()
    whole.add(shard_statistics(rows))
    for part in (rows.slice(0, 3), rows.slice(3, 0), rows.slice(3)):
        parts.add(shard_statistics(part))
    assert parts == whole
    assert whole.cluster_sizes == {1: 4, 2: 2, 9: 1}
    assert whole.libraries == {"numpy": 7}
    assert whole.placeholders == {"string": 28}
    assert whole.tokens_total == sum(2 + 5 for i in range(7) for _ in range(i + 1))


def test_largest_clusters_are_named_by_their_files_wherever_these_lie() -> None:
    def shard(paths: list[str]) -> pa.Table:
        return pa.table({"path": paths, "repository": pa.nulls(len(paths), pa.string()), "content": paths})

    def clusters(keep: list[bool], survivor: list[int], size: list[int]) -> pa.Table:
        return pa.table({"keep": keep, "survivor": survivor, "cluster_size": pa.array(size, pa.int32())})

    statistics = Statistics()
    first = largest_clusters(shard(["a", "b", "c"]), clusters([True, False, True], [0, 3, 2], [1, 4, 2]))
    second = largest_clusters(
        shard(["d", "e", "f", "g"]), clusters([True, False, False, False], [3, 3, 3, 2], [4, 4, 4, 2])
    )
    rows = annotated_rows([])
    for samples in (first, second):
        statistics.add(shard_statistics(rows, samples))
    assert [(c.size, c.kept, c.copies) for c in statistics.largest_clusters] == [
        (4, "d", ("b", "e", "f")),
        (2, "c", ("g",)),
    ]


def test_memory_of_the_sum_does_not_grow_with_clusters() -> None:
    statistics, rows = Statistics(), annotated_rows([])
    for shard in range(400):
        samples = largest_clusters(
            pa.table({key: [f"{shard}/{i}" for i in range(20)] for key in ("path", "repository", "content")}),
            pa.table(
                {"keep": [True] * 20, "survivor": range(shard * 20, shard * 20 + 20), "cluster_size": range(2, 22)}
            ),
        )
        statistics.add(shard_statistics(rows, samples))
    assert len(statistics._clusters) < 1_000
    assert [cluster.survivor for cluster in statistics.largest_clusters] == [19 + 20 * shard for shard in range(10)]
