"""The dataset card: what went in, what came out, why the rest did not, in pictures and numbers.

In: the dataset's shards and the manifest about to be written. Out: `card/card.md`, `card/card.html` (opens without a
network: pictures are inside it) and the pictures as PNG. Reads only small columns, one shard at a time.
"""

from __future__ import annotations

import base64
import io
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import jinja2
import numpy as np

from cert_ray import storage
from cert_ray.libraries import library_counts
from cert_ray.manifests import Manifest

_TOP_LIBRARIES = 20
_EXAMPLES = 5
_EXAMPLE_CHARACTERS = 1_500


@dataclass(slots=True)
class Statistics:
    """What the card shows beside the manifest."""

    sizes_bytes: list[int] = field(default_factory=list)
    cluster_sizes: Counter[int] = field(default_factory=Counter)
    libraries: Counter[str] = field(default_factory=Counter)
    placeholders: Counter[str] = field(default_factory=Counter)
    examples: list[dict[str, str]] = field(default_factory=list)


def collect_statistics(folder: str, manifest: Manifest) -> Statistics:
    """Read sizes, libraries, placeholder kinds and a few examples from the dataset's shards."""
    statistics = Statistics()
    for shard in manifest.shards:
        table = storage.read_parquet(
            storage.join(folder, f"{shard.shard}.parquet"), ["size_bytes", "cluster_size", "libraries", "placeholders"]
        )
        statistics.sizes_bytes += table.column("size_bytes").to_pylist()
        statistics.cluster_sizes.update(table.column("cluster_size").to_pylist())
        statistics.libraries.update(library_counts(table.column("libraries")))
        for placeholders in table.column("placeholders").to_pylist():
            statistics.placeholders.update(placeholder["kind"] for placeholder in placeholders)
        if len(statistics.examples) < _EXAMPLES and len(table):
            statistics.examples += _examples(storage.join(folder, f"{shard.shard}.parquet"), statistics)
    return statistics


def _examples(url: str, statistics: Statistics) -> list[dict[str, str]]:
    """The shortest files with at least three placeholders: whole examples fit a screen."""
    table = storage.read_parquet(url, ["path", "content", "sketch", "placeholders"])
    rows = [row for row in table.to_pylist() if len(row["placeholders"]) >= 3]
    rows.sort(key=lambda row: (len(row["content"]), row["path"]))
    wanted = _EXAMPLES - len(statistics.examples)
    return [
        {
            "path": row["path"],
            "content": row["content"][:_EXAMPLE_CHARACTERS],
            "sketch": row["sketch"][:_EXAMPLE_CHARACTERS],
        }
        for row in rows[:wanted]
    ]


def write_card(folder: str, manifest: Manifest) -> None:
    """Write the card below `folder`/card."""
    statistics = collect_statistics(folder, manifest)
    pictures = {
        "drops": _bars("Files dropped, by reason", "files", manifest.dropped),
        "sizes": _histogram("Size of the files kept", "bytes (log10)", statistics.sizes_bytes),
        "libraries": _bars("Libraries imported", "files", dict(statistics.libraries.most_common(_TOP_LIBRARIES))),
        "clusters": _bars("Files that one survivor stands for", "clusters", _cluster_classes(statistics.cluster_sizes)),
    }
    card = storage.join(folder, "card")
    for name, png in pictures.items():
        storage.write_bytes(storage.join(card, f"{name}.png"), png)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("cert_ray.dataset", ""),
        autoescape=jinja2.select_autoescape(["html.j2"], default=False),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    values: dict[str, Any] = {
        "manifest": manifest,
        "statistics": statistics,
        "median_bytes": int(np.median(statistics.sizes_bytes)) if statistics.sizes_bytes else 0,
        "pictures": {name: base64.b64encode(png).decode() for name, png in pictures.items()},
        "top_libraries": statistics.libraries.most_common(_TOP_LIBRARIES),
    }
    for name in ("card.md", "card.html"):
        storage.write_text(storage.join(card, name), environment.get_template(f"{name}.j2").render(values))


def _cluster_classes(sizes: Counter[int]) -> dict[str, int]:
    classes: Counter[str] = Counter()
    for size, count in sizes.items():
        low = 1 << (size.bit_length() - 1)
        classes[str(low) if low == 1 else f"{low}-{2 * low - 1}"] += count
    return dict(sorted(classes.items(), key=lambda item: int(item[0].split("-")[0])))


def _bars(title: str, unit: str, counts: dict[str, int]) -> bytes:
    figure, axes = _figure(title, height=max(1.6, 0.28 * len(counts) + 0.9))
    names = list(counts)[::-1]
    bars = axes.barh(names, [counts[name] for name in names], color="#3b6ea5")
    axes.bar_label(bars, fmt="{:,.0f}", padding=3)
    axes.set_xlabel(unit)
    return _png(figure)


def _histogram(title: str, unit: str, values: list[int]) -> bytes:
    figure, axes = _figure(title, height=3.0)
    axes.hist(np.log10(np.maximum(values, 1)), bins=40, color="#3b6ea5")
    axes.set_xlabel(unit)
    axes.set_ylabel("files")
    return _png(figure)


def _figure(title: str, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # without pyplot: no global state, no display

    figure = Figure(figsize=(8, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _png(figure: Any) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    return stream.getvalue()
