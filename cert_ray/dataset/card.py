"""The dataset card: what went in, what came out, why the rest did not, in pictures and numbers.

In: the manifest about to be written, and the shards' statistics. Out: `card/card.md`, `card/card.html` (needs no
network: the pictures are embedded) and the pictures as SVG. Only the examples are read from the shards themselves. So
the card of a large dataset costs reading one small JSON file per shard, and no memory for its rows.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from markupsafe import Markup

from cert_ray import storage
from cert_ray.dataset.pairs import COLUMNS, Block, blocks_of
from cert_ray.dataset.statistics import (
    BINS_PER_OCTAVE,
    Statistics,
    collect_statistics,
    file_name,
    lower_edge,
    median,
)
from cert_ray.manifests import Manifest
from cert_ray.schemas import DropReason
from cert_ray.shards.units import damage_named
from cert_ray.sketching.anonymize import SketchKind

# The step of the flow that drops files for each reason. Reasons not listed here count for the first step.
STEPS: dict[str, frozenset[str]] = {
    "read": frozenset(
        {
            DropReason.UNREADABLE,
            DropReason.TOO_LARGE,
            DropReason.BINARY,
            DropReason.UNDECODABLE,
            DropReason.UNSAFE_MEMBER_PATH,
            DropReason.DAMAGED_ARCHIVE,
            DropReason.BAD_RECORD,
        }
    ),
    "allowed by licence": frozenset({"licence_not_allowed", "licence_unknown"}),
    "clean": frozenset(
        {
            DropReason.EMPTY,
            DropReason.PATH_EXCLUDED,
            DropReason.GENERATED,
            DropReason.LINES_TOO_LONG,
            DropReason.TOO_FEW_LINES,
            DropReason.TOO_LITTLE_CODE,
            DropReason.MOSTLY_DATA,
            DropReason.MOSTLY_NOT_ASCII,
        }
    ),
    "Python 3": frozenset({DropReason.NOT_PYTHON_3, DropReason.TOO_DEEPLY_NESTED}),
    "free of benchmarks": frozenset({"contaminated"}),
    "not an exact copy": frozenset({DropReason.EXACT_DUPLICATE}),
    "not a near copy": frozenset({DropReason.NEAR_DUPLICATE}),
    "sketched": frozenset({DropReason.UNSKETCHABLE}),
    "not taken down": frozenset({DropReason.REMOVED_ON_REQUEST}),
}
_TOP_LIBRARIES = 20
_EXAMPLES = 5
# Sizes of an example that fits on a screen and shows several kinds of placeholders. Assumed.
_EXAMPLE_BYTES = (300, 1_800)
_EXAMPLE_SHARDS = 5
_LOOKED_AT = 1_000  # rows of each such shard
_BAR_BINS = BINS_PER_OCTAVE // 4  # of the statistics' bins in one bar
_VERB = "preprocess"  # the verb that makes the dataset
_COLOUR, _PALE = "#3b6ea5", "#d9e3ee"


@dataclass(frozen=True, slots=True)
class Step:
    """A step of the flow: how many files are left after it, and how many it dropped."""

    name: str
    left: int
    dropped: int


@dataclass(frozen=True, slots=True)
class Example:
    """A file beside its sketch."""

    name: str
    blocks: list[Block]


def funnel(manifest: Manifest) -> list[Step]:
    """Files left after each step, from those read to those kept; steps that drop nothing are left out."""
    known = frozenset().union(*STEPS.values())
    left = manifest.rows_read
    steps = [Step("files", left, 0)]
    for number, (name, reasons) in enumerate(STEPS.items()):
        dropped = sum(
            count
            for reason, count in manifest.dropped.items()
            if reason in reasons or (not number and reason not in known)
        )
        if dropped:
            left -= dropped
            steps.append(Step(name, left, dropped))
    return steps


def examples(folder: str, manifest: Manifest) -> list[Example]:
    """Short files with several kinds of placeholders, from shards spread over the dataset; deterministic.

    Raises:
        ShardCorruptError: when one of these shards is damaged.
    """
    kind = SketchKind(manifest.config.get("sketch_kind", SketchKind.CONSTANTS))
    filled = [shard.shard for shard in manifest.shards if shard.rows_kept]
    places = {round(place) for place in np.linspace(0, len(filled) - 1, _EXAMPLE_SHARDS)} if filled else set()
    found = [_candidates(folder, filled[place]) for place in sorted(places)]
    turns = (rows[turn] for turn in range(_EXAMPLES) for rows in found if turn < len(rows))
    return [
        Example(file_name(row["repository"], row["path"]), blocks_of(row, kind))
        for _, row in zip(range(_EXAMPLES), turns, strict=False)
    ]


def _candidates(folder: str, shard: str) -> list[dict[str, Any]]:
    """The most telling of the shard's first rows, best first, at most as many as the card has examples."""
    url = storage.join(folder, f"{shard}.parquet")
    with damage_named(folder, shard, _VERB):
        best = _most_telling(storage.read_rows(url, range(_LOOKED_AT), ["placeholders", "size_bytes"]).combine_chunks())
        rows = dict(zip(sorted(best), storage.read_rows(url, sorted(best), COLUMNS).to_pylist(), strict=True))
    return [rows[row] for row in best]


