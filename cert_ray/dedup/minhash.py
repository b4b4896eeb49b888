"""Signatures and LSH band keys over Arrow string buffers, vectorised: no Python loop over documents or tokens.

In: an Arrow string array. Out: (documents, BINS) uint8 signatures and (documents, bands) uint32 band keys.
Tokens are runs of word bytes; a shingle is `shingle_tokens` consecutive tokens, hashed to 64 bits. Documents too short
for one shingle get no keys: only exact dedup handles them, since one shared empty signature would merge them all.

One permutation does the work of hundreds (Li, Owen and Zhang 2012, arXiv:1208.1259): a shingle's hash says which of
`BINS` bins it falls into and its rank there, and a document keeps the lowest rank in every bin. One byte of each is the
signature. The agreement of two signatures estimates Jaccard with a root mean square error of 0.014 to 0.018 around 0.7;
112 permutations of four bytes have 0.043 to 0.048 (4,000 pairs, tests/bench/bench_dedup_curves.py). Bands use coarser
bins, and empty bins borrow from others in a fixed random order (Shrivastava 2017, arXiv:1703.04664), so that bands
agree as often as under independent permutations.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Annotated

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pydantic
import xxhash

from cert_ray.config import COST_ONLY, Config

U8 = npt.NDArray[np.uint8]
U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]

BINS = 512  # bytes per signature: 27 GB for 60M documents
EMPTY_BIN = 255  # in a signature, a bin that no shingle fell into; other bins are 0 to 254

# Odd 64-bit constants from rrxmrrxmsx_0 (shingles) and Pelle Evensen's mixers (bits).
_SHINGLE_MULTIPLIER = np.uint64(0x9FB21C651E98DF25)
_MIX_MULTIPLIER = np.uint64(0xD6E8FEB86659FD93)
# Processed at a time. Temporaries take a few dozen bytes for each byte, so a core's L2 cache still holds part of them.
# Measured on 126 MB: 4 MB at a time took 1.6 times as long as 512 kB.
_CHUNK_BYTES = 512 << 10
_CHUNK_DOCUMENTS = 1_024  # have 2 MB of bins
_EMPTY = np.uint32(0xFFFFFFFF)
_LONG_WORD_BYTES = 64  # a longer word is hashed in one call: encoded data may go on for a megabyte
_PROBES = 64  # random bins that an empty one tries before its neighbours; assumed
_LOW_BYTES = np.array([(1 << 8 * count) - 1 for count in range(9)], np.uint64)


class MinHashConfig(Config):
    """LSH over `bands` of `rows_per_band` bins: a pair shares a band with probability 1 - (1 - J^rows)^bands."""

    shingle_tokens: int = pydantic.Field(5, ge=1, le=32)  # datatrove's and Lee et al.'s (arXiv:2107.06499) n-gram
    # With these, 0.990 of the pairs with Jaccard 0.7 share a band; with datatrove's default, 14 x 8, 0.565.
    bands: int = pydantic.Field(25, ge=1, le=256)
    rows_per_band: int = pydantic.Field(5, ge=1, le=64)
    threshold: float = pydantic.Field(0.7, ge=0, le=1)  # Jaccard of near duplicates; datatrove's knee is 0.72
    seed: int = pydantic.Field(1, ge=0)
    # What a task that searches for edges holds at a time; neither changes the outcome. With more documents, keys are
    # cut into ranges, and signatures go to a temporary file.
    keys_in_memory: Annotated[int, COST_ONLY] = pydantic.Field(20_000_000, ge=1)  # sorting them takes about 0.6 GB
    signatures_in_memory: Annotated[int, COST_ONLY] = pydantic.Field(250_000, ge=1)  # 128 MB

    @pydantic.model_validator(mode="after")
    def _bands_fit(self) -> MinHashConfig:
        if self.hashes > BINS:
            raise ValueError(
                f"bands x rows_per_band is {self.bands} x {self.rows_per_band} = {self.hashes}, more than the {BINS} "
                "bins of a signature; lower one of them"
            )
        return self

    @property
    def hashes(self) -> int:
        """How many hashes the bands are made of."""
        return self.bands * self.rows_per_band

    @property
    def verified_from(self) -> float:
        """The lowest estimate that makes an edge: half a standard error above the threshold.

        A document has many neighbours just below the threshold, and any of them whose estimate errs upwards drops it.
        On 78,902 real files, 0.83 of the drops really reached 0.7 if edges began at an estimate of 0.7, 0.94 if they
        began here, and 0.99 a whole error above (`dedup.quality`); recall was above 0.999 in all three.
        """
        return min(1.0, self.threshold + 0.5 * float(np.sqrt(self.threshold * (1 - self.threshold) / BINS)))


def signatures(contents: pa.Array, config: MinHashConfig) -> tuple[U8, U32, npt.NDArray[np.bool_]]:
    """Signatures, band keys, and which documents have them (at least one shingle).

    Returns:
        uint8[documents, BINS], uint32[documents, bands] and bool[documents]. A document without a shingle has only
        empty bins, and its keys are meaningless.
    """
    buffer, offsets = _string_buffers(contents)
    signature_DK = np.full((len(contents), BINS), EMPTY_BIN, np.uint8)
    keys_DB = np.zeros((len(contents), config.bands), np.uint32)
    has_shingle_D = np.zeros(len(contents), bool)
    first = 0
    while first < len(contents):
        fits = int(np.searchsorted(offsets, offsets[first] + _CHUNK_BYTES, side="right")) - 1
        last = min(max(first + 1, fits), first + _CHUNK_DOCUMENTS)
        start, end = offsets[first], offsets[last]
        shingles, starts = shingle_hashes(buffer[start:end], offsets[first : last + 1] - start, config.shingle_tokens)
        least_DK = _least_of_bins(shingles, starts, config.seed)
        filled = np.diff(starts) > 0
        has_shingle_D[first:last] = filled
        np.remainder(least_DK, EMPTY_BIN, out=signature_DK[first:last], where=least_DK != _EMPTY, casting="unsafe")
        keys_DB[first:last][filled] = _band_keys(least_DK[filled], config)
        first = last
    return signature_DK, keys_DB, has_shingle_D


def agreement(signature_DK: U8, left: I64, right: I64) -> npt.NDArray[np.float64]:
    """Estimated Jaccard similarity of each pair of rows: the share of equal bins among those not empty in both.

    One in 255 bins agrees by chance, which is subtracted.
    """
    result = np.empty(len(left), np.float64)
    for start in range(0, len(left), 1 << 14):  # limits the gathered rows to about 16 MB
        part = slice(start, start + (1 << 14))
        one, other = signature_DK[left[part]], signature_DK[right[part]]
        equal = one == other
        both_empty = np.count_nonzero(equal & (one == EMPTY_BIN), axis=1)
        share = (np.count_nonzero(equal, axis=1) - both_empty) / np.maximum(BINS - both_empty, 1)
        result[part] = (share - 1 / EMPTY_BIN) / (1 - 1 / EMPTY_BIN)
    return result


def shingle_hashes(text: U8, offsets: I64, shingle_tokens: int) -> tuple[U64, I64]:
    """64-bit hashes of every document's shingles, and where those of each document start (length documents + 1).

    Args:
        text: concatenated UTF-8 of the documents. offsets: their boundaries in it, from 0 to len(text).
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
    inside = np.ones(len(token_hashes), bool)  # false for windows that would reach into the next document
    for step in range(shingle_tokens - 1):
        inside[(borders[1:] - 1 - step)[tokens_D > step]] = False
    return _mix(hashes[inside[:windows]]), np.concatenate([[0], np.cumsum(shingles_D)])


