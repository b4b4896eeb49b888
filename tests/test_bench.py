"""The instruments themselves: the synthetic corpus is what it says, the fit and the brute force are right."""

from __future__ import annotations

import argparse
import ast
import json
import sys
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cert_ray.dedup import on_ray as dedup_on_ray
from cert_ray.operations.plan import Costs
from tests.bench import bench_dedup, bench_gpu, bench_growth, bench_sketch, fetch_corpus, ours
from tests.bench.inputs import count_bytes, related_rows, sample_texts, spread_rows, write_parts
from tests.bench.make_corpus import KINDS, SCHEMA, CorpusOptions, Writer, ground_truth, make_corpus
from tests.bench.measuring import peers_python
from tests.dataset.builders import in_this_process

OPTIONS = CorpusOptions(documents=3_000, seed=5)


@pytest.fixture(scope="module")
def contents() -> list[str]:
    texts: list[str] = Writer(OPTIONS).rows(np.arange(600), ground_truth(OPTIONS)).column("content").to_pylist()
    return texts


def test_every_document_is_python(contents: list[str]) -> None:
    for text in contents:
        ast.parse(text)


def test_exact_copies_equal_their_original_and_nothing_else_does(contents: list[str]) -> None:
    truth = ground_truth(OPTIONS)
    for row, text in enumerate(contents):
        equal = text == contents[truth.cluster_D[row]]
        assert equal == (KINDS[truth.kind_D[row]] != "near")
    originals = [text for row, text in enumerate(contents) if KINDS[truth.kind_D[row]] == "original"]
    assert len(set(originals)) == len(originals)


def test_near_copies_are_similar_and_others_are_not(contents: list[str]) -> None:
    truth = ground_truth(OPTIONS)
    sets = [bench_dedup.word_shingles(text) for text in contents]
    pairs = {tuple(pair) for pair in bench_dedup.similar_pairs(sets, 0.7).tolist()}
    for left, right in pairs:
        assert truth.cluster_D[left] == truth.cluster_D[right]
    expected = {(int(truth.cluster_D[row]), row) for row in range(600) if truth.kind_D[row] != 0 and len(sets[row])}
    assert len(expected & pairs) >= 0.98 * len(expected)


def test_our_side_of_the_dedup_benchmark_keeps_originals(
    contents: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = ground_truth(OPTIONS).kind_D
    originals = [text for row, text in enumerate(contents) if KINDS[kinds[row]] == "original"][:30]
    tables = tmp_path / "tables"
    tables.mkdir()
    pq.write_table(pa.table({"content": originals + originals[:10]}), tables / "part.parquet")
    monkeypatch.setattr(ours, "_on_ray", lambda work: work())
    with in_this_process():
        monkeypatch.setattr(ours, "run_units", dedup_on_ray.run_units)
        figures = ours.dedup(tables, tmp_path / "out", workers=1)
    assert (figures["rows_read"], figures["rows_kept"]) == (40, 30)


def test_rates_and_sizes_are_those_asked_for() -> None:
    options = CorpusOptions(documents=200_000, exact_rate=0.2, near_rate=0.1)
    shares = np.bincount(ground_truth(options).kind_D, minlength=3) / options.documents
    assert shares == pytest.approx([0.7, 0.2, 0.1], abs=0.005)
    table = Writer(OPTIONS).rows(np.arange(3_000), ground_truth(OPTIONS))
    sizes = [len(text) for text in table.column("content").to_pylist()]
    assert np.mean(sizes) == pytest.approx(OPTIONS.mean_bytes, rel=0.15)
    assert np.median(sizes) < np.mean(sizes) / 1.5  # many small files, few large ones


@pytest.mark.slow
def test_a_corpus_depends_on_its_options_alone(tmp_path: Path) -> None:
    options = CorpusOptions(documents=90, rows_per_file=40)
    for workers in (1, 2):
        size_bytes = make_corpus(options, tmp_path / str(workers), workers)
    one, two = (sorted((tmp_path / name).rglob("*.parquet")) for name in "12")
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]
    tables = [pq.read_table(path) for path in sorted((tmp_path / "1" / "documents").iterdir())]
    assert [len(table) for table in tables] == [40, 40, 10]
    assert tables[0].schema.equals(SCHEMA)
    texts = [text for table in tables for text in table.column("content").to_pylist()]
    assert size_bytes == sum(len(text.encode()) for text in texts)
    assert sorted(sample_texts(tmp_path / "1" / "documents", 1_000, seed=3)) == sorted(texts)
    assert spread_rows(tmp_path / "1" / "documents", 1.0).equals(pa.concat_tables(tables))
    assert count_bytes(tmp_path / "1" / "documents") == size_bytes
    assert len(related_rows(tmp_path / "1" / "documents", 20, seed=3)) == 20