def _most_telling(table: pa.Table) -> list[int]:
    """The rows of `table` that show the most kinds of placeholders, best first."""
    sizes = table.column("size_bytes").to_numpy()
    lists = table.column("placeholders")
    parents = pc.list_parent_indices(lists).to_numpy()
    kinds = pc.struct_field(pc.list_flatten(lists), "kind").combine_chunks().dictionary_encode().indices.to_numpy()
    variety = np.zeros(len(table), np.int64)
    pairs = np.unique(np.stack([parents, kinds.astype(np.int64)]), axis=1)[0]
    np.add.at(variety, pairs, 1)
    fits = (sizes >= _EXAMPLE_BYTES[0]) & (sizes <= _EXAMPLE_BYTES[1])
    # If no file fits, the shortest ones are taken.
    best: list[int] = np.lexsort((np.arange(len(table)), np.where(fits, 0, sizes), -variety * fits)).tolist()
    return best[:_EXAMPLES]


def write_card(folder: str, manifest: Manifest) -> None:
    """Write the card below `folder`/card.

    Raises:
        ShardCorruptError: when a shard that it shows examples of is damaged, or the counts of any shard.
    """
    statistics = collect_statistics(folder, manifest)
    top_libraries = sorted(statistics.libraries.items(), key=lambda item: (-item[1], item[0]))[:_TOP_LIBRARIES]
    pictures = {
        "funnel": _funnel_picture(funnel(manifest)),
        "drops": _bars("Files dropped, by reason", "files", _largest_first(manifest.dropped)),
        "sizes": _histogram("Size of a file", "bytes", statistics.size_bytes),
        "tokens": _histogram("Lexical tokens of a file", "tokens", statistics.tokens),
        "libraries": _bars("Libraries imported", "files", dict(top_libraries), statistics.files),
        "clusters": _bars("Files that one survivor stands for", "survivors", _classes(statistics.cluster_sizes)),
        "placeholders": _bars("Placeholders, by kind", "placeholders", _largest_first(statistics.placeholders)),
    }
    card = storage.join(folder, "card")
    for name, svg in pictures.items():
        storage.write_text(storage.join(card, f"{name}.svg"), svg)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("cert_ray.dataset", ""),
        autoescape=jinja2.select_autoescape(["html.j2"], default=False),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = "{:,}".format
    environment.filters["words"] = lambda name: name.replace("_", " ")
    values: dict[str, Any] = {
        "manifest": manifest,
        "statistics": statistics,
        "figures": _figures(manifest, statistics),
        "steps": funnel(manifest),
        "counts": {_label(name): count for name, count in manifest.counts.items() if name not in _SHOWN_COUNTS},
        "notes": dict(_flat(manifest.notes)),
        "pictures": {name: Markup(svg[svg.index("<svg") :]) for name, svg in pictures.items()},
        "libraries": top_libraries,
        "examples": examples(folder, manifest),
    }
    for name in ("card.md", "card.html"):
        storage.write_text(storage.join(card, name), environment.get_template(f"{name}.j2").render(values))


_SHOWN_COUNTS = {"content_bytes", "placeholders"}  # shown among the figures


