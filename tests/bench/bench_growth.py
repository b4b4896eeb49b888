"""Growth: our own preprocessing at 1x, 3x and 10x documents, and whether a plan made from 1x predicts 10x.

In: how many documents 1x is. Synthetic corpora are made as needed (`make_corpus.py`). Out: time per document and stage,
driver memory per document, a picture; with `--write-costs FILE` the costs that `cert-ray plan --costs FILE` reads.

The plan that is compared is made from four corpora, none of more documents than 1x: a twentieth of it (what is fixed),
a third, 1x, and 1x in documents of half the size (what a document and what a byte costs); least squares of the relative
errors, no cost below 0. The costs that are written know the 3x and 10x runs too.

Example: python -m tests.bench.bench_growth --documents 100000 --output results --work /tmp/growth
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np
import yaml
from scipy.optimize import nnls

from cert_ray.operations.plan import Costs, Plan, PlanConfig, StageCost, cores_used, make_plan
from tests.bench.inputs import count_bytes
from tests.bench.make_corpus import CorpusOptions, make_corpus
from tests.bench.measuring import Spread, machine, markdown, publish, run_watched
from tests.bench.stages import SHARED_BY

GROWTH = (1, 3, 10)
ALLOWED_GROWTH = 1.15  # of the per-document cost
ALLOWED_MISS = 0.25  # of a plan
_FULL_BYTES = 48 << 20  # a unit and a half
_FAST_STORAGE = 1e12  # the measured times hold this machine's storage already


@dataclass(frozen=True)
class Size:
    """A corpus, and every run's stages on it."""

    name: str
    documents: int
    size_bytes: int
    runs: tuple[dict[str, dict[str, float]], ...]
    clock: str = "wall_s"  # or "cpu_s": what counts as time

    def time(self, stage: str) -> Spread:
        """Seconds of a stage over the runs, by this size's clock."""
        return self.figure(stage, lambda used: used[self.clock])

    def figure(self, stage: str, of: Callable[[Mapping[str, float]], float]) -> Spread:
        """One figure of a stage over the runs."""
        return Spread.of([of(run[stage]) for run in self.runs])

    def seconds(self) -> Spread:
        """The whole job."""
        return Spread.of([sum(stage[self.clock] for stage in run.values()) for run in self.runs])

    def driver_bytes(self) -> float:
        """The driver's peak, median over the runs."""
        return median(max(stage["root_peak_bytes"] for stage in run.values()) for run in self.runs)