def test_a_spread_takes_the_share_asked_for_in_runs(tmp_path: Path) -> None:
    write_parts(pa.table({"content": [str(row) for row in range(5_000)]}), tmp_path, 3)
    rows = [int(text) for text in spread_rows(tmp_path, 0.3).column("content").to_pylist()]
    assert len(rows) == 1_500
    assert {row // 100 for row in rows} == {row // 100 for row in rows[::100]}
    assert min(rows) < 500
    assert max(rows) > 4_500


def test_rates_that_leave_no_original_are_refused() -> None:
    with pytest.raises(SystemExit, match="below 1 together"):
        CorpusOptions(documents=10, exact_rate=0.6, near_rate=0.4)


def test_brute_force_finds_the_pairs_that_a_hand_count_finds() -> None:
    sets = [np.array(row, np.uint64) for row in ([1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 3, 4, 5], [9], [])]
    # 0 and 1 share 3 of 5, 0 and 2 share 4 of 5, 1 and 2 share 4 of 5
    assert sorted(bench_dedup.similar_pairs(sets, 0.8).tolist()) == [[0, 2], [1, 2]]
    assert sorted(bench_dedup.similar_pairs(sets, 0.6).tolist()) == [[0, 1], [0, 2], [1, 2]]


def test_agreement_counts_documents_and_pairs() -> None:
    edges, judged = np.array([[0, 1], [1, 4], [2, 3]]), np.array([True] * 5 + [False])
    labels = np.array([0, 0, 2, 3, 0, 0])
    shares = bench_dedup.agreement(labels, labels, edges, judged).values()
    assert [(share.hits, share.trials) for share in shares] == [
        (2, 5),  # 0 stays and 1 is dropped rightly, 4 wrongly: it resembles a dropped one; 2 and 3 resemble each other
        (2, 3),  # 2 and 3 both stay
        (1, 2),  # of 1 and 4, dropped for 0
        (3, 5),  # 2 and 3 are said to have none
        (2, 3),
        (2, 3),  # of 0-1, 0-4, 1-4
        (3, 3),  # 0-4 through 1
    ]


def test_a_fit_gives_back_the_costs_that_made_the_figures() -> None:
    def size(name: str, documents: int, size_bytes: int) -> bench_growth.Size:
        seconds = 3 + 0.002 * documents / 2 + 4e-7 * size_bytes / 2  # two cores share what grows
        used = {
            "wall_s": seconds, "read_bytes": 2.0 * size_bytes, "written_bytes": 100.0 * documents,
            "worker_peak_bytes": 5e8, "root_peak_bytes": 4e8 + 90 * documents,
            "worker_growth_bytes": 1e6, "root_growth_bytes": 90 * documents,
        }  # fmt: skip
        return bench_growth.Size(name, documents, size_bytes, (dict.fromkeys(bench_growth.SHARED_BY, used),))

    sizes = [size("a", 5_000, 27_000_000 * 4), size("b", 100_000, 540_000_000), size("c", 100_000, 270_000_000)]
    costs: Costs = bench_growth.fit_costs(sizes, workers=2, runs=1, command="test")
    documents = costs.stages[0]
    assert documents.seconds.fixed == pytest.approx(3, rel=1e-3)
    assert documents.seconds.per_document == pytest.approx(0.002, rel=1e-3)
    assert documents.seconds.per_byte == pytest.approx(4e-7, rel=1e-3)
    assert documents.written_bytes.per_document == pytest.approx(100, rel=1e-3)
    assert documents.driver_memory_bytes.per_document == pytest.approx(90, rel=1e-3)
    assert documents.driver_memory_bytes.fixed == pytest.approx(4e8, rel=1e-3)
    assert documents.worker_memory_bytes.fixed == 5e8
    grown = size("10x", 1_000_000, 5_400_000_000)
    planned = bench_growth.predict(costs, grown, workers=2)
    assert planned.stages[0].seconds == pytest.approx(grown.runs[0]["documents"]["wall_s"], rel=1e-3)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import os\nos.x(y)\n", False),
        ('"""Docstring."""\nx = 0xFF\n', False),
        ("def func():\n    pass\n", False),
        ("def f():\n    pass\n", True),
        ("x = 1\n", True),
        ("x = 'a'\n", True),
    ],
)
def test_what_a_sketch_would_replace_is_seen_by_the_tokenizer(text: str, expected: bool) -> None:
    assert bench_sketch.has_something_to_replace(text) is expected
    assert (bench_sketch.sketch(text) != text) is expected


