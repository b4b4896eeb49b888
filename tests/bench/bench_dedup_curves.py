"""How well signatures estimate Jaccard similarity, and which pairs share a band, by their true similarity.

In: a folder of Parquet tables. Real files are paired with copies of themselves in which random runs of lines are
deleted or replaced, so that there are pairs of every similarity. Out: the error of the estimate, beside independent
permutations of four bytes a hash; and the share of the pairs that meet in a band, for several choices of bands.

Example: python -m tests.bench.bench_dedup_curves --tables /tmp/corpus/tables --output results
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cert_ray.dedup.minhash import I64, U32, MinHashConfig, agreement, shingle_hashes, signatures
from tests.bench.inputs import sample_texts
from tests.bench.measuring import markdown, publish

BANDS = ((14, 8), (20, 6), (22, 5), (25, 5), (32, 4))
PERMUTATIONS = 112  # those of 14 bands of 8
SIMILARITIES = ((0.5, 0.6), (0.6, 0.7), (0.7, 0.75), (0.75, 0.8), (0.8, 0.9), (0.7, 1.01))


def main() -> None:
    """Measure both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--documents", type=int, default=4_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    draw = np.random.default_rng(given.seed)
    originals = sample_texts(given.tables, given.documents, given.seed)
    texts = [text for original in originals for text in (original, edited(original, draw))]
    config = MinHashConfig()
    sets = [np.unique(shingles(text, config)) for text in texts]
    left = np.array([row for row in range(0, len(texts), 2) if len(sets[row]) and len(sets[row + 1])])
    shared = np.array([len(np.intersect1d(sets[row], sets[row + 1], assume_unique=True)) for row in left])
    sizes = np.array([len(row) for row in sets])
    exact = shared / (sizes[left] + sizes[left + 1] - shared)
    figures = {"pairs": len(left), "error": errors(texts, sets, left, exact), "meet": meetings(texts, left, exact)}
    publish(
        given.output, "dedup_curves", "python -m tests.bench.bench_dedup_curves " + " ".join(sys.argv[1:]),
        [error_table(figures["error"], len(left)), meeting_table(figures["meet"])], figures,
    )  # fmt: skip


def edited(text: str, draw: np.random.Generator) -> str:
    """`text` with 8 to 45% of its lines deleted or replaced, in runs of up to a twelfth of them."""
    lines, touched = text.split("\n"), 0
    most, wanted = max(1, len(lines) // 12), draw.uniform(0.08, 0.45) * text.count("\n")
    while touched < wanted:
        run, start = int(draw.integers(1, most + 1)), int(draw.integers(len(lines) + 1))
        fresh = [f"v{draw.integers(1 << 30)} = {draw.integers(1 << 30)} + w{draw.integers(1 << 30)}"] * (run // 2)
        lines[start : start + run] = fresh
        touched += run
    return "\n".join(lines)


def shingles(text: str, config: MinHashConfig) -> npt.NDArray[np.uint64]:
    """The hashes of a text's shingles."""
    encoded = np.frombuffer(text.encode(), np.uint8)
    return shingle_hashes(encoded, np.array([0, len(encoded)]), config.shingle_tokens)[0]


def permuted(sets: list[npt.NDArray[np.uint64]], seed: int) -> U32:
    """The least value of each document's shingles under `PERMUTATIONS` of 32 bits."""
    draw = np.random.default_rng(seed)
    factors = draw.integers(0, 1 << 32, PERMUTATIONS, np.uint32) | np.uint32(1)
    terms = draw.integers(0, 1 << 32, PERMUTATIONS, np.uint32)
    least = np.full((len(sets), PERMUTATIONS), 0xFFFFFFFF, np.uint32)
    for row, hashes in enumerate(sets):
        if len(hashes):
            values = (hashes >> np.uint64(32)).astype(np.uint32)
            least[row] = (values[None, :] * factors[:, None] + terms[:, None]).min(axis=1)
    return least


def errors(
    texts: list[str], sets: list[npt.NDArray[np.uint64]], left: I64, exact: npt.NDArray[np.float64]
) -> dict[str, tuple[float, float, float, float]]:
    """Of either signature: root mean square error and bias at 0.6 to 0.8; recall and precision of "at least 0.7"."""
    signature_DK, _, _ = signatures(pa.array(texts), MinHashConfig())
    least = permuted(sets, seed=1)
    estimates = {
        "512 bins of one byte": agreement(signature_DK, left, left + 1),
        f"{PERMUTATIONS} permutations of four bytes": (least[left] == least[left + 1]).mean(axis=1),
    }
    near, similar = (exact > 0.6) & (exact < 0.8), exact >= 0.7
    return {
        name: (
            float(np.sqrt(np.mean((estimate - exact)[near] ** 2))),
            float(np.mean((estimate - exact)[near])),
            float((estimate >= 0.7)[similar].mean()),
            float(similar[estimate >= 0.7].mean()),
        )
        for name, estimate in estimates.items()
    }


def meetings(texts: list[str], left: I64, exact: npt.NDArray[np.float64]) -> dict[str, list[float]]:
    """By choice of bands, the share of the pairs of each range that have an equal key."""
    found: dict[str, list[float]] = {}
    for bands, rows in BANDS:
        _, keys_DB, _ = signatures(pa.array(texts), MinHashConfig(bands=bands, rows_per_band=rows))
        meet = (keys_DB[left] == keys_DB[left + 1]).any(axis=1)
        found[f"{bands} x {rows}"] = [float(meet[(exact >= low) & (exact < high)].mean()) for low, high in SIMILARITIES]
    return found


def error_table(figures: dict[str, tuple[float, float, float, float]], pairs: int) -> str:
    """The errors as Markdown."""
    headers = [
        f"{pairs:,} pairs",
        "error at 0.6 to 0.8, RMS",
        "bias",
        "of those from 0.7 on, estimated so",
        "of those estimated so, from 0.7 on",
    ]
    return markdown(headers, [(name, *(f"{value:.4f}" for value in row)) for name, row in figures.items()])


def meeting_table(figures: dict[str, list[float]]) -> str:
    """The shares as Markdown, with the theory's figure at 0.7."""
    ranges = [f"{low} to {min(high, 1)}" for low, high in SIMILARITIES]
    rows: list[Any] = []
    for name, shares in figures.items():
        bands, _, of = name.partition(" x ")
        theory = 1 - (1 - 0.7 ** int(of)) ** int(bands)
        rows.append((name, *(f"{share:.3f}" for share in shares), f"{theory:.3f}"))
    return markdown(["pairs that share a band, by similarity", *ranges, "theory at 0.7"], rows)


if __name__ == "__main__":
    main()
