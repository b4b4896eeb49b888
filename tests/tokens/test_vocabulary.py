from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer

from cert_ray import storage
from cert_ray.errors import ConfigError, InputError, SchemaVersionError
from cert_ray.sketching.prompt_format import END_OF_TEXT, PAD, SPECIAL_TOKENS, encode_code
from cert_ray.tokens.vocabulary import (
    TokenizerConfig,
    adopt_tokenizer,
    load_tokenizer,
    save_tokenizer,
    splits_otherwise,
    tokenizer_digest,
    train_on_dataset,
    train_vocabulary,
    vocabulary_size,
)
from tests.tokens.datasets import document, real_code, write_dataset

LOOKALIKE = f"x = '{END_OF_TEXT}'  # <|number|> <|segmentation|>\n"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_vocabulary(real_code(), TokenizerConfig(vocab_size=2_000))


@given(
    st.one_of(st.text(), st.binary().map(lambda payload: payload.decode("utf-8", "replace")), st.text(" \t\r\n\f\0"))
)
def test_any_text_survives(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(encode_code(tokenizer, text), skip_special_tokens=False) == text


def test_every_byte_is_in_the_vocabulary(tokenizer: Tokenizer) -> None:
    for byte in pre_tokenizers.ByteLevel.alphabet():
        assert tokenizer.token_to_id(byte) is not None


def test_special_tokens_have_the_first_ids_in_order(tokenizer: Tokenizer) -> None:
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == list(range(len(SPECIAL_TOKENS)))
    assert tokenizer.token_to_id(END_OF_TEXT) == 0
    assert vocabulary_size(tokenizer) == 2_000


def test_text_that_looks_like_a_special_token_is_text(tokenizer: Tokenizer) -> None:
    assert min(encode_code(tokenizer, LOOKALIKE)) >= len(SPECIAL_TOKENS)


def test_indentation_is_one_token_and_apart_from_the_line_break(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("def f():\n        return 1").tokens
    assert "Ġ" * 7 in tokens
    assert not any("Ċ" in token and "Ġ" in token for token in tokens)


def test_no_token_is_longer_than_its_limit() -> None:
    config = TokenizerConfig(vocab_size=1_000, max_token_length=6)
    trained = train_vocabulary(["return something_long_enough\n" * 9], config)
    assert max(len(token) for token in trained.get_vocab() if token not in SPECIAL_TOKENS) <= 6


def test_training_again_gives_the_same_bytes() -> None:
    program = (
        "from cert_ray.tokens.vocabulary import *\n"
        "from tests.tokens.datasets import real_code\n"
        "print(tokenizer_digest(train_vocabulary(real_code(), TokenizerConfig(vocab_size=3_000))))"
    )
    root = Path(__file__).parents[2]
    digests = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={"PATH": "", "TOKENIZERS_PARALLELISM": parallel, "PYTHONPATH": str(root)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for parallel in ("true", "false")
    }
    digests.add(tokenizer_digest(train_vocabulary(real_code(), TokenizerConfig(vocab_size=3_000))) + "\n")
    assert len(digests) == 1


def test_auto_tokenizer_loads_the_folder_and_agrees(tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_tokenizer(tokenizer, str(tmp_path), context_tokens=640)
    loaded = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    for text in [*real_code(3), LOOKALIKE, "é = '日本'\r\n\t\0"]:
        ids = encode_code(tokenizer, text)
        assert loaded(text)["input_ids"] == ids
        assert loaded.decode(ids) == text
    assert loaded.model_max_length == 640
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.unk_token_id) == (0, 0, 0)
    assert loaded.pad_token == PAD
    assert len(loaded) == 2_000


def test_a_loaded_tokenizer_is_the_saved_one(tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_tokenizer(tokenizer, str(tmp_path), context_tokens=640)
    loaded = load_tokenizer(str(tmp_path))
    assert tokenizer_digest(loaded) == tokenizer_digest(tokenizer)
    assert encode_code(loaded, LOOKALIKE) == encode_code(tokenizer, LOOKALIKE)


def test_options_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigError, match=f"vocab_size: 256.*{256 + len(SPECIAL_TOKENS)} are needed"):
        train_vocabulary([], TokenizerConfig(vocab_size=256))
    with pytest.raises(ConfigError, match="pattern"):
        train_vocabulary([], TokenizerConfig(pattern="("))


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="not a tokenizer"):
        load_tokenizer(str(tmp_path))


def test_training_on_a_dataset_is_seeded_and_kept_when_finished(tmp_path: Path) -> None:
    rows = [document(text) for text in real_code(24)]
    dataset = write_dataset(str(tmp_path / "dataset"), [rows[:10], rows[10:]])
    config = TokenizerConfig(vocab_size=600, sample_bytes=200_000)
    first = train_on_dataset(dataset, str(tmp_path / "a"), config, seed=1)
    train_on_dataset(dataset, str(tmp_path / "b"), config, seed=1)
    train_on_dataset(dataset, str(tmp_path / "c"), config, seed=2)
    payloads = [(tmp_path / name / "tokenizer.json").read_bytes() for name in "abc"]
    assert payloads[0] == payloads[1] != payloads[2]
    assert (tmp_path / "a" / "manifest.json").read_bytes() == (tmp_path / "b" / "manifest.json").read_bytes()
    assert 0 < first.counts["sample_bytes"] <= 200_000
    assert first.notes["vocab_size"] == 600
    assert first.notes["characters_per_token"] > 1.5
    before = (tmp_path / "a" / "tokenizer.json").stat().st_mtime_ns
    assert train_on_dataset(dataset, str(tmp_path / "a"), config, seed=1) == first
    assert (tmp_path / "a" / "tokenizer.json").stat().st_mtime_ns == before


def test_a_tokenizer_that_another_replaces_is_told_of_and_stays_where_the_other_cannot_be_made(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    datasets = [write_dataset(str(tmp_path / name), [[document(name * 50)]]) for name in ("first", "second")]
    output = tmp_path / "tokenizer"

    def told(dataset: str, vocab_size: int = 300, seed: int = 0) -> list[str]:
        caplog.clear()
        train_on_dataset(dataset, str(output), TokenizerConfig(vocab_size=vocab_size), seed)
        return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]

    assert told(datasets[0]) == told(datasets[0]) == []
    (output / "tokenizer.json").write_text("damaged")
    assert told(datasets[0]) == []
    (line,) = told(datasets[0], vocab_size=310, seed=1)
    assert line == (
        f"tokenizer: {output} holds what was finished with other vocab_size, seed: it is replaced. "
        "Give each a `run` of its own to keep both."
    )
    (line,) = told(datasets[1], vocab_size=310, seed=1)
    assert "with other contents of the dataset" in line
    before = {path: path.read_bytes() for path in output.iterdir()}
    with pytest.raises(ConfigError, match="vocab_size: 10 is too small"):
        told(datasets[1], vocab_size=10)
    assert {path: path.read_bytes() for path in output.iterdir()} == before


def test_an_adopted_tokenizer_is_kept_when_finished_and_another_one_is_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / "ours"
    for name in "ab":
        (tmp_path / name).mkdir()
        Tokenizer(models.BPE(vocab={name: 0}, merges=[])).save(str(tmp_path / name / "tokenizer.json"))
    first = adopt_tokenizer(str(tmp_path / "a"), str(output), context_tokens=64)
    before = (output / "tokenizer.json").stat().st_mtime_ns
    assert adopt_tokenizer(str(tmp_path / "a"), str(output), context_tokens=64) == first
    assert (output / "tokenizer.json").stat().st_mtime_ns == before
    assert not caplog.records
    adopt_tokenizer(str(tmp_path / "b"), str(output), context_tokens=64)
    assert [record.getMessage() for record in caplog.records] == [
        f"tokenizer: {output} holds what was finished with other contents of the base: it is replaced. "
        "Give each a `run` of its own to keep both."
    ]
    dataset = write_dataset(str(tmp_path / "dataset"), [[document("x = 1")]])
    with pytest.raises(SchemaVersionError, match="stage tokenizer"):
        adopt_tokenizer(str(tmp_path / "b"), dataset, context_tokens=64)


def test_a_tokenizer_made_elsewhere_keeps_its_ids(tmp_path: Path) -> None:
    foreign = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2, END_OF_TEXT: 7}, merges=[("a", "b")]))
    foreign.save(str(tmp_path / "tokenizer.json"))
    manifest = adopt_tokenizer(str(tmp_path), str(tmp_path / "ours"), context_tokens=64)
    adopted = load_tokenizer(str(tmp_path / "ours"))
    assert [adopted.token_to_id(token) for token in ("a", "b", "ab", END_OF_TEXT)] == [0, 1, 2, 7]
    assert all(adopted.token_to_id(token) is not None for token in SPECIAL_TOKENS)
    assert manifest.notes["special_tokens_added"] == len(SPECIAL_TOKENS) - 1
    assert manifest.notes["vocab_size"] == vocabulary_size(adopted)
    assert json.loads(storage.read_text(str(tmp_path / "ours" / "tokenizer_config.json")))["model_max_length"] == 64


def test_tokenizers_of_equal_ids_and_other_merges_split_otherwise() -> None:
    vocabulary = {token: number for number, token in enumerate(["a", "b", "c", "ab", "bc", "abc"])}
    first, second = (
        Tokenizer(models.BPE(vocabulary, merges))
        for merges in ([("a", "b"), ("b", "c"), ("ab", "c")], [("b", "c"), ("a", "b"), ("ab", "c")])
    )
    assert first.encode("abc").ids != second.encode("abc").ids
    assert splits_otherwise(first, second) == ["model.merges"]
    second = Tokenizer.from_str(first.to_str())
    second.add_special_tokens(["<|new|>"])
    assert splits_otherwise(first, second) == []
