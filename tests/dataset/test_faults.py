"""Damaged shards are rebuilt, falsified counts fail the run, and no manifest stands while its shards are redone."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow.parquet as pq
import pytest

from cert_ray import manifests
from cert_ray.dataset import on_ray as dataset_on_ray
from cert_ray.dataset.on_ray import preprocess
from cert_ray.dataset.options import PreprocessConfig
from cert_ray.dedup import on_ray as dedup_on_ray
from cert_ray.dedup import survivors
from cert_ray.errors import CertRayError, ConservationError, SchemaVersionError, ShardCorruptError, SupersededError
from cert_ray.manifests import Manifest, ShardReport
from cert_ray.shards.units import report_url
from tests.chaos.run import compare, tree
from tests.dataset.builders import in_this_process, write_corpus

pytestmark = pytest.mark.slow

SHARD = "shard-00001"


def config(corpus: Path, **options: object) -> PreprocessConfig:
    return PreprocessConfig.model_validate({"sources": {"inputs": [str(corpus)], "unit_bytes": 20_000}, **options})


@pytest.fixture(scope="module", autouse=True)
def _without_ray() -> Iterator[None]:
    with in_this_process():
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreprocessConfig, Path]:
    """A finished run; each test here leaves it finished and equal."""
    folder = tmp_path_factory.mktemp("faults")
    write_corpus(folder / "corpus")
    options = config(folder / "corpus")
    preprocess(options, str(folder / "run"))
    return options, folder / "run"


def redo(options: PreprocessConfig, run: Path) -> Manifest:
    """Run again, unfinished: a finished and whole dataset does not look at what it was made from."""
    (run / "dataset" / "manifest.json").unlink(missing_ok=True)
    return preprocess(options, str(run))


def killed(
    monkeypatch: pytest.MonkeyPatch, step: str, dies: Callable[..., object], options: PreprocessConfig, run: Path
) -> None:
    """A run that ends inside `step`, which is `dies` in it, and leaves no finished dataset."""
    with monkeypatch.context() as patched:
        patched.setattr(dataset_on_ray, step, dies)
        with pytest.raises(KeyboardInterrupt):
            preprocess(options, str(run))
    assert not manifests.is_finished(str(run / "dataset"))


def flip_a_bit(path: Path) -> None:
    payload = bytearray(path.read_bytes())
    payload[len(payload) // 2] ^= 1
    path.write_bytes(payload)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [flip_a_bit, truncate])
@pytest.mark.parametrize(
    "file",
    [
        f"documents/{SHARD}.parquet",
        f"documents/drops/{SHARD}.parquet",
        f"dedup/keys/{SHARD}.parquet",
        f"dedup/signatures/{SHARD}.parquet",
        f"dedup/clusters/{SHARD}.parquet",
        f"dataset/{SHARD}.parquet",
        f"dataset/drops/{SHARD}.parquet",
    ],
)
def test_a_damaged_file_is_rebuilt_and_no_other(
    finished: tuple[PreprocessConfig, Path], file: str, damage: Callable[[Path], None]
) -> None:
    options, run = finished
    if file.startswith(("dedup/keys", "dedup/signatures")):  # not read again once the clusters are there
        (run / "dedup" / "manifest.json").unlink()
        expected = tree(run)
        redo(options, run)
        expected = tree(run)
        (run / "dedup" / "manifest.json").unlink()
    else:
        expected = tree(run)
    times = {path: path.stat().st_mtime_ns for path in run.rglob("shard-*.parquet")}
    damage(run / file)
    redo(options, run)
    assert tree(run) == expected
    rebuilt = {str(path.relative_to(run)) for path, time in times.items() if path.stat().st_mtime_ns != time}
    assert file in rebuilt
    stage = file.split("/")[0]
    assert all(name.startswith(stage) and (SHARD in name or "clusters" in name) for name in rebuilt)


def falsify(path: Path, **changes: int) -> None:
    report = json.loads(path.read_text())
    for name, change in changes.items():
        counts = report if name in report else report["dropped"]
        counts[name] += change
    path.write_text(json.dumps(report))


@pytest.mark.parametrize(
    ("report", "changes", "message"),
    [
        ("documents", {"rows_kept": 1}, f"stage documents/{SHARD}"),
        ("documents", {"rows_read": 1, "rows_kept": 1}, rf"stage dedup/{SHARD} \(rows handed over\)"),
        ("dedup", {"rows_read": 1, "rows_kept": 1}, rf"stage dedup/{SHARD} \(rows handed over\)"),
        ("dataset", {"rows_read": 1}, f"stage dataset/{SHARD}"),
        ("dataset", {"rows_read": 1, "rows_kept": 1}, r"stage dataset \(rows handed over\)"),
    ],
)
def test_a_falsified_report_fails_the_run(
    finished: tuple[PreprocessConfig, Path], report: str, changes: dict[str, int], message: str
) -> None:
    options, run = finished
    expected = tree(run)
    path = run / report / "reports" / f"{SHARD}.json"
    true_report = path.read_text()
    (run / "dedup" / "manifest.json").unlink()
    falsify(path, **changes)
    with pytest.raises(ConservationError, match=message):
        redo(options, run)
    path.write_text(true_report)
    redo(options, run)
    assert tree(run) == expected


def test_falsified_clusters_fail_the_run(
    finished: tuple[PreprocessConfig, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    options, run = finished
    expected = tree(run)
    true_clusters = survivors.write_clusters

    def with_one_lost(*given: object) -> list[ShardReport]:
        first, *others = true_clusters(*given)  # type: ignore[arg-type]
        return [first.model_copy(update={"rows_kept": first.rows_kept - 1}), *others]

    (run / "dedup" / "manifest.json").unlink()
    with monkeypatch.context() as patched:
        patched.setattr(survivors, "write_clusters", with_one_lost)
        with pytest.raises(ConservationError, match="stage dedup/shard-00000"):
            redo(options, run)
    assert not (run / "dedup" / "manifest.json").exists()
    redo(options, run)
    assert tree(run) == expected
    falsify_manifest(run / "dedup" / "manifest.json")
    with pytest.raises(ConservationError, match="stage dedup"):
        redo(options, run)
    (run / "dedup" / "manifest.json").unlink()
    redo(options, run)
    assert tree(run) == expected


def falsify_manifest(path: Path) -> None:
    manifest = json.loads(path.read_text())
    manifest["rows_kept"] += 1
    path.write_text(json.dumps(manifest))


def test_a_finished_dedup_is_reused_until_documents_or_options_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_corpus(tmp_path / "corpus")
    run = tmp_path / "run"
    preprocess(config(tmp_path / "corpus"), str(run))
    runs = []
    true_clusters = survivors.write_clusters
    monkeypatch.setattr(survivors, "write_clusters", lambda *given: runs.append(given) or true_clusters(*given))
    preprocess(config(tmp_path / "corpus"), str(run))
    preprocess(config(tmp_path / "corpus", sketch_kind="names"), str(run))
    preprocess(config(tmp_path / "corpus", minhash={"keys_in_memory": 7, "signatures_in_memory": 3}), str(run))
    assert runs == []
    preprocess(config(tmp_path / "corpus", minhash={"threshold": 0.9}), str(run))
    assert len(runs) == 1
    preprocess(config(tmp_path / "corpus", minhash={"threshold": 0.9}, cleaning={"min_lines": 9}), str(run))
    assert len(runs) <= 2  # the same documents under other cleaning are the same documents
    edited = tmp_path / "corpus" / "file_03.py"
    edited.write_text(edited.read_text().replace("function_3", "function_4"))  # of the same size
    (run / "documents" / "reports" / "shard-00000.json").unlink()
    (run / "documents" / "reports" / "shard-00001.json").unlink()
    before = len(runs)
    redo(config(tmp_path / "corpus", minhash={"threshold": 0.9}, cleaning={"min_lines": 9}), run)
    assert len(runs) == before + 1


def test_another_measure_of_dedup_makes_the_measure_and_the_card_again_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_corpus(tmp_path / "corpus")
    run = tmp_path / "run"
    preprocess(config(tmp_path / "corpus"), str(run))
    times = {path: path.stat().st_mtime_ns for path in run.rglob("shard-*")}
    assert any(path.match("dedup/clusters/*") for path in times)
    with monkeypatch.context() as patched:
        patched.setattr(dedup_on_ray, "_near_edges", None)
        few, none, last = (
            preprocess(config(tmp_path / "corpus", dedup_quality=quality), str(run)).notes.get("near_dedup_quality")
            for quality in ({"documents": 5}, None, {"documents": 6, "seed": 3})
        )
    assert (few["documents"], none, last["documents"]) == (5, None, 6)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("shard-*")} == times
    preprocess(config(tmp_path / "corpus", dedup_quality={"documents": 6, "seed": 3}), str(tmp_path / "fresh"))
    assert tree(run) == tree(tmp_path / "fresh")


def test_a_run_killed_after_its_card_leaves_no_manifest_over_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_corpus(tmp_path / "corpus", files=3)
    run = tmp_path / "run"
    first, second = (config(tmp_path / "corpus", dedup_quality={"documents": count}) for count in (5, 6))
    preprocess(first, str(run))
    expected = tree(run)
    true_card = dataset_on_ray.write_card

    def dies(folder: str, manifest: Manifest) -> None:
        true_card(folder, manifest)
        raise KeyboardInterrupt

    killed(monkeypatch, "write_card", dies, second, run)
    preprocess(first, str(run))
    assert tree(run) == expected


@pytest.mark.parametrize(
    ("reader", "file", "damage"),
    [
        ((dedup_on_ray, "measure_quality"), f"documents/{SHARD}.parquet", truncate),
        ((survivors, "read_documents"), f"dedup/keys/{SHARD}.parquet", truncate),
        ((survivors, "band_edges"), f"dedup/keys/{SHARD}.parquet", truncate),
        ((survivors, "band_edges"), f"dedup/signatures/{SHARD}.parquet", truncate),
        ((dataset_on_ray, "write_annotated"), f"dedup/clusters/{SHARD}.parquet", truncate),
        ((dataset_on_ray, "write_annotated"), f"dedup/clusters/{SHARD}.parquet", Path.unlink),
        ((dataset_on_ray, "write_card"), f"dataset/{SHARD}.parquet", truncate),
    ],
)
def test_damage_after_the_check_names_the_shard_and_the_next_run_mends_it(
    reader: tuple[ModuleType, str],
    file: str,
    damage: Callable[[Path], None],
    finished: tuple[PreprocessConfig, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Dedup's sample, keys and clusters and the card's examples are read after every shard was found whole."""
    options, run = finished
    expected = tree(run)
    read = getattr(*reader)

    def damaged_before(*given: object, **named: object) -> object:
        damage(run / file)
        return read(*given, **named)

    (run / "dedup" / "manifest.json").unlink()
    if file.startswith("dedup/clusters"):  # read for a shard of the dataset that is to be made
        Path(report_url(str(run / "dataset"), SHARD)).unlink()
    with monkeypatch.context() as patched:
        patched.setattr(*reader, damaged_before)
        with pytest.raises(ShardCorruptError, match=rf"{file}: the manifest says .* `cert-ray preprocess` again"):
            redo(options, run)
    redo(options, run)
    assert tree(run) == expected


