"""Measured recall and precision against counts by hand, and the bounds of the sample."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from cert_ray.dedup.decisions import Clusters
from cert_ray.dedup.minhash import MinHashConfig
from cert_ray.dedup.quality import QualityConfig, measure_quality
from tests.dedup.builders import deduplicate_in_process, write_documents

CONFIG = MinHashConfig()


def text(seed: int, edits: int) -> str:
    words = [f"w{seed}_{index}" for index in range(200)]
    words[:edits] = [f"edit{seed}_{edit}_{edits}" for edit in range(edits)]
    return " ".join(words)


def clusters(*survivor: int) -> Clusters:
    survivor_D = np.array(survivor, np.int64)
    return Clusters(survivor_D, np.bincount(survivor_D, minlength=len(survivor_D))[survivor_D])


def measure(folder: Path, texts: list[str], found: Clusters, shard_rows: int = 2, **options: int) -> dict[str, Any]:
    shards = write_documents(folder, texts, [None] * len(texts), shard_rows)
    rows = [len(texts[start : start + shard_rows]) for start in range(0, len(texts), shard_rows)]
    return measure_quality(str(folder), shards, rows, found, CONFIG, QualityConfig(**options))


def test_pairs_and_drops_are_judged_by_exact_jaccard(tmp_path: Path) -> None:
    """Of a, its near copies a1 and a2, the stranger b and the short c, a1 is dropped for a and, wrongly, c for b."""
    texts = [text(1, 0), text(1, 4), text(2, 0), "too short", text(1, 8)]
    found = measure(tmp_path, texts, clusters(0, 0, 2, 2, 4))
    assert (found["documents"], found["uniform_documents"]) == (5, 5)
    assert (found["similar_pairs"], found["found_similar_pairs"]) == (3, 2)  # a and a2 both stay
    assert (found["dropped_documents"], found["dropped_like_survivor"]) == (2, 1)
    assert (found["uniform_similar_pairs"], found["uniform_found_similar_pairs"]) == (3, 2)
    assert (found["recall"], found["precision"]) == (2 / 3, 1 / 2)
    wilson = stats.binomtest(2, 3).proportion_ci(method="wilson")
    assert (found["recall_low"], found["recall_high"]) == (wilson.low, wilson.high)


def test_the_copy_that_stays_is_the_one_that_is_drawn(tmp_path: Path) -> None:
    """Of equal contents the sample has one: were it a dropped copy, nothing would stand for the near copy."""
    found = measure(tmp_path, [text(1, 0), text(1, 4), text(1, 0), text(1, 0)], clusters(2, 2, 2, 2))
    assert (found["documents"], found["dropped_documents"], found["dropped_like_survivor"]) == (2, 1, 1)


def test_threshold_stands_where_jaccard_reaches_it(tmp_path: Path) -> None:
    """200 tokens are 196 shingles; editing the first n keeps 196 - n of them: J = (196 - n) / (196 + n)."""
    edits = [n for n in range(20, 50) if (196 - n) / (196 + n) >= CONFIG.threshold]
    last = max(edits)
    for number, (count, similar) in enumerate([(last, 1), (last + 1, 0)]):
        found = measure(tmp_path / str(number), [text(1, 0), text(1, count)], clusters(0, 0))
        assert (found["similar_pairs"], found["precision"]) == (similar, similar)


def test_exact_copies_and_single_documents_make_no_pair(tmp_path: Path) -> None:
    found = measure(tmp_path, [text(1, 0), text(1, 0), text(2, 0)], clusters(0, 0, 2))
    assert found["documents"] == 2
    assert (found["recall"], found["recall_low"], found["precision"], found["precision_high"]) == (None,) * 4
    nothing = measure(tmp_path / "none", [], clusters())
    assert (nothing["documents"], nothing["recall"]) == (0, None)


def test_sample_keeps_its_bounds_and_is_half_clusters(tmp_path: Path) -> None:
    texts = [text(seed, edits) for seed in range(40) for edits in ((0, 2, 4) if seed < 10 else (0,))]
    result = deduplicate_in_process(tmp_path, texts, [0] * len(texts), CONFIG, shard_rows=6)
    documents = str(tmp_path / "documents")

    def drawn(**options: int) -> dict[str, Any]:
        return measure_quality(documents, result.shards, result.rows, result.clusters, CONFIG, QualityConfig(**options))

    found = drawn(documents=24)
    assert found["documents"] == 24
    assert found["dropped_documents"] >= 8  # of four whole clusters of three
    assert 12 <= found["uniform_documents"] < 24
    assert found == drawn(documents=24)
    assert found != drawn(documents=24, seed=2)
    everything = drawn()
    assert (everything["documents"], everything["recall"], everything["precision"]) == (len(texts), 1.0, 1.0)
    assert everything["similar_pairs"] == 30
    assert drawn(shards=4)["documents"] <= 24
    assert drawn(sample_bytes=10_000)["documents"] <= 10_000 / len(texts[0])


def test_measured_recall_of_borderline_copies_is_below_one(tmp_path: Path) -> None:
    """Copies right at the threshold are missed about every second time, and the figure says so."""
    texts = [text(seed, edits) for seed in range(150) for edits in (0, 33)]  # J = 163/229 = 0.712
    result = deduplicate_in_process(tmp_path, texts, [0] * len(texts), CONFIG)
    found = measure_quality(
        str(tmp_path / "documents"), result.shards, result.rows, result.clusters, CONFIG, QualityConfig()
    )
    assert found["similar_pairs"] == 150
    assert found["precision"] == 1
    assert 0.2 < found["recall_low"] < found["recall"] < found["recall_high"] < 0.95
