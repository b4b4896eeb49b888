"""MinHash signatures and LSH band keys over Arrow string buffers, vectorised: no Python per document or token.

In: an Arrow string array. Out: (documents, hashes) uint32 signatures and (documents, bands) uint64 band keys.
Tokens are runs of word bytes; a shingle is `shingle_tokens` of them in a row, hashed to 64 bits. Documents too short
for one shingle get no keys: they belong to exact dedup alone, since one shared empty signature would merge them all.
Source: Broder 1997 (MinHash); Indyk and Motwani 1998 (banding); Lee et al. 2022, arXiv:2107.06499, for 5-grams.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pydantic

from cert_ray.config import Config

U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]

# Odd 64-bit constants: the golden ratio for the rolling polynomial, rrxmrrxmsx_0's multiplier for mixing bits.
_POLYNOMIAL = np.uint64(0x9E3779B97F4A7C15)
_POLYNOMIAL_INVERSE = np.uint64(pow(0x9E3779B97F4A7C15, -1, 1 << 64))
_SHINGLE_MULTIPLIER = np.uint64(0x9FB21C651E98DF25)
_MIX_MULTIPLIER = np.uint64(0xD6E8FEB86659FD93)
_CHUNK_BYTES = 4 << 20  # at a time: temporaries are a few dozen bytes for each; a document is at most 1 MB
_EMPTY = np.uint32(0xFFFFFFFF)

_WORD_BYTE = np.zeros(256, bool)
_WORD_BYTE[[*b"0123456789_", *range(65, 91), *range(97, 123), *range(128, 256)]] = True


class MinHashConfig(Config):
    """LSH over `bands` of `rows_per_band` hashes: candidates from a similarity of about (1/bands)^(1/rows_per_band)."""

    shingle_tokens: int = pydantic.Field(5, ge=1, le=32)  # datatrove's and Lee et al.'s n-gram
    bands: int = pydantic.Field(14, ge=1, le=256)  # datatrove's default: with 8 rows the curve's knee is at 0.72
    rows_per_band: int = pydantic.Field(8, ge=2, le=64, multiple_of=2)
    threshold: float = pydantic.Field(0.7, ge=0, le=1)  # estimated Jaccard of an edge; assumed: the knee
    seed: int = pydantic.Field(1, ge=0)

    @property
    def hashes(self) -> int:
        """Hash functions in a signature."""
        return self.bands * self.rows_per_band


def signatures(contents: pa.Array, config: MinHashConfig) -> tuple[U32, npt.NDArray[np.bool_]]:
    """Signatures, and which documents have one (at least one shingle).

    Returns:
        uint32[documents, hashes] and bool[documents]; rows without a shingle are all 0xFFFFFFFF.
    """
    buffer, offsets = _string_buffers(contents)
    signature_DH = np.full((len(contents), config.hashes), _EMPTY, np.uint32)
    has_shingle_D = np.zeros(len(contents), bool)
    first = 0
    while first < len(contents):
        last = max(first + 1, int(np.searchsorted(offsets, offsets[first] + _CHUNK_BYTES, side="right")) - 1)
        start, end = offsets[first], offsets[last]
        shingles, starts = shingle_hashes(buffer[start:end], offsets[first : last + 1] - start, config.shingle_tokens)
        has_shingle_D[first:last] = np.diff(starts) > 0
        signature_DH[first:last] = _minima(shingles, starts, config)
        first = last
    return signature_DH, has_shingle_D


def band_keys(signature_DH: U32, config: MinHashConfig) -> U64:
    """One 64-bit key per document and band: equal keys where all of the band's hashes are equal."""
    documents = len(signature_DH)
    pairs = (
        np.ascontiguousarray(signature_DH).view(np.uint64).reshape(documents, config.bands, config.rows_per_band // 2)
    )
    keys_DB = np.broadcast_to(np.arange(1, config.bands + 1, dtype=np.uint64) * _POLYNOMIAL, pairs.shape[:2])
    for column in range(pairs.shape[2]):
        keys_DB = _mix(keys_DB ^ pairs[:, :, column])
    return np.ascontiguousarray(keys_DB)


def shingle_hashes(text: npt.NDArray[np.uint8], offsets: I64, shingle_tokens: int) -> tuple[U64, I64]:
    """64-bit hashes of every document's shingles, and where each document's start (length documents + 1).

    Args:
        text: concatenated UTF-8 of the documents. offsets: their borders in it, from 0 to len(text).
    """
    token_hashes, token_starts = _token_hashes(text, offsets)
    borders = np.searchsorted(token_starts, offsets)
    tokens_D = np.diff(borders)
    shingles_D = np.maximum(tokens_D - shingle_tokens + 1, 0)
    if len(token_hashes) < shingle_tokens:
        return np.zeros(0, np.uint64), np.zeros(len(offsets), np.int64)
    windows = len(token_hashes) - shingle_tokens + 1
    hashes = token_hashes[:windows].copy()
    for step in range(1, shingle_tokens):
        hashes *= _SHINGLE_MULTIPLIER
        hashes += token_hashes[step : windows + step]
    inside = np.ones(len(token_hashes), bool)  # windows that start so late that they would reach the next document
    for step in range(shingle_tokens - 1):
        inside[(borders[1:] - 1 - step)[tokens_D > step]] = False
    return _mix(hashes[inside[:windows]]), np.concatenate([[0], np.cumsum(shingles_D)])


def _token_hashes(text: npt.NDArray[np.uint8], offsets: I64) -> tuple[U64, I64]:
    """Position-independent 64-bit hashes of the word tokens, and their start offsets, by one prefix sum."""
    word = _WORD_BYTE[text]
    border = np.zeros(len(text) + 1, bool)
    border[offsets] = True
    starts = np.flatnonzero(word & (border[:-1] | ~np.concatenate([[False], word[:-1]])))
    ends = np.flatnonzero(word & (border[1:] | ~np.concatenate([word[1:], [False]])))
    prefix = np.cumsum((text.astype(np.uint64) + np.uint64(1)) * _powers(int(_POLYNOMIAL), len(text)), dtype=np.uint64)
    hashes = prefix[ends]
    later = starts > 0
    hashes[later] -= prefix[starts[later] - 1]
    hashes *= _powers(int(_POLYNOMIAL_INVERSE), len(text))[starts]
    return _mix(hashes), starts.astype(np.int64, copy=False)


def _minima(shingles: U64, starts: I64, config: MinHashConfig) -> U32:
    """The least of every hash function over each document's shingles."""
    result_DH = np.full((len(starts) - 1, config.hashes), _EMPTY, np.uint32)
    filled = np.flatnonzero(np.diff(starts) > 0)
    if not len(filled):
        return result_DH
    values = (shingles >> np.uint64(32)).astype(np.uint32)
    multipliers, increments = _permutations(config.hashes, config.seed)
    permuted = np.empty(len(values), np.uint32)
    least_HD = np.empty((config.hashes, len(filled)), np.uint32)
    for function in range(config.hashes):
        np.multiply(values, multipliers[function], out=permuted)
        np.add(permuted, increments[function], out=permuted)
        np.minimum.reduceat(permuted, starts[filled], out=least_HD[function])
    result_DH[filled] = least_HD.T
    return result_DH


def _string_buffers(contents: pa.Array) -> tuple[npt.NDArray[np.uint8], I64]:
    """Zero-copy view of the array's UTF-8, and its borders as int64."""
    wide = pa.types.is_large_string(contents.type)
    _, offset_buffer, value_buffer = contents.buffers()
    borders = np.frombuffer(offset_buffer, np.int64 if wide else np.int32)
    offsets: I64 = borders[contents.offset : contents.offset + len(contents) + 1].astype(np.int64)
    values = np.frombuffer(value_buffer, np.uint8) if value_buffer is not None else np.zeros(0, np.uint8)
    return values, offsets


@lru_cache(maxsize=4)
def _all_powers(factor: int, bits: int) -> U64:
    powers = np.full(1 << bits, np.uint64(factor), np.uint64)
    powers[0] = 1
    return np.multiply.accumulate(powers)


def _powers(factor: int, count: int) -> U64:
    """factor**0 .. factor**(count - 1), modulo 2**64."""
    return _all_powers(factor, max(count - 1, 1).bit_length())[:count]


@lru_cache(maxsize=8)
def _permutations(hashes: int, seed: int) -> tuple[U32, U32]:
    generator = np.random.Generator(np.random.PCG64(seed))
    multipliers = generator.integers(0, 1 << 32, hashes, np.uint32) | np.uint32(1)
    return multipliers, generator.integers(0, 1 << 32, hashes, np.uint32)


def _mix(values: U64) -> U64:
    for _ in range(2):
        values = (values ^ (values >> np.uint64(32))) * _MIX_MULTIPLIER
    return values ^ (values >> np.uint64(32))
