"""MinHash against brute force: Jaccard over shingle sets, and plain Python shingles."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pyarrow as pa
import pytest

from cert_ray.dedup.minhash import MinHashConfig, band_keys, shingle_hashes, signatures

CONFIG = MinHashConfig()
WORDS = re.compile(rb"[0-9A-Za-z_\x80-\xff]+")


def plain_shingles(text: str, width: int = 5) -> set[tuple[bytes, ...]]:
    tokens = WORDS.findall(text.encode())
    return {tuple(tokens[i : i + width]) for i in range(len(tokens) - width + 1)}


def random_texts(count: int, seed: int) -> list[str]:
    generator = np.random.default_rng(seed)
    base = [f"w{generator.integers(400)}" for _ in range(300)]
    texts = []
    for index in range(count):
        words = list(base)
        for position in generator.choice(300, size=index * 250 // count, replace=False):
            words[position] = f"x{generator.integers(10_000)}"
        texts.append(" ".join(words) + "\n")
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


def test_signature_estimates_jaccard_within_the_theory() -> None:
    texts = random_texts(60, seed=3)
    signature_DH, has_shingle = signatures(pa.array(texts), CONFIG)
    sets = [plain_shingles(text) for text in texts]
    assert has_shingle.all()
    errors = []
    for left in range(len(texts)):
        for right in range(left):
            jaccard = len(sets[left] & sets[right]) / len(sets[left] | sets[right])
            errors.append((signature_DH[left] == signature_DH[right]).mean() - jaccard)
    # sqrt(J(1-J)/112) is at most 0.047; the bias of 1,770 dependent pairs stays well below that
    assert np.sqrt(np.mean(np.square(errors))) < 0.05
    assert abs(np.mean(errors)) < 0.03


def test_signature_does_not_depend_on_neighbours_or_slicing() -> None:
    texts = random_texts(20, seed=4)
    together, _ = signatures(pa.array(texts), CONFIG)
    alone = np.concatenate([signatures(pa.array([text]), CONFIG)[0] for text in texts])
    sliced, _ = signatures(pa.array(["pad", *texts]).slice(1), CONFIG)
    wide, _ = signatures(pa.array(texts, pa.large_string()), CONFIG)
    assert (together == alone).all()
    assert (together == sliced).all()
    assert (together == wide).all()


def test_document_without_a_shingle_has_no_signature() -> None:
    signature_DH, has_shingle = signatures(pa.array(["", "a b", "a b c d e"]), CONFIG)
    assert has_shingle.tolist() == [False, False, True]
    assert (signature_DH[:2] == 0xFFFFFFFF).all()
    none, _ = signatures(pa.array([], pa.string()), CONFIG)
    assert none.shape == (0, CONFIG.hashes)
    assert band_keys(none, CONFIG).shape == (0, CONFIG.bands)


def test_band_key_is_equal_exactly_where_the_band_is() -> None:
    signature_DH = np.arange(3 * CONFIG.hashes, dtype=np.uint32).reshape(3, -1)
    signature_DH[1] = signature_DH[0]
    signature_DH[1, CONFIG.rows_per_band] += 1  # first hash of the second band
    keys = band_keys(signature_DH, CONFIG)
    assert keys.shape == (3, CONFIG.bands)
    assert (keys[0] == keys[1]).tolist() == [band != 1 for band in range(CONFIG.bands)]
    assert not (keys[0] == keys[2]).any()


@pytest.mark.parametrize("rows", [1, 7])
def test_odd_rows_per_band_are_refused(rows: int) -> None:
    with pytest.raises(ValueError, match="rows_per_band"):
        MinHashConfig(rows_per_band=rows)
