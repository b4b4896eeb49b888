"""MinHash against brute force: Jaccard over shingle sets, and plain Python shingles."""

from __future__ import annotations

import itertools
import re

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest

from cert_ray.dedup import minhash
from cert_ray.dedup.minhash import BINS, EMPTY_BIN, I64, MinHashConfig, agreement, shingle_hashes, signatures

CONFIG = MinHashConfig()
WORDS = re.compile(rb"[0-9A-Za-z_\x80-\xff]+")


def plain_shingles(text: str, width: int = 5) -> set[tuple[bytes, ...]]:
    tokens = WORDS.findall(text.encode())
    return {tuple(tokens[i : i + width]) for i in range(len(tokens) - width + 1)}


def random_texts(count: int, seed: int, words: int = 300) -> list[str]:
    """Texts that share less and less with the first; edits come in runs of up to eight words."""
    generator = np.random.default_rng(seed)
    base = [f"w{generator.integers(400)}" for _ in range(words)]
    texts = []
    for index in range(count):
        edited = list(base)
        for start in generator.choice(words, size=index * words // (8 * count), replace=False):
            for position in range(start, min(start + 8, words)):
                edited[position] = f"x{generator.integers(10_000)}"
        texts.append(" ".join(edited) + "\n")
    return texts


def test_shingles_are_those_of_plain_python_per_document() -> None:
    texts = ["a b c d e f", "", "a b c d", "é_1 b(c) d.e\tf\ng", "a b c d e", "(((", "b c d e f"]
    encoded = [text.encode() for text in texts]
    offsets = np.cumsum([0, *map(len, encoded)])
    hashes, starts = shingle_hashes(np.frombuffer(b"".join(encoded), np.uint8), offsets, 5)
    assert np.diff(starts).tolist() == [2, 0, 0, 3, 1, 0, 1]
    per_document = [hashes[a:b].tolist() for a, b in itertools.pairwise(starts)]
    assert per_document[4] == per_document[0][:1]  # a b c d e, whatever stands around it
    assert per_document[6] == per_document[0][1:]
    assert len({value for document in per_document for value in document}) == 4


def test_long_words_differ_wherever_they_differ() -> None:
    """Words are hashed eight bytes at a time, and the longest in one call."""
    words = ["x" * size for size in range(1, 90)]
    words += ["x" * place + "y" + "x" * (size - place) for size in (39, 79) for place in range(size)]
    texts = [f"{word} b c d e" for word in words]
    encoded = "".join(texts).encode()
    offsets = np.cumsum([0, *map(len, texts)])
    hashes, starts = shingle_hashes(np.frombuffer(encoded, np.uint8), offsets, 5)
    assert np.diff(starts).tolist() == [1] * len(texts)
    assert len(set(hashes.tolist())) == len(texts)


def jaccard_of_pairs(texts: list[str]) -> tuple[I64, I64, npt.NDArray[np.float64]]:
    sets = [plain_shingles(text) for text in texts]
    left, right = np.tril_indices(len(texts), -1)
    exact = [len(sets[a] & sets[b]) / len(sets[a] | sets[b]) for a, b in zip(left, right, strict=True)]
    return left, right, np.array(exact)


@pytest.mark.parametrize("words", [40, 300, 3_000])
def test_signature_estimates_jaccard_better_than_its_bins_as_permutations_would(words: int) -> None:
    texts = random_texts(60, seed=3, words=words)
    signature_DK, _, has_shingle = signatures(pa.array(texts), CONFIG)
    left, right, exact = jaccard_of_pairs(texts)
    assert has_shingle.all()
    errors = agreement(signature_DK, left, right) - exact
    between = (exact > 0.2) & (exact < 0.9)
    assert between.sum() > 100
    # A permutation per bin gives sqrt(J(1-J)/512), at most 0.022; one for all bins draws without replacement.
    assert np.sqrt(np.mean(np.square(errors[between]))) < 0.025
    assert abs(np.mean(errors[between])) < 0.012


def test_pairs_share_a_band_as_often_as_under_independent_permutations() -> None:
    """1 - (1 - J^rows)^bands, for short documents, whose bins are mostly borrowed, and for long ones."""
    config = MinHashConfig(bands=14, rows_per_band=8)
    for words, count in ((30, 300), (600, 60)):
        expected, shared = [], []
        for seed in range(6):
            texts = random_texts(count // 6, seed, words)
            _, keys_DB, _ = signatures(pa.array(texts), config)
            left, right, exact = jaccard_of_pairs(texts)
            expected.append(1 - (1 - exact**config.rows_per_band) ** config.bands)
            shared.append((keys_DB[left] == keys_DB[right]).any(axis=1))
        assert np.mean(np.concatenate(shared)) == pytest.approx(np.mean(np.concatenate(expected)), abs=0.06)


def test_signatures_and_keys_do_not_depend_on_neighbours_or_slicing(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [*random_texts(20, seed=4), "", "word" * 300_000, "a b c d e"]
    together = signatures(pa.array(texts), CONFIG)
    parts = [signatures(pa.array([text]), CONFIG) for text in texts]
    sliced = signatures(pa.array(["pad", *texts]).slice(1), CONFIG)
    wide = signatures(pa.array(texts, pa.large_string()), CONFIG)
    monkeypatch.setattr(minhash, "_CHUNK_DOCUMENTS", 3)
    few = signatures(pa.array(texts), CONFIG)
    for place, arrays in enumerate(together):
        alone = np.concatenate([part[place] for part in parts])
        for other in (alone, sliced[place], wide[place], few[place]):
            assert (arrays == other).all()


def test_document_without_a_shingle_has_no_signature() -> None:
    signature_DK, _, has_shingle = signatures(pa.array(["", "a b", "a b c d e"]), CONFIG)
    assert has_shingle.tolist() == [False, False, True]
    assert (signature_DK[:2] == EMPTY_BIN).all()
    assert (signature_DK[2] != EMPTY_BIN).sum() == 1
    none, keys, _ = signatures(pa.array([], pa.string()), CONFIG)
    assert none.shape == (0, BINS)
    assert keys.shape == (0, CONFIG.bands)


def test_equal_documents_agree_and_strangers_do_not() -> None:
    texts = [*random_texts(2, seed=1), "one two three four five", "one two three four six"]
    signature_DK, keys_DB, _ = signatures(pa.array([texts[0], *texts]), CONFIG)
    agree = agreement(signature_DK, np.array([0, 0, 3]), np.array([1, 4, 4]))
    assert agree[0] == 1
    assert max(agree[1:]) < 0.02
    assert (keys_DB[0] == keys_DB[1]).all()
    assert not (keys_DB[3] == keys_DB[4]).any()


def test_another_seed_gives_other_signatures() -> None:
    texts = pa.array(random_texts(2, seed=1, words=5_000))  # no bin is empty
    one, other = (signatures(texts, MinHashConfig(seed=seed)) for seed in (1, 2))
    assert (one[0] != other[0]).mean() > 0.9
    assert not (one[1] == other[1]).any()


@pytest.mark.parametrize("options", [{"bands": 103}, {"rows_per_band": 21}, {"bands": 0}, {"signatures_in_memory": 0}])
def test_options_that_do_not_fit_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="|".join([*options, "bands x rows_per_band"])):
        MinHashConfig(**options)
