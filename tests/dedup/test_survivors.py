"""Dedup over folders: near copies, permutations of the input, and a bucket of 100,000."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from random import Random

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cert_ray.dedup import survivors
from cert_ray.dedup.buckets import TIES
from cert_ray.dedup.minhash import MinHashConfig
from tests.dedup.builders import Deduplicated, deduplicate_in_process

CONFIG = MinHashConfig()


def family(seed: int, edits: int) -> str:
    """A text of its own for each `seed`; those of one seed are near copies, borderline from about 20 edits on."""
    words = [f"w{seed}_{index}" for index in range(400)]
    for edit in range(edits):
        words[edit * 7] = f"edit{edit}"
    return " ".join(words)


def run(texts: list[str], stars: list[int | None], shard_rows: int = 4, config: MinHashConfig = CONFIG) -> Deduplicated:
    with tempfile.TemporaryDirectory() as folder:
        return deduplicate_in_process(Path(folder), texts, stars, config, shard_rows)


def kept(texts: list[str], result: Deduplicated) -> set[str]:
    return {texts[number] for number in np.flatnonzero(result.clusters.keep)}


def clustering(texts: list[str], result: Deduplicated) -> set[frozenset[str]]:
    groups: dict[int, set[str]] = {}
    for text, survivor in zip(texts, result.clusters.survivor_D.tolist(), strict=True):
        groups.setdefault(survivor, set()).add(text)
    return {frozenset(group) for group in groups.values()}


def test_near_copies_cluster_and_strangers_do_not() -> None:
    texts = [family(1, 0), family(2, 0), family(1, 3), family(1, 5), family(3, 0)]
    clusters = run(texts, [0, None, 0, 9, 0]).clusters
    assert clusters.survivor_D.tolist() == [3, 1, 3, 3, 4]  # most stars survives
    assert clusters.size_D.tolist() == [3, 1, 3, 3, 1]


def chain(links: int, step: int = 20) -> list[str]:
    """Texts of 400 words, each an edit of the one before: what is up to three edits apart is alike."""
    words = [f"w{index}" for index in range(400)]
    texts = [" ".join(words)]
    for link in range(1, links):
        words[(link - 1) * step : link * step] = [f"x{link}_{index}" for index in range(step)]
        texts.append(" ".join(words))
    return texts


def jaccard(one: str, other: str) -> float:
    left, right = ({tuple(words[i : i + 5]) for i in range(396)} for words in (one.split(), other.split()))
    return len(left & right) / len(left | right)


def test_a_chain_is_no_cluster_and_every_drop_resembles_its_survivor() -> None:
    texts = chain(12)
    clusters = run(texts, [0] * len(texts)).clusters
    for number, survivor in enumerate(clusters.survivor_D.tolist()):
        assert jaccard(texts[number], texts[survivor]) > CONFIG.threshold - 0.06  # three standard errors
    stays = np.flatnonzero(clusters.keep).tolist()
    assert 3 <= len(stays) <= 6
    assert max(jaccard(texts[one], texts[other]) for one, other in itertools.combinations(stays, 2)) < 0.76


@settings(max_examples=6)
@given(st.integers(1, 30), st.integers(1, 12))
def test_the_outcome_does_not_depend_on_what_is_in_memory(keys: int, held: int) -> None:
    """Ranges of keys, and signatures from a temporary file, give the clusters of one task per few bands."""
    texts = [*chain(8), *(family(seed, edits) for seed in (1, 2) for edits in (0, 3, 18, 24))]
    stars: list[int | None] = [0] * len(texts)
    bounded = run(texts, stars, config=MinHashConfig(bands=8, keys_in_memory=keys, signatures_in_memory=held))
    plain = run(texts, stars, config=MinHashConfig(bands=8))
    assert bounded.clusters.survivor_D.tolist() == plain.clusters.survivor_D.tolist()
    assert set(np.concatenate(bounded.edges)) == set(np.concatenate(plain.edges))


def test_tasks_cover_every_band_and_key_once() -> None:
    for documents in (0, 1, 5, 90, 1_000):
        config = MinHashConfig(keys_in_memory=100)
        tasks = survivors.band_tasks(config, documents)
        parts = {key_range[1] for _, key_range in tasks}
        assert len(parts) == 1
        covered = sorted((band, key_range[0]) for bands, key_range in tasks for band in bands)
        assert covered == [(band, part) for band in range(config.bands) for part in range(max(parts))]
        assert all(len(bands) * documents / max(parts) <= 100 or len(bands) == 1 for bands, _ in tasks)
        assert documents / max(parts) <= 100


documents = st.tuples(st.integers(0, 3), st.sampled_from([0, 1, 5, 12, 18, 21, 24]), st.sampled_from([None, 0, 7]))


@settings(max_examples=40)
@given(st.lists(documents, min_size=2, max_size=14), st.data())
def test_a_later_generation_leaves_what_was_decided(
    drawn: list[tuple[int, int, int | None]], data: st.DataObject
) -> None:
    texts, stars = [family(seed, edits) for seed, edits, _ in drawn], [stars for _, _, stars in drawn]
    end = data.draw(st.integers(1, len(texts) - 1))
    first = run(texts[:end], stars[:end]).clusters
    with tempfile.TemporaryDirectory() as folder:
        grown = deduplicate_in_process(Path(folder), texts, stars, CONFIG, 4, [end, len(texts)])
    clusters = grown.clusters
    assert clusters.survivor_D[:end].tolist() == first.survivor_D.tolist()
    assert clusters.size_D[:end].tolist() == first.size_D.tolist()
    assert all(clusters.keep[clusters.survivor_D])
    assert clusters.size_D[clusters.keep][clusters.survivor_D[clusters.keep] >= end].sum() <= len(texts) - end


def test_an_old_survivor_stays_beside_a_better_and_a_joining_newcomer() -> None:
    texts = [family(1, 0), family(1, 3), family(2, 0), family(1, 5), family(2, 0), family(4, 0), family(4, 2)]
    stars: list[int | None] = [0, 1, 0, 9, 9, 0, 3]
    with tempfile.TemporaryDirectory() as folder:
        grown = deduplicate_in_process(Path(folder), texts, stars, CONFIG, 4, [3, 7])
    assert grown.clusters.survivor_D.tolist() == [1, 1, 2, 1, 2, 6, 6]
    assert grown.clusters.size_D.tolist()[:3] == [2, 2, 1]  # as they were
    assert grown.differences == {"kept_unlike_a_rebuild": 2, "dropped_unlike_a_rebuild": 2}
    assert run(texts, stars).clusters.survivor_D.tolist() == [3, 3, 4, 3, 4, 6, 6]


@settings(max_examples=40)
@given(st.lists(documents, min_size=1, max_size=14), st.randoms(use_true_random=False))
def test_survivors_and_clusters_do_not_depend_on_input_order(
    drawn: list[tuple[int, int, int | None]], random: Random
) -> None:
    """Nor on how many stars tie, on exact copies, or on borderline members: contents decide, never numbers."""
    texts = [family(seed, edits) for seed, edits, _ in drawn]
    stars = [star for *_, star in drawn]
    plain = run(texts, stars)
    order = list(range(len(texts)))
    random.shuffle(order)
    shuffled_texts = [texts[number] for number in order]
    shuffled = run(shuffled_texts, [stars[number] for number in order], shard_rows=3)
    assert kept(shuffled_texts, shuffled) == kept(texts, plain)
    assert clustering(shuffled_texts, shuffled) == clustering(texts, plain)


def test_a_dropped_copy_is_exact_where_its_content_stays(tmp_path: Path) -> None:
    texts = [family(1, 0), family(1, 0), family(1, 3), family(1, 3), family(2, 0)]
    result = deduplicate_in_process(tmp_path, texts, [0, 0, 0, 9, 0], CONFIG, shard_rows=2)
    reports = survivors.write_clusters(
        str(tmp_path), result.shards, result.rows, result.clusters, result.first_D, "digest"
    )
    for report in reports:
        report.check("dedup")
    rows = [row for name in result.shards for row in pq.read_table(tmp_path / f"clusters/{name}.parquet").to_pylist()]
    assert [row["reason"] for row in rows] == ["near_duplicate", "exact_duplicate", "exact_duplicate", None, None]
    assert [row["survivor"] for row in rows] == [3, 3, 3, 3, 4]
    assert [row["cluster_size"] for row in rows] == [4, 4, 4, 4, 1]


@pytest.mark.slow
@pytest.mark.parametrize("equal", [True, False])
def test_a_hundred_thousand_like_files_are_one_cluster(equal: bool, tmp_path: Path) -> None:
    count = 100_000
    body = " ".join(f"word{index}" for index in range(60))
    texts = [body if equal else f"{body} x{index}" for index in range(count)]
    result = deduplicate_in_process(tmp_path, texts, [0] * count, CONFIG, shard_rows=20_000)
    assert result.clusters.keep.sum() == 1
    assert (result.clusters.size_D == count).all()
    tasks = survivors.band_tasks(CONFIG, count)
    for (bands, _), edges in zip(tasks, result.edges, strict=True):
        assert len(edges) <= (0 if equal else TIES * len(bands) * count)
