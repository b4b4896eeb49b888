"""Finished evaluations, read back: a folder that `run` or `sweep` wrote in; counts, scores and labels out.

A folder holds one evaluation or one sweep: starting either removes the other's scores.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from cert_ray import storage
from cert_ray.errors import InputError
from cert_ray.evaluation.statistics import Counts, Interval, score_interval

SUMMARY, RESULTS, SWEEP = "summary.json", "results.jsonl", "sweep.json"


@dataclass(frozen=True, slots=True)
class Run:
    """One evaluation of one benchmark at one temperature. `counts` are in the benchmark's order."""

    folder: str
    summary: dict[str, Any]
    counts: dict[str, Counts]

    @property
    def benchmark(self) -> str:
        """What the problems call themselves: the part of task_id before the slash, else the file's name."""
        names = {task_id.partition("/")[0] for task_id in self.counts}
        return names.pop() if len(names) == 1 else storage.name_of(self.summary["config"]["problems"])

    @property
    def temperature(self) -> float | None:
        """The temperature it was sampled at, if known."""
        value = self.summary["config"]["temperature"]
        return None if value is None else float(value)

    @property
    def label(self) -> str:
        """Where the samples come from."""
        return label_of(self.summary["config"])

    @property
    def ks(self) -> tuple[int, ...]:
        """The k that were scored."""
        return tuple(int(k) for k in self.summary["pass_at_k"])

    def interval(self, k: int) -> Interval:
        """pass@k with its confidence interval."""
        return score_interval([list(self.counts.values())], k)


def label_of(config: dict[str, Any]) -> str:
    """Where the samples of an evaluation with these options come from, in a few words."""
    source = config.get("source") or {}
    if source:
        return ", ".join(f"{name} {value}" for name, value in source.items())
    return f"samples {config['samples']}" if config.get("samples") else "a model"


def read_run(folder: str) -> Run:
    """The finished evaluation in `folder`.

    Raises:
        InputError: when there is none, or what is there cannot be read.
    """
    summary_url = storage.join(folder, SUMMARY)
    if not storage.exists(summary_url):
        cure = "Name a folder that `cert-ray evaluate` wrote; its summary.json is written last."
        raise InputError(folder, f"no {SUMMARY} in it", cure)
    try:
        summary = json.loads(storage.read_text(summary_url))
        rows = [json.loads(line) for line in storage.read_text(storage.join(folder, RESULTS)).splitlines()]
        counts = {str(row["task_id"]): (int(row["num_samples"]), int(row["num_passed"])) for row in rows}
        run = Run(folder, summary, counts)
        _ = (run.temperature, run.label, run.ks, run.benchmark)  # raise here if the summary lacks any of these
        return run
    except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
        raise InputError(folder, f"not a finished evaluation: {error!r}", "Evaluate again.") from error


def read_runs(folder: str) -> list[Run]:
    """The evaluation in `folder`; for a sweep, each benchmark's at its best temperature, in the sweep's order.

    Raises:
        InputError: when there is none, or what is there cannot be read.
    """
    sweep_url = storage.join(folder, SWEEP)
    if not storage.exists(sweep_url):
        return [read_run(folder)]
    try:
        best = [str(one["best"]["folder"]) for one in json.loads(storage.read_text(sweep_url))["benchmarks"]]
    except (ValueError, KeyError, TypeError) as error:
        cure = "Run the same `cert-ray evaluate` again: it writes this file anew from the finished evaluations."
        raise InputError(sweep_url, f"damaged: {error!r}", cure) from error
    return [read_run(storage.join(folder, one)) for one in best]


def remove_evaluation(folder: str) -> None:
    """Remove the scores of one evaluation in `folder`, because a sweep begins there. Its samples stay."""
    _remove(folder, SUMMARY, RESULTS, "report.md", "report.html")


def remove_sweep(folder: str) -> None:
    """Remove the scores of a sweep in `folder`, because one evaluation begins there. The sweep's evaluations stay."""
    _remove(folder, SWEEP, "sweep.md", "sweep.html")


def _remove(folder: str, *names: str) -> None:
    """Remove files in this order: without the first, the others count for nothing."""
    for name in names:
        if storage.exists(url := storage.join(folder, name)):
            storage.remove(url)
