"""Finished evaluations side by side: runs in; statistics, and reports as Markdown or HTML, out. Writes nothing.

`compare_runs` compares two, problem by problem; `render_table` shows any number, beside published scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cert_ray.errors import ConfigError
from cert_ray.evaluation.published import published_for
from cert_ray.evaluation.report import ends, percent, template
from cert_ray.evaluation.runs import Run
from cert_ray.evaluation.statistics import Comparison, compare


@dataclass(frozen=True, slots=True)
class RunComparison:
    """A second run against a first, over the same benchmarks: one `Comparison` for each k that both scored."""

    first: Sequence[Run]
    second: Sequence[Run]
    by_k: tuple[Comparison, ...]


def compare_runs(first: Sequence[Run], second: Sequence[Run], ks: Sequence[int] | None = None) -> RunComparison:
    """Compare over all benchmarks together. `ks` None: every k that all of them scored.

    Raises:
        ConfigError: when the runs are not over the same problems, or have no k in common.
    """
    for one, other in zip(first, second, strict=False):
        if one.summary["benchmark"]["checksum"] != other.summary["benchmark"]["checksum"]:
            raise ConfigError(
                f"compare: {one.folder} and {other.folder} were scored with different problem files "
                f"({one.benchmark}, {other.benchmark}). Evaluate both with the same --problems."
            )
    common = set.intersection(*(set(run.ks) for run in (*first, *second)))
    wanted = sorted(common if ks is None else set(ks))
    if not wanted or not set(wanted) <= common:
        raise ConfigError(
            f"compare: k must be among {sorted(common)}, which all runs scored; for another k, draw more samples"
        )
    before, after = ([run.counts for run in runs] for runs in (first, second))
    try:
        return RunComparison(first, second, tuple(compare(before, after, k) for k in wanted))
    except ValueError as error:
        raise ConfigError(f"compare: {error}") from error


def render_comparison(comparison: RunComparison, form: str) -> str:
    """The comparison as "md" or "html"."""
    return template(f"compare.{form}.j2").render(
        comparison=comparison,
        labels=[_label(runs) for runs in (comparison.first, comparison.second)],
        cells=[_cells(one, other) for one, other in zip(comparison.first, comparison.second, strict=True)],
    )


def render_table(runs: Sequence[Run], form: str) -> str:
    """All `runs` by benchmark, in their order, with published scores below them, as "md" or "html"."""
    benchmarks = list(dict.fromkeys(run.benchmark for run in runs))
    return template(f"table.{form}.j2").render(tables=[_table(one, runs) for one in benchmarks])


def _table(benchmark: str, runs: Sequence[Run]) -> dict[str, Any]:
    measured = [run for run in runs if run.benchmark == benchmark]
    published = published_for(benchmark)
    ks = sorted({k for run in measured for k in run.ks} | {k for one in published for k in one.pass_at_k})
    rows = [
        {
            "label": run.label,
            "cells": [_cell(run, k) for k in ks],
            "temperature": "" if run.temperature is None else run.temperature,
            "source": "measured",
        }
        for run in measured
    ]
    rows += [
        {
            "label": one.model,
            "cells": [f"{one.pass_at_k[k]:g}" if k in one.pass_at_k else "" for k in ks],
            "temperature": "",
            "source": "published",
        }
        for one in published
    ]
    return {"benchmark": benchmark, "ks": ks, "rows": rows}


def _cell(run: Run, k: int) -> str:
    if k not in run.ks:
        return ""
    found = run.interval(k)
    return f"{percent(found.value)} ({ends((found.low, found.high))})"


def summarise(comparison: RunComparison) -> list[dict[str, Any]]:
    """The figures as JSON-ready rows, one for each k."""
    return [
        {
            "k": one.k,
            "first": one.first,
            "second": one.second,
            "difference": one.difference.value,
            "low": one.difference.low,
            "high": one.difference.high,
            "p_value": one.p_value,
            "test": one.test,
            "wins": len(one.wins),
            "losses": len(one.losses),
            "ties": one.ties,
            "detectable": one.detectable,
        }
        for one in comparison.by_k
    ]


def _label(runs: Sequence[Run]) -> str:
    temperatures = ", ".join(str(run.temperature) for run in runs if run.temperature is not None)
    return f"{runs[0].label} ({runs[0].folder}{f'; temperature {temperatures}' if temperatures else ''})"


def _cells(first: Run, second: Run) -> dict[str, Any]:
    """The matrix of one benchmark: for each problem the share that passed in each run, and which run is ahead."""
    rows = []
    for task_id, (samples, passed) in first.counts.items():
        others, other_passed = second.counts[task_id]
        shares = passed / samples, other_passed / others
        ahead = "tie" if shares[0] == shares[1] else "first" if shares[0] > shares[1] else "second"
        texts = f"{passed}/{samples}", f"{other_passed}/{others}"
        rows.append({"task_id": task_id, "shares": shares, "texts": texts, "ahead": ahead})
    return {"benchmark": first.benchmark, "rows": rows}