def _token_hashes(text: U8, offsets: I64) -> tuple[U64, I64]:
    """64-bit hashes of the word tokens, which do not depend on position, and their start offsets: 8 bytes at a time."""
    size = len(text)
    word = np.zeros(size + 2, bool)  # with a border at either end
    _mark_word_bytes(text, word[1:-1])
    begins = word[1:] > word[:-1]  # at each offset from 0 to size
    ends = word[1:] < word[:-1]
    inner = offsets[(offsets > 0) & (offsets < size)]
    begins[inner], ends[inner] = word[inner + 1], word[inner]  # a word ends where its document ends
    starts, length = np.flatnonzero(begins), np.flatnonzero(ends)
    length -= starts
    padded = np.zeros(size + 8, np.uint8)
    padded[:size] = text
    eight_at = np.ndarray((size + 1,), "<u8", padded, strides=(1,))
    hashes = eight_at[starts] & _LOW_BYTES[np.minimum(length, 8)]
    longer, done = np.flatnonzero(length > 8), 8
    while len(longer) and done < _LONG_WORD_BYTES:
        left = length[longer] - done
        eight = eight_at[starts[longer] + done] & _LOW_BYTES[np.minimum(left, 8)]
        hashes[longer] = _half_mix(hashes[longer]) + eight
        longer, done = longer[left > 8], done + 8
    for place in longer.tolist():
        start = int(starts[place])
        hashes[place] = xxhash.xxh3_64_intdigest(text[start : start + int(length[place])].tobytes())
    return _mix(hashes), starts.astype(np.int64, copy=False)