def main() -> None:
    """Measure, fit, predict, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=float, default=100_000, help="1x; the largest run has ten times as many")
    parser.add_argument(
        "--mean-bytes", type=float, default=CorpusOptions.mean_bytes, help="of a document; 2000 or more"
    )
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, required=True, help="folder of corpora and runs; runs are removed")
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument(
        "--write-costs", type=Path, metavar="FILE", help="write the costs; with --only-costs, stop then"
    )
    parser.add_argument("--only-costs", action="store_true")
    parser.add_argument(
        "--by-cpu",
        action="store_true",
        help="count CPU seconds of all processes in place of wall seconds: for a machine that does other work as well",
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="an option of preprocessing")
    given = parser.parse_args()
    if given.only_costs and not given.write_costs:
        parser.error("--only-costs: give --write-costs FILE as well")
    documents, command = int(given.documents), "python -m tests.bench.bench_growth " + " ".join(sys.argv[1:])
    mean = given.mean_bytes

    def measure(name: str, count: int, mean_bytes: float) -> Size:
        options = CorpusOptions(documents=count, seed=given.seed, mean_bytes=mean_bytes)
        size = measure_size(name, options, given.work, given.runs, given.workers, given.set)
        return replace(size, clock="cpu_s") if given.by_cpu else size

    calibration = [measure(f"1/{part}", max(documents // part, 1), mean) for part in (20, 3)]
    calibration += [measure("1x, half the size", documents, mean / 2), measure("1x", documents, mean)]
    given.output.mkdir(parents=True, exist_ok=True)
    measured = {"machine": machine(), "sizes": [vars(size) for size in calibration]}
    (given.output / "calibration.json").write_text(json.dumps(measured, indent=1) + "\n")
    costs = fit_costs(calibration, given.workers, given.runs, command)
    if given.only_costs:
        write_costs(costs, given.write_costs)
        return
    grown = [calibration[-1], *(measure(f"{times}x", documents * times, mean) for times in GROWTH[1:])]
    plans = [predict(costs, size, given.workers) for size in grown]
    if given.write_costs:  # the plan that was compared knew nothing of these runs; the next one may
        write_costs(fit_costs([*calibration, *grown[1:]], given.workers, given.runs, command), given.write_costs)
    publish(
        given.output, "growth", command,
        [growth_table(grown), plan_table(grown[-1], plans[-1]), verdicts(grown, plans[-1])],
        {"sizes": [vars(size) for size in [*calibration, *grown[1:]]], "costs": costs.model_dump(mode="json")},
    )  # fmt: skip
    draw(grown, plans, given.output / "growth.png")


def write_costs(costs: Costs, path: Path) -> None:
    """Write what `load_costs` reads."""
    text = yaml.safe_dump(costs.model_dump(mode="json"), sort_keys=False, width=120)
    path.write_text(f"# Measured by tests/bench/bench_growth.py, read by `cert-ray plan corpus`.\n{text}")


def measure_size(
    name: str, options: CorpusOptions, work: Path, runs: int, workers: int, assignments: Sequence[str]
) -> Size:
    """Make the corpus if it is not there, and run the whole job on it `runs` times."""
    corpus = work / f"corpus-{options.documents}-{options.mean_bytes:.0f}-{options.seed}"
    if not (corpus / "truth.parquet").exists():
        make_corpus(options, corpus)
    size_bytes = count_bytes(corpus / "documents")
    results = []
    for _ in range(runs):
        output = work / "run"
        shutil.rmtree(output, ignore_errors=True)
        command = [sys.executable, "-m", "tests.bench.ours", "preprocess", "--by-stage"]
        command += ["--tables", str(corpus / "documents"), "--output", str(output), "--workers", str(workers)]
        command += [part for text in assignments for part in ("--set", text)]
        figures = json.loads(run_watched(command, cores=workers).output.splitlines()[-1])
        results.append({stage: figures["stages"][stage] for stage in SHARED_BY})
        shutil.rmtree(output)
        print(f"{name}: {options.documents} documents, {figures['seconds']:.1f} s", file=sys.stderr)
    return Size(name, options.documents, size_bytes, tuple(results))


def fit_costs(sizes: Sequence[Size], workers: int, runs: int, command: str) -> Costs:
    """Fixed, per-document and per-byte costs of each stage from the medians at several sizes."""
    stages = [
        StageCost(
            name=stage,
            shared_by=shared_by,
            seconds=_fit(sizes, stage, sizes[0].clock, [_cores(size, shared_by, workers) for size in sizes]),
            read_bytes=_fit(sizes, stage, "read_bytes"),
            written_bytes=_fit(sizes, stage, "written_bytes"),
            worker_memory_bytes=_worker_memory(sizes, stage, shared_by),
            driver_memory_bytes=_growing_memory(sizes, stage, "root"),
        )
        for stage, shared_by in SHARED_BY.items()
    ]
    where = machine()
    largest = max(sizes, key=lambda size: size.size_bytes)
    return Costs(
        machine=f"{where['processor']}, {where['memory_gb']} GB, load {where['load_before']}",
        cores=workers,
        date=where["date"],
        command=command,
        corpus=f"synthetic, up to {largest.documents} documents of {largest.size_bytes / 1e6:.0f} MB",
        runs=runs,
        versions={name: str(where[name]) for name in ("python", "ray", "pyarrow", "numpy")},
        stages=tuple(stages),
    )


def _cores(size: Size, shared_by: str, workers: int) -> int:
    """Among how many cores a stage's time was shared: CPU time is that of all of them together."""
    return 1 if size.clock == "cpu_s" else cores_used(shared_by, workers, size.documents, size.size_bytes)


def _worker_memory(sizes: Sequence[Size], stage: str, shared_by: str) -> dict[str, float]:
    """A worker that takes units is bounded by the unit, so its highest peak is what it needs; others grow."""
    if shared_by != "units":
        return _growing_memory(sizes, stage, "worker")
    return {"fixed": max(size.figure(stage, lambda used: used["worker_peak_bytes"]).high for size in sizes)}


def _growing_memory(sizes: Sequence[Size], stage: str, who: str) -> dict[str, float]:
    """What the process grows by in the stage, fitted, on top of what it held before (the highest seen).

    Corpora that do not fill a unit say nothing about growth: what they hold of it grows with them.
    """
    full = [size for size in sizes if size.size_bytes >= _FULL_BYTES]
    if len({size.documents for size in full}) < 2:
        print(
            f"{stage}: growth of memory fitted from corpora of less than a unit; give more --documents", file=sys.stderr
        )
        full = list(sizes)
    cost = _fit(full, stage, f"{who}_growth_bytes", by_bytes=False)
    before = max(
        size.figure(stage, lambda used: used[f"{who}_peak_bytes"] - used[f"{who}_growth_bytes"]).high for size in full
    )
    return {**cost, "fixed": cost["fixed"] + before}


def _fit(
    sizes: Sequence[Size], stage: str, figure: str, cores: Sequence[int] | None = None, by_bytes: bool = True
) -> dict[str, float]:
    """Least squares of the relative errors; what grows is shared by `cores`, what is fixed is not."""
    shared = np.asarray(cores if cores is not None else [1] * len(sizes), float)
    documents = np.array([size.documents for size in sizes], float)
    size_bytes = np.array([size.size_bytes for size in sizes], float)
    measured = np.array([size.figure(stage, lambda used: used[figure]).median for size in sizes], float)
    if not measured.any():
        return {"fixed": 0.0, "per_document": 0.0, "per_byte": 0.0}
    columns = np.stack([np.ones(len(sizes)), documents / shared, by_bytes * size_bytes / shared], axis=1)
    scale = np.maximum(columns.max(axis=0), 1e-9)
    weights = 1 / np.maximum(measured, measured.max() * 1e-3)
    solution, _ = nnls(columns / scale * weights[:, None], measured * weights)
    fixed, per_document, per_byte = (float(value) for value in solution / scale)
    return {"fixed": fixed, "per_document": per_document, "per_byte": per_byte}


