"""Dashboards as pictures: what Grafana would show, drawn by matplotlib from scraped samples.

In: `Answered` queries of one dashboard, in its panels' order. Out: a PNG, two graphs in a row.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import matplotlib.ticker
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

if TYPE_CHECKING:
    from tests.dashboards.scrape import Answered

_LEGENDS = 8  # the others are counted
_UNITS = {
    "percentunit": matplotlib.ticker.PercentFormatter(1.0),
    "percent": matplotlib.ticker.PercentFormatter(100.0),
    "bytes": matplotlib.ticker.EngFormatter("B"),
    "s": matplotlib.ticker.EngFormatter("s"),
}


def draw_dashboard(title: str, answers: Sequence[Answered]) -> bytes:
    """The dashboard as a PNG; an empty panel says why."""
    panels: dict[str, list[Answered]] = {}
    for answer in answers:
        panels.setdefault(answer.panel, []).append(answer)
    times = [at for one in answers for _, values in one.series for at, _ in values] or [0.0, 1.0]
    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(15, 3.4 * rows), layout="constrained")
    figure.suptitle(f"cert-ray: {title}", fontsize=14)
    for place, (name, queries) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(rows, 2, place)
        _draw(axes, name, queries, min(times))
        axes.set_xlim(0, max(times) - min(times))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    written = io.BytesIO()
    Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").quantize(64).save(written, "PNG", optimize=True)
    return written.getvalue()


def _draw(axes: Axes, name: str, queries: Sequence[Answered], begins_s: float) -> None:
    axes.set_title(name, loc="left", fontsize=10)
    drawn = 0
    for query in queries:
        for labels, values in query.series:
            if values:
                drawn += 1
                label = legend(query.legend, labels) if drawn <= _LEGENDS else None
                style = "." if len(values) == 1 else "-"
                axes.plot([at - begins_s for at, _ in values], [value for _, value in values], style, label=label)
    if not drawn:
        why = next((query.why_empty for query in queries if query.why_empty), None) or "no data"
        axes.text(0.5, 0.5, why, ha="center", va="center", transform=axes.transAxes, color="grey")
        return
    top = max((value for query in queries for _, values in query.series for _, value in values), default=0.0)
    if queries[0].from_zero:
        axes.set_ylim(0, 1.1 * top or 1.0)
    axes.set_xlabel("s", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    plain = matplotlib.ticker.EngFormatter() if top >= 1_000 else matplotlib.ticker.ScalarFormatter()
    axes.yaxis.set_major_formatter(_UNITS.get(queries[0].unit, plain))
    more = f"and {drawn - _LEGENDS} more" if drawn > _LEGENDS else None
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=7, title=more, title_fontsize=7)


def legend(text: str, labels: Mapping[str, str]) -> str:
    """Grafana's legend: each `{{label}}` replaced by its value."""
    return re.sub(r"\{\{\s*(\w+)\s*\}\}", lambda found: labels.get(found[1], ""), text)
