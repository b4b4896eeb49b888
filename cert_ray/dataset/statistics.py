"""What the dataset card shows of a shard, counted while the shard is made, so that the card need not read it again.

In: a shard's ANNOTATED rows, and the clusters of the documents they came from. Out: `ShardStatistics`, one small JSON
file per shard, and `Statistics`, their sum. Sizes are counted in fixed bins, sixteen per octave. So a median is right
within 2.2%, and neither memory nor a file grows with the number of rows.

Tokens here are *lexical*: a run of letters, digits, underscores and non-ASCII bytes, or one other character that is not
blank. Strings and comments count like code. No tokenizer is needed, and none would give the same counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pydantic

from cert_ray import storage
from cert_ray.config import Config
from cert_ray.errors import ShardCorruptError
from cert_ray.libraries import library_counts
from cert_ray.manifests import Manifest, WrittenFile

FOLDER = "statistics"
BINS_PER_OCTAVE = 16
_LARGEST_PER_SHARD = 20
_LARGEST = 10  # of the whole dataset; each shard lists more, so that none of these is missing
_COPIES_NAMED = 3
_CHUNK_BYTES = 4 << 20

I64 = npt.NDArray[np.int64]
_BLANK, _WORD, _SIGN = 0, 1, 2
_CLASS = np.full(256, _SIGN, np.uint8)
_CLASS[[*range(33), 127]] = _BLANK
_CLASS[[*b"0123456789_", *range(65, 91), *range(97, 123), *range(128, 256)]] = _WORD


class ClusterSample(Config):
    """A cluster of duplicates as one shard sees it. `survivor` is its survivor's number in the whole corpus."""

    survivor: int
    size: int  # documents, in the whole corpus
    kept: str | None = None  # the survivor's file, in the shard that holds it
    copies: tuple[str, ...] = ()  # some of the files it stands for


class ShardStatistics(Config):
    """One shard's counts. Bins are numbered by `bin_of`."""

    files: int
    size_bytes: dict[int, int]  # files by bin of their size
    tokens: dict[int, int]  # files by bin of their lexical tokens
    tokens_total: int
    libraries: dict[str, int]  # files that import it
    cluster_sizes: dict[int, int]  # survivors by the number of documents they stand for
    placeholders: dict[str, int]  # by kind
    largest_clusters: tuple[ClusterSample, ...] = ()


def bin_of(values: I64) -> I64:
    """The bin of each value; 0 counts as 1."""
    numbers: I64 = np.floor(np.log2(np.maximum(values, 1)) * BINS_PER_OCTAVE).astype(np.int64)
    return numbers


def lower_edge(number: int) -> float:
    """The lowest value in a bin."""
    return float(2.0 ** (number / BINS_PER_OCTAVE))


def lexical_tokens(contents: pa.ChunkedArray) -> I64:
    """int64[rows]: lexical tokens of each text, counted over the Arrow buffers."""
    counts = [_count_tokens(chunk) for chunk in contents.chunks if len(chunk)]
    return np.concatenate([np.zeros(0, np.int64), *counts])


def _count_tokens(contents: pa.StringArray) -> I64:
    _, offset_buffer, value_buffer = contents.buffers()
    width = np.int64 if pa.types.is_large_string(contents.type) else np.int32
    offsets = np.frombuffer(offset_buffer, width)[contents.offset : contents.offset + len(contents) + 1]
    offsets = offsets.astype(np.int64)
    text = np.frombuffer(value_buffer or b"", np.uint8)
    counts = np.zeros(len(contents), np.int64)
    first = 0
    while first < len(contents):
        last = max(first + 1, int(np.searchsorted(offsets, offsets[first] + _CHUNK_BYTES, side="right")) - 1)
        borders = offsets[first : last + 1] - offsets[first]
        classes = _CLASS[text[offsets[first] : offsets[last]]]
        before = np.concatenate([[np.uint8(_BLANK)], classes[:-1]])
        before[borders[:-1][borders[:-1] < len(classes)]] = _BLANK  # a word does not continue into the next text
        starts = np.flatnonzero((classes == _SIGN) | ((classes == _WORD) & (before != _WORD)))
        counts[first:last] = np.diff(np.searchsorted(starts, borders))
        first = last
    return counts


def shard_statistics(rows: pa.Table, largest: tuple[ClusterSample, ...] = ()) -> ShardStatistics:
    """Count `rows` (ANNOTATED)."""
    tokens = lexical_tokens(rows.column("content"))
    return ShardStatistics(
        files=len(rows),
        size_bytes=_binned(rows.column("size_bytes").to_numpy().astype(np.int64)),
        tokens=_binned(tokens),
        tokens_total=int(tokens.sum()),
        libraries=library_counts(rows.column("libraries")),
        cluster_sizes=_counted(rows.column("cluster_size")),
        placeholders=_counted(pc.struct_field(pc.list_flatten(rows.column("placeholders")), "kind")),
        largest_clusters=largest,
    )


def _binned(values: I64) -> dict[int, int]:
    numbers, counts = np.unique(bin_of(values), return_counts=True)
    return dict(zip(numbers.tolist(), counts.tolist(), strict=True))