@pytest.mark.parametrize(
    "reader", [(survivors, "write_keys"), (dedup_on_ray, "measure_quality"), (dataset_on_ray, "write_annotated")]
)
@pytest.mark.parametrize("step", ["clean", "deduplicate"])
def test_a_run_whose_documents_a_later_one_removed_says_that_it_was_superseded(
    step: str, reader: tuple[ModuleType, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The later one died at the end of its documents, or after it, and never came to the earlier one's stage."""
    write_corpus(tmp_path / "corpus", files=3)
    options, run = config(tmp_path / "corpus"), tmp_path / "run"
    fewer = options.model_copy(update={"sources": options.sources.model_copy(update={"limit": 2})})
    preprocess(options, str(tmp_path / "undisturbed"))
    read, clean = getattr(*reader), dataset_on_ray.clean

    def dies(*given: Any) -> None:
        if step == "clean":
            clean(*given)
            (run / "documents" / "manifest.json").unlink()
            (run / "documents" / manifests.ATTEMPT_NAME).write_text("its token")
        raise KeyboardInterrupt

    def overtaken_before(*given: object, **named: object) -> object:
        killed(monkeypatch, step, dies, fewer, run)
        return read(*given, **named)

    with monkeypatch.context() as patched:
        patched.setattr(*reader, overtaken_before)
        with pytest.raises(SupersededError, match=r"documents: another run has begun"):
            preprocess(options, str(run))
    preprocess(options, str(run))
    assert tree(run) == tree(tmp_path / "undisturbed")


@pytest.mark.parametrize(
    ("stage", "options"),
    [
        ("documents", {"cleaning": {"max_line_chars": 900}}),
        ("dedup", {"minhash": {"threshold": 0.9}}),
        ("dataset", {"sketch_kind": "names"}),
    ],
)
def test_no_manifest_stands_while_its_shards_are_redone(
    stage: str, options: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run under other options that dies at the end of a stage leaves that stage unfinished, not finished wrongly."""
    write_corpus(tmp_path / "corpus")
    run = tmp_path / "run"
    preprocess(config(tmp_path / "corpus"), str(run))
    true_write = manifests.write_manifest

    class DiedError(CertRayError):
        pass

    def dies(folder: str, manifest: Manifest) -> None:
        if manifest.stage == stage:
            raise DiedError
        true_write(folder, manifest)

    with monkeypatch.context() as patched:
        patched.setattr(manifests, "write_manifest", dies)
        with pytest.raises(DiedError):
            preprocess(config(tmp_path / "corpus", **options), str(run))
    assert not (run / stage / "manifest.json").exists()
    changed = preprocess(config(tmp_path / "corpus", **options), str(run))
    fresh = preprocess(config(tmp_path / "corpus", **options), str(tmp_path / "fresh"))
    assert changed == fresh
    assert tree(run) == tree(tmp_path / "fresh")


def test_an_edit_that_keeps_a_file_s_size_is_noticed(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus")
    options, run = config(tmp_path / "corpus"), tmp_path / "run"
    before = preprocess(options, str(run))
    edited = tmp_path / "corpus" / "file_03.py"
    text = edited.read_text()
    edited.write_text(text.replace("values", "valued"))
    os.utime(edited, ns=(1, edited.stat().st_mtime_ns + 1_000))  # whatever the clock's resolution
    assert len(edited.read_text()) == len(text)
    after = preprocess(options, str(run))
    changed = [a.shard for a, b in zip(after.shards, before.shards, strict=True) if a != b]
    assert len(changed) == 1
    contents = pq.read_table(run / "dataset" / f"{changed[0]}.parquet").column("content").to_pylist()
    assert any("valued" in content for content in contents)
    # A dataset made of the edited files from the start is the same, to the byte of its manifest.
    assert preprocess(options, str(tmp_path / "other")) == after
    compare(1, tree(tmp_path / "other" / "dataset"), tree(run / "dataset"))


def test_a_run_that_dies_after_its_rewritten_documents_leaves_no_finished_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_corpus(tmp_path / "corpus")
    options, run = config(tmp_path / "corpus"), tmp_path / "run"
    preprocess(options, str(run))
    edited = tmp_path / "corpus" / "file_03.py"
    edited.write_text(edited.read_text().replace("values", "valued"))
    os.utime(edited, ns=(1, edited.stat().st_mtime_ns + 1_000))

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    killed(monkeypatch, "deduplicate", die, options, run)
    contents = [
        content
        for shard in preprocess(options, str(run)).shards
        for content in pq.read_table(run / "dataset" / f"{shard.shard}.parquet").column("content").to_pylist()
    ]
    assert any("valued" in content for content in contents)


def test_a_folder_of_another_version_is_refused_before_it_is_touched(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", files=3)
    run = tmp_path / "run"
    preprocess(config(tmp_path / "corpus"), str(run))
    path = run / "documents" / "manifest.json"
    path.write_text(path.read_text().replace('"schema_version": 1', '"schema_version": 99'))
    before = tree(run)
    with pytest.raises(SchemaVersionError, match="schema_version 99"):
        preprocess(config(tmp_path / "corpus", cleaning={"max_line_chars": 900}), str(run))
    assert tree(run) == before


def test_near_dedup_is_measured_into_the_manifest(finished: tuple[PreprocessConfig, Path]) -> None:
    options, run = finished
    quality = manifests.read_manifest(str(run / "dedup"), "dedup", "preprocess").notes["near_dedup_quality"]
    assert (quality["documents"], quality["similar_pairs"], quality["recall"], quality["precision"]) == (13, 1, 1, 1)
    assert 0 < quality["recall_low"] < quality["recall_high"] == 1
    without = preprocess(options.model_copy(update={"dedup_quality": None}), str(run))
    assert manifests.read_manifest(str(run / "dedup"), "dedup", "preprocess").notes == {}
    assert without.rows_kept == 12
    dataset_on_ray.preprocess(options, str(run))
