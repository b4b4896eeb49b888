from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from tokenizers import Tokenizer, models

from cert_ray import storage
from cert_ray.errors import InputError, NotFinishedError, SchemaVersionError, ShardCorruptError, TokenizerMismatchError
from cert_ray.manifests import ShardReport
from cert_ray.retrieval.library_docs import ApiDoc, write_docs
from cert_ray.shards.units import Attempt, Work, WorkUnit, batches, run_in_process
from cert_ray.sketching.prompt_format import END_OF_TEXT, PAD
from cert_ray.tokens.encoding import PackConfig, View, unigram_entropy_nats
from cert_ray.tokens.pack import pack_in_process, pack_with
from cert_ray.tokens.packing import plan_rows
from cert_ray.tokens.shards import PackedTokens
from cert_ray.tokens.vocabulary import TokenizerConfig, tokenizer_digest, train_on_dataset, train_vocabulary
from tests.tokens.datasets import example, write_dataset


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A dataset of three shards, one of them empty, and a tokenizer trained on it."""
    folder = tmp_path_factory.mktemp("inputs")
    shards = [[example(number) for number in range(40)], [], [example(number) for number in range(40, 100)]]
    dataset = write_dataset(str(folder / "dataset"), shards)
    train_on_dataset(dataset, str(folder / "tokenizer"), TokenizerConfig(vocab_size=400), seed=0)
    return dataset, str(folder / "tokenizer")


def test_a_pack_opens_with_every_document_and_its_entropy(inputs: tuple[str, str], tmp_path: Path) -> None:
    dataset, tokenizer = inputs
    config = PackConfig(view=View.BASE, context_tokens=32, held_out_fraction=0.3)
    manifest = pack_in_process(dataset, tokenizer, str(tmp_path), config)
    packed = PackedTokens.open(str(tmp_path))
    assert len(packed) == manifest.rows_kept == manifest.counts["documents"] == 100
    assert (packed.context_tokens, packed.pad_id, packed.end_id) == (32, 1, 0)
    assert all(packed.tokens(document)[-1] == packed.end_id for document in range(100))
    held_out = [packed.tokens(int(document)) for document in np.flatnonzero(packed.documents.held_out)]
    entropy = unigram_entropy_nats(np.bincount(np.concatenate(held_out)))
    assert manifest.notes["held_out_unigram_entropy_nats"] == pytest.approx(entropy)
    files = manifest.notes["dataset"]
    assert files["kept"] == files["read"] - sum(files["dropped"].values()) > 0
    assert packed.documents.tokens.sum() == manifest.counts["tokens"]


def test_a_pack_is_made_again_when_the_documentation_changes(inputs: tuple[str, str], tmp_path: Path) -> None:
    docs = tmp_path / "docs.jsonl"
    config = PackConfig(view=View.XL, retrieve={"docs": str(docs)})
    tokens = []
    for name in ("array", "zeros"):
        write_docs(str(docs), [ApiDoc(f"numpy.{name}", "(x)", "The area.")])
        manifest = pack_in_process(*inputs, str(tmp_path / "out"), config)
        packed = PackedTokens.open(str(tmp_path / "out"))
        tokens.append([packed.tokens(document).tolist() for document in range(len(packed))])
        assert manifest.counts["documented"] == 50
        assert manifest.config["retrieve"]["checksum"] == config.retrieve.pinned().checksum
    assert tokens[0] != tokens[1]
    assert sum(first != second for first, second in zip(*tokens, strict=True)) == 50


def test_the_same_documentation_at_another_place_is_the_same_pack(inputs: tuple[str, str], tmp_path: Path) -> None:
    made = []
    for folder in ("first", "second"):  # as a job that is submitted twice
        docs = str(tmp_path / folder / "docs.jsonl")
        write_docs(docs, [ApiDoc("numpy.array", "(x)", "The area.")])
        config = PackConfig(view=View.XL, retrieve={"docs": docs})
        manifest = pack_in_process(*inputs, str(tmp_path / "out"), config)
        made.append((manifest, [path.stat().st_mtime_ns for path in sorted((tmp_path / "out").iterdir())]))
    assert made[0] == made[1]
    assert made[0][0].counts["documented"] == 50
    assert manifest.config["retrieve"].keys() == {"top", "query_chars", "checksum"}


def test_a_limit_reads_the_first_documents_alone(inputs: tuple[str, str], tmp_path: Path) -> None:
    whole = pack_in_process(*inputs, str(tmp_path / "whole"), PackConfig(view=View.BASE))
    limited = pack_in_process(*inputs, str(tmp_path / "some"), PackConfig(view=View.BASE, limit=45))
    assert (limited.rows_read, limited.rows_kept, len(limited.shards)) == (45, 45, 3)
    first, some = PackedTokens.open(str(tmp_path / "whole")), PackedTokens.open(str(tmp_path / "some"))
    assert len(some) == 45 < whole.rows_kept
    assert all(np.array_equal(first.tokens(document), some.tokens(document)) for document in range(45))


def test_units_tell_how_heavy_they_are_so_that_the_largest_shard_starts_first(
    inputs: tuple[str, str], tmp_path: Path
) -> None:
    seen: list[WorkUnit] = []

    def spy(units: list[WorkUnit], work: Work, run: Attempt) -> list[ShardReport]:
        seen.extend(units)
        return run_in_process(units, work, run)

    pack_with(spy, *inputs, str(tmp_path / "whole"), PackConfig(view=View.BASE))
    pack_with(spy, *inputs, str(tmp_path / "some"), PackConfig(view=View.BASE, limit=45))
    weights = [unit.weight for unit in seen]
    assert weights[2] > weights[0] > weights[1] > 0  # of 60, 40 and no documents
    assert weights[3:5] == weights[:2]
    assert weights[5] == pytest.approx(weights[2] * 5 / 60, abs=1)
    assert batches(seen[:3], workers=2)[0][0].name == "shard-00002"


def test_code_is_packed_without_its_sketches_being_read(
    inputs: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, asked = storage.read_parquet, set()

    def spy(url: str, columns: list[str] | None = None) -> pa.Table:
        asked.update(columns or ())
        return read(url, columns)

    monkeypatch.setattr(storage, "read_parquet", spy)
    pack_in_process(*inputs, str(tmp_path / "base"), PackConfig(view=View.BASE))
    assert "content" in asked
    assert not asked & {"sketch", "placeholders", "segments"}
    pack_in_process(*inputs, str(tmp_path / "generator"), PackConfig(view=View.GENERATOR))
    assert asked >= {"sketch", "placeholders", "segments"}


def test_the_generators_rows_hold_whole_pairs(inputs: tuple[str, str], tmp_path: Path) -> None:
    dataset, tokenizer = inputs
    config = PackConfig(view=View.GENERATOR, context_tokens=128, libraries=("numpy",))
    manifest = pack_in_process(dataset, tokenizer, str(tmp_path), config)
    assert (manifest.rows_read, manifest.rows_kept, manifest.dropped) == (100, 50, {"other_library": 50})
    packed = PackedTokens.open(str(tmp_path))
    plan = plan_rows(packed, np.arange(len(packed)), 128)
    assert plan.stats.cut_pairs == 0
    assert plan.stats.pairs_too_long == manifest.counts["pairs_too_long"] == 0
    assert plan.stats.tokens == manifest.counts["tokens"]


def test_a_finished_pack_is_kept_and_a_damaged_shard_alone_is_made_again(
    inputs: tuple[str, str], tmp_path: Path
) -> None:
    config = PackConfig(view=View.SKETCHER)
    first = pack_in_process(*inputs, str(tmp_path), config)
    shards = sorted(tmp_path.glob("*.bin"))
    times = [shard.stat().st_mtime_ns for shard in shards]
    assert pack_in_process(*inputs, str(tmp_path), config) == first
    assert [shard.stat().st_mtime_ns for shard in shards] == times
    shards[0].write_bytes(b"damaged")
    assert pack_in_process(*inputs, str(tmp_path), config) == first
    assert PackedTokens.open(str(tmp_path)).manifest == first
    assert [shard.stat().st_mtime_ns for shard in shards][1:] == times[1:]


def test_other_options_or_another_tokenizer_make_it_again(inputs: tuple[str, str], tmp_path: Path) -> None:
    dataset, tokenizer = inputs
    output = str(tmp_path / "pack")
    packs = [
        pack_in_process(dataset, tokenizer, output, PackConfig(view=View.BASE)),
        pack_in_process(dataset, tokenizer, output, PackConfig(view=View.SKETCHER)),
    ]
    train_on_dataset(dataset, str(tmp_path / "other"), TokenizerConfig(vocab_size=300), seed=0)
    packs.append(pack_in_process(dataset, str(tmp_path / "other"), output, PackConfig(view=View.SKETCHER)))
    assert len({pack.shards[0].files[0].checksum for pack in packs}) == 3
    assert PackedTokens.open(output).vocab_size == 300


def test_a_library_that_no_document_imports_is_refused_with_those_that_are(
    inputs: tuple[str, str], tmp_path: Path
) -> None:
    config = PackConfig(view=View.XL, libraries=("pandas",))
    with pytest.raises(InputError, match=r"imports any of pandas.*numpy \(50\), os \(50\)"):
        pack_in_process(*inputs, str(tmp_path), config)
    with pytest.raises(NotFinishedError):
        PackedTokens.open(str(tmp_path))


@pytest.mark.parametrize(
    "mistake", [{"libraries": ("pandas",)}, {"libraries": ("os",), "limit": 1}], ids=["mistyped", "beyond the limit"]
)
def test_a_view_that_takes_no_document_leaves_the_finished_pack_as_it_is(
    inputs: tuple[str, str], tmp_path: Path, mistake: dict[str, Any]
) -> None:
    pack_in_process(*inputs, str(tmp_path), PackConfig(view=View.SKETCHER, libraries=("numpy",)))
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="no document imports any of"):
        pack_in_process(*inputs, str(tmp_path), PackConfig(view=View.SKETCHER, **mistake))
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.rglob("*") if path.is_file()} == (
        before
    )


def test_a_damaged_shard_is_named_where_documents_of_a_library_are_looked_for(
    inputs: tuple[str, str], tmp_path: Path
) -> None:
    dataset = write_dataset(str(tmp_path / "dataset"), [[example(0)]])
    (tmp_path / "dataset" / "shard-00000.parquet").write_bytes(b"damaged")
    with pytest.raises(ShardCorruptError, match="shard-00000"):
        pack_in_process(dataset, inputs[1], str(tmp_path / "pack"), PackConfig(view=View.XL, libraries=("numpy",)))


def test_a_finished_pack_that_another_replaces_is_told_of_and_one_that_grows_is_not(
    inputs: tuple[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, tokenizer = inputs
    shards = [[example(number) for number in range(10)], [example(number) for number in range(10, 20)]]
    datasets = [write_dataset(str(tmp_path / name), shards[:count]) for name, count in (("one", 1), ("two", 2))]
    datasets.append(write_dataset(str(tmp_path / "other"), shards[1:]))
    output = str(tmp_path / "pack")

    def told(dataset: str, **options: Any) -> list[str]:
        caplog.clear()
        pack_in_process(dataset, tokenizer, output, PackConfig(view=View.XL, **options))
        return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]

    assert told(datasets[0]) == told(datasets[1]) == []
    (tmp_path / "pack" / "shard-00000.bin").write_bytes(b"damaged")
    assert told(datasets[1]) == []
    (line,) = told(datasets[1], libraries=("numpy",), held_out_fraction=0.5)
    assert line == (
        f"tokens: {output} holds what was finished with other libraries, held_out_fraction: it is replaced. "
        "Give each a `run` of its own to keep both."
    )
    told(datasets[0])
    (line,) = told(datasets[2])
    assert "with other contents of the dataset or tokenizer" in line


def test_a_tokenizer_without_the_special_tokens_is_refused(inputs: tuple[str, str], tmp_path: Path) -> None:
    foreign = Tokenizer(models.BPE(vocab={"a": 0, END_OF_TEXT: 1, PAD: 2}, merges=[]))
    foreign.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerMismatchError, match=r"generator needs <\|segmentation\|>"):
        pack_in_process(inputs[0], str(tmp_path), str(tmp_path / "out"), PackConfig(view=View.GENERATOR))


def test_a_folder_of_another_stage_is_not_overwritten(inputs: tuple[str, str]) -> None:
    dataset, tokenizer = inputs
    with pytest.raises(SchemaVersionError, match="stage tokens"):
        pack_in_process(dataset, tokenizer, tokenizer, PackConfig(view=View.BASE))


def test_the_tokenizers_digest_goes_with_the_pack(inputs: tuple[str, str], tmp_path: Path) -> None:
    pack_in_process(*inputs, str(tmp_path), PackConfig(view=View.BASE))
    packed = PackedTokens.open(str(tmp_path))
    assert packed.tokenizer_digest != tokenizer_digest(train_vocabulary(["x"], TokenizerConfig(vocab_size=400)))


def test_a_damaged_shard_of_the_dataset_is_refused(inputs: tuple[str, str], tmp_path: Path) -> None:
    dataset = write_dataset(str(tmp_path / "dataset"), [[example(0)]])
    write_dataset(str(tmp_path / "other"), [[example(1)]])
    shard = "shard-00000.parquet"
    (tmp_path / "dataset" / shard).write_bytes((tmp_path / "other" / shard).read_bytes())
    with pytest.raises(ShardCorruptError, match="cert-ray preprocess"):
        pack_in_process(dataset, inputs[1], str(tmp_path / "pack"), PackConfig(view=View.BASE))
