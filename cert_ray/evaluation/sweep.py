"""Several benchmarks at several temperatures as one resumable job: a folder for each pair, and one report over all.

    OUTPUT/NAME-tTEMPERATURE/   as `run` writes it; finished ones are not repeated
    OUTPUT/sweep.md, sweep.html
    OUTPUT/sweep.json           written last: every pair's scores with intervals, and each benchmark's best temperature

The paper reports the best temperature. As the largest of several noisy figures, it is too high on average, so the
report shows it beside all of them and says so.
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Sequence
from typing import Any

import markupsafe

from cert_ray import storage
from cert_ray.config import Config
from cert_ray.errors import ConfigError
from cert_ray.evaluation.execution import Execute, execute_in_threads
from cert_ray.evaluation.report import template
from cert_ray.evaluation.run import Complete, EvaluateConfig, is_finished, run_evaluation
from cert_ray.evaluation.runs import SWEEP, Run, read_run, remove_evaluation

_log = logging.getLogger(__name__)


class SweepConfig(Config):
    """Which benchmarks, at which temperatures; `each` holds the options of every evaluation."""

    problems: tuple[str, ...]
    temperatures: tuple[float, ...]
    each: EvaluateConfig  # its problems and temperature are replaced; its output becomes the parent folder

    def cells(self) -> list[EvaluateConfig]:
        """One evaluation for each pair, benchmark by benchmark, temperatures as given.

        Raises:
            ConfigError: when two benchmarks' files share a name, or a temperature appears twice.
        """
        names = [storage.name_of(url).partition(".")[0] for url in self.problems]
        if len(set(names)) < len(names) or len(set(self.temperatures)) < len(self.temperatures):
            raise ConfigError("evaluate: give every --problems file (by its name) and every --temperature once.")
        return [
            self.each.model_copy(
                update={
                    "problems": url,
                    "temperature": temperature,
                    "output": storage.join(self.each.output, f"{name}-t{temperature:g}"),
                }
            )
            for url, name in zip(self.problems, names, strict=True)
            for temperature in self.temperatures
        ]


def run_sweep(
    config: SweepConfig, complete_at: Callable[[float], Complete], execute: Execute = execute_in_threads
) -> dict[str, Any]:
    """Evaluate every pair that is not finished, and write the report over all; returns the contents of sweep.json.

    Raises:
        As `run_evaluation`.
    """
    cells = config.cells()
    remove_evaluation(config.each.output)
    for number, cell in enumerate(cells, start=1):
        if is_finished(cell):
            _log.info("evaluation %d of %d: %s is finished", number, len(cells), cell.output)
            continue
        _log.info("evaluation %d of %d: %s", number, len(cells), cell.output)
        assert cell.temperature is not None
        run_evaluation(cell, complete_at(cell.temperature), execute)
    runs = [read_run(cell.output) for cell in cells]
    return _write(config, runs)


def _write(config: SweepConfig, runs: Sequence[Run]) -> dict[str, Any]:
    size = len(config.temperatures)
    groups = [runs[start : start + size] for start in range(0, len(runs), size)]
    benchmarks = [_benchmark(group) for group in groups]
    sweep: dict[str, Any] = {"config": config.model_dump(mode="json"), "benchmarks": benchmarks}
    pictures = [markupsafe.Markup(draw(one["benchmark"], one["scores"])) for one in benchmarks]
    output = config.each.output
    for form in ("md", "html"):
        text = template(f"sweep.{form}.j2").render(sweep=sweep, label=runs[0].label, pictures=pictures)
        storage.write_text(storage.join(output, f"sweep.{form}"), text)
    storage.write_text(storage.join(output, SWEEP), json.dumps(sweep, indent=1) + "\n")
    return sweep


def _benchmark(group: Sequence[Run]) -> dict[str, Any]:
    """One benchmark's scores at every temperature, and the best temperature at the smallest k."""
    scores: list[dict[str, Any]] = [
        {"temperature": run.temperature, "folder": storage.name_of(run.folder), "pass_at_k": _intervals(run)}
        for run in group
    ]
    first = str(min(group[0].ks))
    best = max(scores, key=lambda one: one["pass_at_k"][first]["value"])  # the first of equals
    return {"benchmark": group[0].benchmark, "scores": scores, "best": {"k": int(first), **best}}


def _intervals(run: Run) -> dict[str, dict[str, float]]:
    found = {k: run.interval(k) for k in run.ks}
    return {str(k): {"value": one.value, "low": one.low, "high": one.high} for k, one in found.items()}


def draw(benchmark: str, scores: Sequence[dict[str, Any]]) -> str:
    """pass@k by temperature with intervals, as the text of an SVG element."""
    import matplotlib as mpl
    from matplotlib.figure import Figure  # without pyplot: no global state, no display

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.add_subplot()
    temperatures = [one["temperature"] for one in scores]
    for k in scores[0]["pass_at_k"]:
        low, middle, high = ([100 * one["pass_at_k"][k][end] for one in scores] for end in ("low", "value", "high"))
        axes.plot(temperatures, middle, marker="o", markersize=4, label=f"pass@{k}")
        axes.fill_between(temperatures, low, high, alpha=0.15)
    axes.set_title(f"{benchmark}: percent by temperature, 95% intervals", loc="left", fontsize=11, fontweight="bold")
    axes.set_xticks(temperatures)
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)
    axes.legend(frameon=False, fontsize=9)
    stream = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "cert-ray"}):  # otherwise its ids differ from run to run
        figure.savefig(stream, format="svg", metadata={"Date": None}, transparent=True)
    text = stream.getvalue()
    return text[text.index("<svg") :]