def _mark_word_bytes(text: U8, word: npt.NDArray[np.bool_]) -> None:
    """Mark letters, digits, `_`, and every byte of a non-ASCII character, by arithmetic: a table is slower."""
    np.less((text | np.uint8(32)) - np.uint8(97), 26, out=word)
    word |= text - np.uint8(48) < 10
    word |= text == 95
    word |= text >= 128


def _least_of_bins(shingles: U64, starts: I64, seed: int) -> U32:
    """uint32[documents, BINS]: the lowest rank of each document's shingles in every bin."""
    documents = len(starts) - 1
    scrambled = shingles * _scramble(seed)
    bin_bits = BINS.bit_length() - 1
    cell = (scrambled >> np.uint64(64 - bin_bits)).astype(np.int64)
    cell += np.repeat(np.arange(documents) * BINS, np.diff(starts))
    rank = (scrambled >> np.uint64(32 - bin_bits)).astype(np.uint32)
    least = np.full(documents * BINS, _EMPTY, np.uint32)
    np.minimum.at(least, cell, rank)
    return least.reshape(documents, BINS)


def _band_keys(least_DK: U32, config: MinHashConfig) -> U32:
    """One key per document and band: equal if all of the band's hashes are equal, and seldom otherwise."""
    hashes = 1 << (config.hashes - 1).bit_length()
    coarse_DH = least_DK.reshape(len(least_DK), hashes, BINS // hashes).min(axis=2)
    _fill_empty(coarse_DH, config.seed)
    rows_DBR = coarse_DH[:, : config.hashes].reshape(-1, config.bands, config.rows_per_band)
    keys_DB = np.zeros(rows_DBR.shape[:2], np.uint64)
    for row in range(config.rows_per_band):
        keys_DB = _half_mix(keys_DB ^ rows_DBR[:, :, row])
    return (_mix(keys_DB) >> np.uint64(32)).astype(np.uint32)


def _fill_empty(least_DH: U32, seed: int) -> None:
    """Give every empty bin the value of the first filled one in its own random order of bins, in place.

    A document must have a filled bin.
    """
    filled_DH, hashes = least_DH.copy(), least_DH.shape[1]
    document, empty = np.nonzero(least_DH == _EMPTY)
    for probe in _probes(hashes, seed):
        if not len(document):
            return
        value = filled_DH[document, probe[empty]]
        least_DH[document, empty] = value
        left = value == _EMPTY
        document, empty = document[left], empty[left]


@lru_cache(maxsize=4)
def _probes(hashes: int, seed: int) -> npt.NDArray[np.int64]:
    """int64[probes, hashes]: the bins that an empty one tries in turn: `_PROBES` random ones, then all others."""
    generator = np.random.Generator(np.random.PCG64(seed))
    neighbours = (np.arange(hashes) + np.arange(1, hashes)[:, None]) % hashes
    return np.concatenate([generator.integers(0, hashes, (_PROBES, hashes)), neighbours])


@lru_cache(maxsize=8)
def _scramble(seed: int) -> np.uint64:
    """An odd number; multiplying by it permutes the 64-bit numbers, differently for each seed."""
    generator = np.random.Generator(np.random.PCG64(seed))
    return np.uint64(generator.integers(0, 1 << 63, dtype=np.uint64) * np.uint64(2) + np.uint64(1))


def _string_buffers(contents: pa.Array) -> tuple[U8, I64]:
    """Zero-copy view of the array's UTF-8, and the boundaries of its strings as int64."""
    wide = pa.types.is_large_string(contents.type)
    _, offset_buffer, value_buffer = contents.buffers()
    borders = np.frombuffer(offset_buffer, np.int64 if wide else np.int32)
    offsets: I64 = borders[contents.offset : contents.offset + len(contents) + 1].astype(np.int64)
    values = np.frombuffer(value_buffer, np.uint8) if value_buffer is not None else np.zeros(0, np.uint8)
    return values, offsets


def _half_mix(values: U64) -> U64:
    mixed = values ^ (values >> np.uint64(32))
    mixed *= _MIX_MULTIPLIER
    return mixed


def _mix(values: U64) -> U64:
    mixed = _half_mix(values)
    mixed ^= mixed >> np.uint64(32)
    mixed *= _MIX_MULTIPLIER
    mixed ^= mixed >> np.uint64(32)
    return mixed