def _figures(manifest: Manifest, statistics: Statistics) -> dict[str, str]:
    kept_share = manifest.rows_kept / manifest.rows_read if manifest.rows_read else 0
    return {
        "files read": f"{manifest.rows_read:,}",
        "files kept": f"{manifest.rows_kept:,} ({kept_share:.1%})",
        "text kept": _bytes(manifest.counts.get("content_bytes", 0)),
        "median file": _bytes(median(statistics.size_bytes)),
        "lexical tokens": f"{statistics.tokens_total:,}",
        "placeholders": f"{manifest.counts.get('placeholders', 0):,}",
    }


def _label(count: str) -> str:
    """The readable name of one of the manifest's counts."""
    kind = count.removeprefix("redacted_")
    return kind.replace("_", " ") if kind == count else f"secrets redacted: {kind.replace('_', ' ')}"


def _bytes(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


def _flat(notes: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested notes as (path, text) lines."""
    for name, value in notes.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}: ")
        else:
            shown = ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
            yield f"{prefix}{name}", f"{shown:,}" if isinstance(shown, int) else str(shown)


def _largest_first(counts: Mapping[str, int]) -> dict[str, int]:
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return {name.replace("_", " "): count for name, count in ordered}


def _classes(sizes: Mapping[int, int]) -> dict[str, int]:
    """Cluster sizes grouped by powers of two."""
    classes: Counter[int] = Counter()
    for size, count in sizes.items():
        classes[size.bit_length() - 1] += count
    names = ((f"{1 << power:,}", f"{(2 << power) - 1:,}", count) for power, count in sorted(classes.items()))
    return {low if low == high else f"{low} to {high}": count for low, high, count in names}


def _funnel_picture(steps: list[Step]) -> str:
    figure, axes = _figure("From files read to files kept", height=0.42 * len(steps) + 0.7)
    names = [step.name for step in steps]
    left = [step.left for step in steps]
    axes.barh(names, left, color=_COLOUR, height=0.7)
    axes.barh(names, [step.dropped for step in steps], left=left, color=_PALE, height=0.7)
    for row, step in enumerate(steps):
        lost = f"   − {step.dropped:,}" if step.dropped else ""
        axes.text(step.left + step.dropped, row, f"  {step.left:,}{lost}", va="center", fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, max(1, steps[0].left) * 1.25)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    return _svg(figure)


def _bars(title: str, unit: str, counts: Mapping[str, int], total: int | None = None) -> str:
    """A bar for each of `counts`, with its share of `total` (default: their sum)."""
    figure, axes = _figure(title, height=0.27 * len(counts) + 1.0)
    total = total or sum(counts.values())
    axes.barh(list(counts), list(counts.values()), color=_COLOUR, height=0.7)
    for row, count in enumerate(counts.values()):
        axes.text(count, row, f" {count:,}  {count / total:.1%}", va="center", fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, max(1, *counts.values(), 0) * 1.2)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.set_xlabel(unit, fontsize=9)
    return _svg(figure)


def _histogram(title: str, unit: str, bins: Mapping[int, int]) -> str:
    figure, axes = _figure(title, height=2.8)
    bars: Counter[int] = Counter()
    for number, count in bins.items():
        bars[number // _BAR_BINS] += count
    if bars:
        first, last = min(bars), max(bars)
        edges = [lower_edge(number * _BAR_BINS) for number in range(first, last + 2)]
        counts = [bars[number] for number in range(first, last + 1)]
        axes.bar(
            edges[:-1], counts, width=np.diff(edges), align="edge", color=_COLOUR, edgecolor="white", linewidth=0.4
        )
        middle = median(bins)
        axes.axvline(middle, color="#c0392b", linewidth=1, linestyle="--")
        axes.text(middle, 1.0, f" median {middle:,}", transform=axes.get_xaxis_transform(), va="top", fontsize=8)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlabel(unit, fontsize=9)
    axes.set_ylabel("files", fontsize=9)
    return _svg(figure)


def _figure(title: str, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # without pyplot: no global state, no display

    figure = Figure(figsize=(7, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)
    return figure, axes


def _svg(figure: Any) -> str:
    import matplotlib as mpl

    stream = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "cert-ray"}):  # otherwise its ids differ from run to run
        figure.savefig(stream, format="svg", metadata={"Date": None}, transparent=True)
    return stream.getvalue()