def write_wheel(folder: Path, name: str, source: str) -> None:
    """The least that pip takes for a wheel."""
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}/code.py", source)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.mark.slow
def test_fetching_goes_on_from_what_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    index, output = tmp_path / "index", tmp_path / "corpus"
    index.mkdir()
    for name in ("one", "two", "three"):
        write_wheel(index, name, "x = 1\n" * 10)  # 60 bytes
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    packages = tmp_path / "packages.txt"
    packages.write_text("# a comment\none\nnowhere\ntwo==1.0\nthree\n")
    first = fetch_corpus.fetch(packages, output, 120)
    assert sorted(first) == ["one", "two==1.0"]  # enough after two, and what pip cannot get is passed over
    assert "nowhere: passed over" in capsys.readouterr().err
    assert [entry["python_bytes"] for entry in first.values()] == [60, 60]
    damaged = output / "sdists" / first["one"]["file"]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    (index / first["two==1.0"]["file"]).unlink()  # whole already, so it is not asked for again
    assert fetch_corpus.fetch(packages, output, 120) == first


@pytest.mark.slow
def test_the_gpu_benchmark_runs_without_one_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = "--base modern-tiny --micro-batch 2 --context 16 --vocabulary 300 --steps 2 --warmup-steps 1"
    options = sizes + " --eager --plain --profile --at-once 2"
    monkeypatch.setattr("sys.argv", ["bench_gpu", *options.split(), "--output", str(tmp_path)])
    bench_gpu.main()
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert written["figures"]["device"].startswith("no GPU")
    for loop in ("engine", "plain"):
        found = written["figures"]["runs"][f"modern-tiny, 2 rows, {loop}"]
        assert found["mfu"] is None
        assert found["tokens_per_s"]["low"] > 0
        assert found["parameters"] == 300 * 192 + 4 * (4 * 192**2 + 3 * 192 * 512 + 2 * 192) + 192
        assert f"| modern-tiny | 2 | {loop} |" in (tmp_path / "gpu.md").read_text()
        assert "aten::mm" in (tmp_path / f"modern-tiny-2-{loop}.profile.txt").read_text()


def test_peers_without_a_python_are_refused_before_anything_is_measured(tmp_path: Path) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="make bench-env"):
        peers_python(str(tmp_path))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    assert peers_python(str(tmp_path)) == tmp_path / "bin" / "python" == peers_python(str(tmp_path / "bin" / "python"))


def test_models_are_compared_at_equal_tokens_or_not_at_all(tmp_path, capsys):
    from cert_ray import manifests
    from cert_ray.training.config import TrainConfig
    from cert_ray.training.records import StepRecord, to_json_lines
    from tests.bench import compare_models

    def write(name: str, loss: float, steps: int = 2) -> str:
        folder = tmp_path / name
        config = TrainConfig(base="tiny", tokens="pack", output=str(folder), steps=steps, warmup_steps=1)
        report = manifests.ShardReport(
            shard="model", unit_digest="", files=(), rows_read=0, rows_kept=0, counts={"parameters": 7}
        )
        notes = {"machines": {"two cores": steps}}
        manifests.write_manifest(str(folder), manifests.summarize("model", config, "inputs", [report], notes))
        step = StepRecord(step=1, epoch=0, loss=9.0, learning_rate=1, gradient_norm=1, tokens=100, tokens_per_s=50)
        last = step.model_copy(update={"step": 2, "tokens": 200, "held_out_loss": loss})
        (folder / "loss.jsonl").write_text(to_json_lines([step, last]))
        return str(folder)

    one, two, longer = write("one", 4.5), write("two", 4.25), write("longer", 4.0, steps=3)
    compare_models.main([one, two, "--output", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert "| tokens | one | two |" in said
    assert "| 200 | 4.500 | 4.250 |" in said
    assert "| seconds of training | 4 | 4 |" in said
    assert (tmp_path / "out" / "compared.png").stat().st_size > 0
    with pytest.raises(ValueError, match="cannot be compared"):
        compare_models.main([one, longer, "--output", str(tmp_path / "out")])