def _counted(values: pa.ChunkedArray) -> dict[str, int] | dict[int, int]:
    pairs = {entry["values"]: entry["counts"] for entry in pc.value_counts(values).to_pylist()}
    return dict(sorted(pairs.items()))


def largest_clusters(documents: pa.Table, clusters: pa.Table) -> tuple[ClusterSample, ...]:
    """The largest clusters of a shard's `documents`, each with the names of some of its files in this shard."""
    size = clusters.column("cluster_size").to_numpy()
    survivor = clusters.column("survivor").to_numpy()
    keep = clusters.column("keep").to_numpy()
    present = pc.is_valid(documents.column("content")).to_numpy()
    members = np.flatnonzero(size > 1)
    members = members[np.lexsort((members, survivor[members], -size[members]))]
    _, first = np.unique(survivor[members], return_index=True)
    samples = []
    for start in np.sort(first)[:_LARGEST_PER_SHARD].tolist():
        number, documents_tied = int(survivor[members[start]]), int(size[members[start]])
        here = [row for row in members[start : start + _COPIES_NAMED + 1].tolist() if survivor[row] == number]
        kept = np.flatnonzero(keep & present & (survivor == number))  # may come after the copies named
        samples.append(
            ClusterSample(
                survivor=number,
                size=documents_tied,
                kept=_name(documents, int(kept[0])) if len(kept) else None,
                copies=tuple(_name(documents, row) for row in here if not keep[row])[:_COPIES_NAMED],
            )
        )
    return tuple(samples)


def _name(documents: pa.Table, row: int) -> str:
    return file_name(documents.column("repository")[row].as_py(), documents.column("path")[row].as_py())


def file_name(repository: str | None, path: str) -> str:
    """A file as the card names it: with its repository, if the input names one."""
    return f"{repository}: {path}" if repository else str(path)


def write_statistics(folder: str, shard: str, statistics: ShardStatistics) -> WrittenFile:
    """Write a shard's counts into the dataset `folder`; return the report's entry for the file."""
    name = f"{FOLDER}/{shard}.json"
    written = storage.write_text(storage.join(folder, name), statistics.model_dump_json() + "\n")
    return WrittenFile.of(name, written)


def read_statistics(folder: str, shard: str) -> ShardStatistics:
    """A shard's counts.

    Raises:
        ShardCorruptError: when they are missing or damaged.
    """
    url = storage.join(folder, FOLDER, f"{shard}.json")
    try:
        return ShardStatistics.model_validate_json(storage.read_bytes(url))
    except (FileNotFoundError, pydantic.ValidationError) as error:
        raise ShardCorruptError(url, "the counts of a shard", "none", "preprocess") from error


@dataclass(slots=True)
class Statistics:
    """The counts of a whole dataset: bins, library names, and a few clusters. Memory does not grow with rows."""

    files: int = 0
    tokens_total: int = 0
    size_bytes: Counter[int] = field(default_factory=Counter)
    tokens: Counter[int] = field(default_factory=Counter)
    libraries: Counter[str] = field(default_factory=Counter)
    cluster_sizes: Counter[int] = field(default_factory=Counter)
    placeholders: Counter[str] = field(default_factory=Counter)
    _clusters: dict[int, ClusterSample] = field(default_factory=dict)

    def add(self, shard: ShardStatistics) -> None:
        """Add the counts of one more shard."""
        self.files += shard.files
        self.tokens_total += shard.tokens_total
        for name in ("size_bytes", "tokens", "libraries", "cluster_sizes", "placeholders"):
            getattr(self, name).update(getattr(shard, name))
        for sample in shard.largest_clusters:
            known = self._clusters.get(sample.survivor, sample.model_copy(update={"copies": ()}))
            self._clusters[sample.survivor] = ClusterSample(
                survivor=sample.survivor,
                size=max(known.size, sample.size),
                kept=known.kept or sample.kept,
                copies=(*known.copies, *sample.copies)[:_COPIES_NAMED],
            )
        if len(self._clusters) > 64 * _LARGEST:
            self._clusters = {sample.survivor: sample for sample in self._by_size()[:_LARGEST]}

    @property
    def largest_clusters(self) -> list[ClusterSample]:
        """The clusters with the most documents, largest first."""
        return self._by_size()[:_LARGEST]

    def _by_size(self) -> list[ClusterSample]:
        return sorted(self._clusters.values(), key=lambda sample: (-sample.size, sample.survivor))


def median(bins: Mapping[int, int]) -> int:
    """The median of the values counted in `bins`, within half a bin; 0 if there are none."""
    if not bins:
        return 0
    numbers = sorted(bins)
    middle = int(np.searchsorted(np.cumsum([bins[number] for number in numbers]), sum(bins.values()) / 2))
    return round(lower_edge(numbers[middle]) * 2 ** (0.5 / BINS_PER_OCTAVE))


def collect_statistics(folder: str, manifest: Manifest) -> Statistics:
    """Add up the counts of every shard of the dataset at `folder`."""
    statistics = Statistics()
    for shard in manifest.shards:
        statistics.add(read_statistics(folder, shard.shard))
    return statistics
