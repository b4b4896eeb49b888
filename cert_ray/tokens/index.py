"""The index of a pack: where each piece of each document lies, weights and held-out marks, as arrays over all shards.

In: the table of pieces of each shard (`COLUMNS` of schemas.PIECES). Out: `Documents` and `Pieces`. For a large pack
these take gigabytes. So they are written once per machine, shard by shard, into a folder below TMPDIR, and every
process memory-maps them: the machine holds one copy, and a later start finds it. `shards` handles the tokens.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

COLUMNS = ["document", "tokens", "weight", "held_out", "atomic"]  # that the index is built from
_OF_A_PIECE = {"start": "<i8", "tokens": "<i4", "atomic": "?"}
_OF_A_DOCUMENT = {"weight": "<f8", "cumulative": "<f8", "size": "<i8", "held_out": "?", "first": "<i8"}
_DTYPES = {name: np.dtype(kind) for name, kind in (_OF_A_PIECE | _OF_A_DOCUMENT).items()}


Part = dict[str, npt.NDArray[Any]]  # arrays by name


@dataclass(frozen=True, slots=True)
class Documents:
    """One entry per document, in the order of shards and of rows within them; its index is the document's ordinal."""

    weight: FloatArray  # sampling weight
    cumulative: FloatArray  # sum of the weights up to and including it; held-out documents add nothing
    tokens: IntArray  # tokens of the document, the closing <|endoftext|> included
    held_out: BoolArray  # never trained on


@dataclass(frozen=True, slots=True)
class Pieces:
    """One entry per piece; a document's pieces are adjacent, and so are their tokens.

    Addresses count tokens over all shards, as if their files were joined in order.
    """

    first: IntArray  # documents + 1 entries: pieces first[d] to first[d + 1] belong to document d
    start: IntArray  # address of the piece's first token
    tokens: npt.NDArray[np.int32]
    atomic: BoolArray  # must not be cut at a row's border


def in_memory(shards: Iterable[Part]) -> tuple[Documents, Pieces]:
    """The index as arrays in this process's memory."""
    parts = list(_joined(shards))
    return _index({name: np.concatenate([part[name] for part in parts]) for name in _DTYPES})


def size_bytes(pieces: int, documents: int) -> int:
    """How much disk space `write` takes."""
    each = [(pieces, _OF_A_PIECE), (documents + 1, _OF_A_DOCUMENT)]
    return sum(count * sum(_DTYPES[name].itemsize for name in names) for count, names in each)


def write(shards: Iterable[Part], folder: Path) -> None:
    """Write the index as `folder`, one file per array, whole or not at all. Only one process may do so at a time."""
    arriving = folder.with_suffix(".partial")
    shutil.rmtree(arriving, ignore_errors=True)
    arriving.mkdir()
    files = {name: (arriving / name).open("wb") for name in _DTYPES}
    try:
        for part in _joined(shards):
            for name, values in part.items():
                files[name].write(values.data)
    finally:
        for file in files.values():
            file.close()
    arriving.rename(folder)


def mapped(folder: Path) -> tuple[Documents, Pieces]:
    """The index that `write` wrote, memory-mapped."""
    return _index({name: np.memmap(folder / name, dtype, mode="r") for name, dtype in _DTYPES.items()})


def _index(arrays: dict[str, npt.NDArray[np.generic]]) -> tuple[Documents, Pieces]:
    documents = Documents(arrays["weight"], arrays["cumulative"], arrays["size"], arrays["held_out"])  # type: ignore[arg-type]
    return documents, Pieces(arrays["first"], arrays["start"], arrays["tokens"], arrays["atomic"])  # type: ignore[arg-type]


def part_of(table: pa.Table) -> Part:
    """The index of one shard on its own. This is most of the work, and shards can be done in any order."""
    tokens = table["tokens"].to_numpy().astype(np.int64)
    first = np.flatnonzero(np.diff(table["document"].to_numpy(), prepend=-1))
    bounds = np.append(first, len(tokens))
    ends = np.cumsum(tokens)
    totals = np.append(0, ends)
    return {
        "start": ends - tokens,
        "tokens": tokens.astype(_DTYPES["tokens"]),
        "atomic": table["atomic"].to_numpy(zero_copy_only=False),
        "weight": table["weight"].to_numpy()[first],
        "size": totals[bounds[1:]] - totals[bounds[:-1]],
        "held_out": table["held_out"].to_numpy(zero_copy_only=False)[first],
        "first": bounds[1:],
    }


def _joined(shards: Iterable[Part]) -> Iterator[Part]:
    """The parts with ordinals, addresses and sums continued from one shard to the next."""
    yield {name: np.zeros(1 if name == "first" else 0, dtype) for name, dtype in _DTYPES.items()}
    pieces, address, weights = 0, 0, 0.0
    for part in shards:
        cumulative = _cumulative(np.where(part["held_out"], 0.0, part["weight"]), weights)
        placed = part | {"start": part["start"] + address, "first": part["first"] + pieces, "cumulative": cumulative}
        yield {name: np.ascontiguousarray(placed[name], dtype) for name, dtype in _DTYPES.items()}
        pieces, address = pieces + len(part["tokens"]), address + int(part["size"].sum())
        weights = float(cumulative[-1]) if len(cumulative) else weights


def _cumulative(weights: FloatArray, before: float) -> FloatArray:
    """Running sums that start at `before`. Weights are added one by one, so their division into shards has no effect.

    Raises:
        ValueError: when a weight is negative or not finite.
    """
    if not np.all(np.isfinite(weights)) or np.any(weights < 0):
        raise ValueError(f"weights must be finite and not negative (of {len(weights)})")
    sums: FloatArray = np.cumsum(np.append(before, weights))[1:]
    return sums
