"""Preprocessing whole: same bytes for any number of workers, conservation, reuse, and nothing lost in silence."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from cert_ray import manifests, storage
from cert_ray.dataset.on_ray import preprocess
from cert_ray.dataset.options import PreprocessConfig
from cert_ray.errors import InputError, SchemaVersionError, ShardCorruptError
from cert_ray.manifests import Manifest
from tests.corpus.hostile import GOOD_FILES, build_hostile_corpus, good_source, hostile_inputs
from tests.dataset.builders import in_this_process, write_corpus
from tests.ray_marks import RAY_DATA

pytestmark = RAY_DATA


def config(corpus: Path, **options: object) -> PreprocessConfig:
    return PreprocessConfig.model_validate({"sources": {"inputs": [str(corpus)], "unit_bytes": 20_000}, **options})


def shard_checksums(manifest: Manifest) -> list[tuple[str, str]]:
    return [(file.name, file.checksum) for file in manifest.files]


def test_dataset_is_the_same_with_one_and_three_workers_and_adds_up(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus")
    options = config(tmp_path / "corpus")
    one = preprocess(options, str(tmp_path / "one"), workers=1)
    three = preprocess(options, str(tmp_path / "three"), workers=3)
    assert len(one.shards) > 1
    assert shard_checksums(one) == shard_checksums(three)
    with in_this_process():
        assert preprocess(options, str(tmp_path / "plain")) == one
    assert one.dropped == {"exact_duplicate": 1, "near_duplicate": 1, "not_python_3": 1}
    assert (one.rows_read, one.rows_kept) == (15, 12)
    for name, checksum in shard_checksums(one):
        assert storage.checksum(str(tmp_path / "one" / "dataset" / name)).checksum == checksum
    _check_rows(tmp_path / "one" / "dataset", one)
    assert (tmp_path / "one" / "dataset" / "card" / "card.html").stat().st_size > 10_000
    _check_reuse(options, tmp_path / "one", one)


def test_a_generation_more_leaves_the_earlier_shards_and_counts_the_difference(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus")
    first = preprocess(config(tmp_path / "corpus"), str(tmp_path / "run"))
    later = tmp_path / "later"
    later.mkdir()
    longer = (tmp_path / "corpus" / "file_03.py").read_text() + "\nmore_than_before = 1\n"
    (later / "longer.py").write_text(longer)  # a rebuild would keep this one for its size, and drop file_03
    (later / "new.py").write_text(good_source(7))
    grown = preprocess(config(tmp_path / "corpus", appended=[[str(later)]]), str(tmp_path / "run"))
    assert shard_checksums(grown)[: len(first.files)] == shard_checksums(first)
    assert (grown.rows_read, grown.rows_kept) == (first.rows_read + 2, first.rows_kept + 1)
    assert grown.notes["generations"] == [len(first.shards), 1]
    assert grown.notes["kept_unlike_a_rebuild"] == grown.notes["dropped_unlike_a_rebuild"] == 1
    again = preprocess(config(tmp_path / "corpus", appended=[[str(later)]]), str(tmp_path / "other"), workers=1)
    assert shard_checksums(again) == shard_checksums(grown)


def test_removed_intermediates_are_not_missed_by_a_rerun(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus")
    options, run = config(tmp_path / "corpus"), tmp_path / "run"
    first = preprocess(options, str(run), intermediates="remove")
    assert not list((run / "documents").glob("*.parquet"))
    assert not (run / "dedup" / "signatures").exists()
    modified = (run / "dataset" / "manifest.json").stat().st_mtime_ns
    assert preprocess(options, str(run)) == first
    assert (run / "dataset" / "manifest.json").stat().st_mtime_ns == modified
    other = preprocess(config(tmp_path / "corpus", sketch_kind="names"), str(run))
    assert other.rows_kept == first.rows_kept
    assert shard_checksums(other) != shard_checksums(first)


def test_a_hostile_corpus_ends_in_counted_drops(tmp_path: Path) -> None:
    expected = build_hostile_corpus(tmp_path / "hostile")
    options = PreprocessConfig.model_validate(
        {"sources": {"inputs": hostile_inputs(tmp_path / "hostile"), "unit_bytes": 20_000}}
    )
    manifest = preprocess(options, str(tmp_path / "run"))
    assert manifest.rows_kept == GOOD_FILES
    assert manifest.dropped == expected
    assert manifest.rows_read == GOOD_FILES + sum(expected.values())


def _check_rows(dataset: Path, manifest: Manifest) -> None:
    rows = [row for shard in manifest.shards for row in pq.read_table(dataset / f"{shard.shard}.parquet").to_pylist()]
    assert len({row["doc_id"] for row in rows}) == 12
    assert sum(row["cluster_size"] for row in rows) == 14
    for row in rows:
        sketch = row["sketch"].encode()
        assert [sketch[p["start"] : p["end"]].decode() for p in row["placeholders"]]
        kinds = {(p["kind"], sketch[p["start"] : p["end"]].decode()) for p in row["placeholders"]}
        assert {("number", "number"), ("string", "string")} <= kinds
        content = row["content"].encode()
        for segment in row["segments"]:
            code = content[segment["code_start"] : segment["code_end"]].decode()
            block = sketch[segment["sketch_start"] : segment["sketch_end"]].decode()
            assert code.strip()
            assert code.count("\n") == block.count("\n")
            assert code.split("(")[0].split()[0] == block.split("(")[0].split()[0]
        assert row["libraries"] == sorted(["numpy", "pandas" if "pandas" in row["content"] else "polars"])


def _check_reuse(options: PreprocessConfig, output: Path, first: Manifest) -> None:
    """A second run rewrites nothing; a damaged shard is rebuilt; another version is refused."""
    shard = output / "dataset" / first.shards[0].files[0].name
    untouched = output / "dataset" / first.shards[1].files[0].name
    before = untouched.stat().st_mtime_ns
    shard.write_bytes(shard.read_bytes()[:-7] + b"damaged")
    with pytest.raises(ShardCorruptError, match="preprocess"):
        manifests.check_file(str(output / "dataset"), first.shards[0].files[0], "preprocess")
    again = preprocess(options, str(output), workers=2)
    assert shard_checksums(again) == shard_checksums(first)
    assert untouched.stat().st_mtime_ns == before
    manifests.check_file(str(output / "dataset"), first.shards[0].files[0], "preprocess")
    path = output / "dataset" / "manifest.json"
    path.write_text(path.read_text().replace('"schema_version": 1', '"schema_version": 99'))
    with pytest.raises(SchemaVersionError, match=r"schema_version 99.*preprocess"):
        manifests.read_manifest(str(output / "dataset"), "dataset", "preprocess")


def test_corpus_with_nothing_to_keep_is_an_error_that_counts(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "empty.py").write_text("")
    with pytest.raises(InputError, match=r"none of 1 files is left \(empty 1\)"):
        preprocess(config(tmp_path / "corpus"), str(tmp_path / "out"))


def test_problem_file_is_part_of_what_a_dataset_is_made_from(tmp_path: Path) -> None:
    """A leak is dropped, counted and told; a changed problem file, under the same name, is looked for anew."""
    corpus, problems = tmp_path / "corpus", tmp_path / "problems.jsonl"
    write_corpus(corpus, files=3)
    leak, other = LEAK.format(verb="sorted"), LEAK.format(verb="reversed")
    (corpus / "leak.py").write_text(f"# ann@corp.com\n{leak}")
    (corpus / "other.py").write_text(other)
    options = config(corpus, decontaminate=[str(problems)])
    names = {}
    for source in (leak, other):
        head, _, body = source.partition("\n\n\n")[2].partition("\n")
        problem = {"task_id": "T/0", "prompt": head + "\n", "canonical_solution": body, "test": "", "entry_point": "f"}
        problems.write_text(json.dumps(problem) + "\n")
        made = preprocess(options, str(tmp_path / "out"))
        assert made.dropped["contaminated"] == 1
        assert (made.rows_read, made.rows_kept + sum(made.dropped.values())) == (8, 8)
        report = json.loads((tmp_path / "out" / "documents" / "contamination" / "report.json").read_text())
        (names[source],) = {match["path"] for match in report["matches"]}
        assert made.counts.get("redacted_email", 0) == (source == other)
        assert ("secrets redacted: email" in (tmp_path / "out" / "dataset" / "card" / "card.md").read_text()) == (
            source == other
        )
    assert names == {leak: "leak.py", other: "other.py"}


LEAK = """import os


def f({verb}_values, {verb}_limit):
    {verb}_chosen = [{verb}_value for {verb}_value in {verb}({verb}_values) if {verb}_value > {verb}_limit]
    for {verb}_place, {verb}_value in enumerate({verb}_chosen):
        if {verb}_place % 2:
            {verb}_chosen[{verb}_place] = {verb}_value + {verb}_limit
    return {{{verb}_key: len({verb}_chosen) for {verb}_key in os.listdir({verb}_chosen[0])}}
"""