def predict(costs: Costs, size: Size, workers: int) -> Plan:
    """The plan of a measured run, of its CPU time where that is what was measured."""
    workers = 1 if size.clock == "cpu_s" else workers
    config = PlanConfig(
        files=size.documents, size_bytes=size.size_bytes, cores=workers, storage_bytes_per_s=_FAST_STORAGE
    )
    return make_plan(config, costs)


def growth_table(sizes: Sequence[Size]) -> str:
    """Microseconds per document of each stage, and the driver's memory."""
    rows: list[Sequence[object]] = [
        (f"{stage}, µs per document", *(_per_document(size, stage) for size in sizes)) for stage in SHARED_BY
    ]
    rows.append(("all, documents/s", *(f"{size.documents / size.seconds().median:,.0f}" for size in sizes)))
    rows.append(("driver's peak, MB", *(f"{size.driver_bytes() / 1e6:,.0f}" for size in sizes)))
    headers = ["stage", *(f"{size.name}: {size.documents:,}, {size.size_bytes / 1e6:,.0f} MB" for size in sizes)]
    return markdown(headers, rows)


def _per_document(size: Size, stage: str) -> Spread:
    return size.figure(stage, lambda used: used[size.clock] * 1e6 / size.documents)


def plan_table(size: Size, plan: Plan) -> str:
    """Predicted beside measured."""
    rows: list[Sequence[object]] = []
    for stage in plan.stages:
        measured = size.time(stage.name).median
        rows.append((stage.name, f"{stage.seconds:.1f}", f"{measured:.1f}", _miss(stage.seconds, measured)))
    total, disk, driver = size.seconds().median, _disk(size), size.driver_bytes()
    planned_driver = max(stage.driver_memory_bytes for stage in plan.stages)
    rows.append(("all, s", f"{plan.seconds:.1f}", f"{total:.1f}", _miss(plan.seconds, total)))
    rows.append(("disk, MB", f"{plan.disk_bytes / 1e6:.0f}", f"{disk / 1e6:.0f}", _miss(plan.disk_bytes, disk)))
    rows.append(("driver, MB", f"{planned_driver / 1e6:.0f}", f"{driver / 1e6:.0f}", _miss(planned_driver, driver)))
    return markdown([f"plan of the {size.name} run, from 1x and less", "planned", "measured", "miss"], rows)


def _miss(planned: float, measured: float) -> str:
    return f"{planned / measured - 1:+.0%}" if measured else "-"


def _disk(size: Size) -> float:
    return median(sum(stage["written_bytes"] for stage in run.values()) for run in size.runs)


def verdicts(sizes: Sequence[Size], plan: Plan) -> str:
    """The goals, each met or missed."""
    first, last = sizes[0], sizes[-1]
    growth = (last.seconds().median / last.documents) / (first.seconds().median / first.documents)
    driver = (last.driver_bytes() - first.driver_bytes()) / (last.documents - first.documents)
    miss = abs(plan.seconds / last.seconds().median - 1)
    checks = [
        (growth <= ALLOWED_GROWTH, f"time per document at {last.name} is {growth:.2f} of that at {first.name}"),
        (driver < 100, f"the driver grows by {driver:.0f} bytes per document"),
        (miss <= ALLOWED_MISS, f"the plan misses the time of the {last.name} run by {miss:.0%}"),
    ]
    return "\n".join(f"- {'met' if met else 'MISSED'}: {text}" for met, text in checks)


def draw(sizes: Sequence[Size], plans: Sequence[Plan], path: Path) -> None:
    """Time and driver memory over documents, with what was planned."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    documents = [size.documents for size in sizes]
    lower = np.zeros(len(sizes))
    for stage in SHARED_BY:
        height = np.array([size.time(stage).median for size in sizes])
        left.fill_between(documents, lower, lower + height, alpha=0.6, label=stage)
        lower += height
    left.plot(documents, [plan.seconds for plan in plans], "k--", marker="o", label="planned from 1x")
    name = "CPU time" if sizes[0].clock == "cpu_s" else "time"
    left.set(xlabel="documents", ylabel="seconds", title=f"{name}, median of the runs", xlim=(0, None), ylim=(0, None))
    left.legend(loc="upper left", fontsize=8)
    right.plot(documents, [size.driver_bytes() / 1e6 for size in sizes], marker="o")
    right.set(xlabel="documents", ylabel="MB", title="driver's peak memory", xlim=(0, None), ylim=(0, None))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
