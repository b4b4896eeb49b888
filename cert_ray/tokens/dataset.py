"""Reading the annotated dataset: its shards, and a weighted, seeded sample of its documents.

In: the URL of a finished dataset (schemas.ANNOTATED). Out: shard files, columns, and a stream of sampled texts in
dataset order. Texts are read in small batches, so memory is bounded by 24 bytes per document and one batch of text.

The sample is drawn without replacement with probabilities that follow the sampling weights: Efraimidis and Spirakis
2006, "Weighted random sampling with a reservoir" (the documents with the smallest -ln(u) / weight). Here u comes from
the seed and the content's hash, so the sample depends neither on shards nor on order.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from cert_ray import manifests, storage
from cert_ray.errors import InputError
from cert_ray.libraries import library_counts
from cert_ray.manifests import Manifest, WrittenFile

STAGE = "dataset"
VERB = "preprocess"
_SHARD_NAME = re.compile(r"shard-[^/.]+\.parquet")  # among the manifest's files; those in drops/ do not match
_BATCH_ROWS = 256


@dataclass(frozen=True, slots=True)
class Dataset:
    """A finished annotated dataset; `digest` identifies its bytes."""

    url: str
    shards: tuple[WrittenFile, ...]
    digest: str
    files: dict[str, Any]  # `manifests.files_counted`


def open_dataset(url: str) -> Dataset:
    """The dataset at `url`.

    Raises:
        NotFinishedError, SchemaVersionError: when `url` is no finished dataset of this version.
        InputError: when it holds no document.
    """
    manifest = manifests.read_manifest(url, STAGE, VERB)
    shards = _shards(manifest)
    if not sum(shard.rows for shard in shards):
        raise InputError(url, "the dataset holds no document", "Preprocess more input; its manifest counts the drops.")
    return Dataset(url, shards, _digest(shards), manifests.files_counted(manifest))


def digest_of(url: str) -> str:
    """The digest that `open_dataset` gives the dataset at `url`, even when it holds no document.

    Raises:
        NotFinishedError, SchemaVersionError: as `open_dataset`.
    """
    return _digest(_shards(manifests.read_manifest(url, STAGE, VERB)))


def _shards(manifest: Manifest) -> tuple[WrittenFile, ...]:
    return tuple(file for file in manifest.files if _SHARD_NAME.fullmatch(file.name))


def _digest(shards: Sequence[WrittenFile]) -> str:
    lines = "\n".join(f"{shard.name} {shard.checksum}" for shard in shards)
    return str(xxhash.xxh3_128_hexdigest(lines.encode()))


def uniform_of_hash(content_hash: str, seed: int) -> float:
    """A number in (0, 1) that depends only on the content and the seed."""
    return (float(xxhash.xxh3_64_intdigest(content_hash.encode(), seed=seed)) + 0.5) / 2.0**64


@dataclass(frozen=True, slots=True)
class Sample:
    """Which rows of which shard were drawn, and how many bytes of text they hold."""

    chosen: tuple[npt.NDArray[np.bool_], ...]  # per shard, one entry per row
    documents: int
    size_bytes: int


def draw_sample(dataset: Dataset, sample_bytes: int, seed: int) -> Sample:
    """Draw documents by weight until the next one would exceed `sample_bytes`; at least one is drawn.

    Raises:
        InputError: when no document has a positive weight.
    """
    uniforms, weights, sizes = [], [], []
    for shard in dataset.shards:
        table = storage.read_parquet(storage.join(dataset.url, shard.name), ["content_hash", "weight", "size_bytes"])
        hashes = table["content_hash"].to_pylist()
        uniforms.append(np.array([uniform_of_hash(content_hash, seed) for content_hash in hashes]))
        weights.append(table["weight"].to_numpy())
        sizes.append(table["size_bytes"].to_numpy().astype(np.int64))
    chosen = choose(np.concatenate(uniforms), np.concatenate(weights), np.concatenate(sizes), sample_bytes)
    if not chosen.any():
        raise InputError(dataset.url, "no document has a positive weight", "Check the weights' options.")
    borders = np.cumsum([len(rows) for rows in sizes])[:-1]
    total = int(np.concatenate(sizes)[chosen].sum())
    return Sample(tuple(np.split(chosen, borders)), int(chosen.sum()), total)


def choose(
    uniforms: npt.NDArray[np.float64],
    weights: npt.NDArray[np.float64],
    sizes: npt.NDArray[np.int64],
    limit_bytes: int,
) -> npt.NDArray[np.bool_]:
    """Which documents to draw: at least one, otherwise as many as fit into `limit_bytes`."""
    drawable = np.flatnonzero(weights > 0)
    keys = -np.log(uniforms[drawable]) / weights[drawable]
    ordered = drawable[np.argsort(keys, kind="stable")]
    fitting = int(np.searchsorted(np.cumsum(sizes[ordered]), limit_bytes, side="right"))
    chosen = np.zeros(len(weights), np.bool_)
    chosen[ordered[: max(fitting, 1)]] = True
    return chosen


def sampled_texts(dataset: Dataset, sample: Sample) -> Iterator[str]:
    """The contents of the sampled documents, in dataset order."""
    for shard, chosen in zip(dataset.shards, sample.chosen, strict=True):
        row = 0
        with storage.open_parquet(storage.join(dataset.url, shard.name)) as table:
            for batch in table.iter_batches(_BATCH_ROWS, columns=["content"]):
                for position in np.flatnonzero(chosen[row : row + batch.num_rows]):
                    yield batch.column(0)[int(position)].as_py()
                row += batch.num_rows


def common_libraries(dataset: Dataset, count: int) -> Sequence[tuple[str, int]]:
    """The `count` libraries that the most documents import, each with its number of documents."""
    found: Counter[str] = Counter()
    for shard in dataset.shards:
        table = storage.read_parquet(storage.join(dataset.url, shard.name), ["libraries"])
        found.update(library_counts(table["libraries"]))
    return sorted(found.items(), key=lambda item: (-item[1], item[0]))[:count]
