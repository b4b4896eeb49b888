"""Preprocessing with a clock on every stage, on Ray or on a plain process pool. The one place that knows its inside.

In: a `PreprocessConfig`. Out: what each stage used, by its name in `cert_ray/operations/plan.py`'s costs, and the
manifest. The pool runs the very same driver code: only `run_units` and the four calls of Ray that dedup makes are
replaced, so that the difference is Ray's share.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import cert_ray.dataset.on_ray as dataset_on_ray
import cert_ray.dedup.on_ray as dedup_on_ray
from cert_ray.dataset.options import PreprocessConfig
from cert_ray.manifests import Manifest, ShardReport
from cert_ray.shards import units as units_module
from cert_ray.shards.units import Attempt, Work, WorkUnit
from tests.bench.measuring import TreeWatch, Usage
from tests.without_ray import without_ray

# What a stage writes, below the run's folder.
WRITES = {
    "documents": ("documents",),
    "dedup keys": ("dedup/keys", "dedup/signatures", "dedup/reports"),
    "dedup edges": (),
    "dedup clusters": ("dedup/clusters", "dedup/manifest.json"),
    "dataset": ("dataset",),
}
SHARED_BY = {
    "documents": "units",
    "dedup keys": "units",
    "dedup edges": "bands",
    "dedup clusters": "driver",
    "dataset": "units",
}

_PEAKS = ("peak_bytes", "root_peak_bytes", "worker_peak_bytes", "root_growth_bytes", "worker_growth_bytes")


class StageClock:
    """Gives what the process tree uses to the innermost stage that is running."""

    def __init__(self, watch: TreeWatch) -> None:
        self._watch = watch
        self._running: list[str] = []
        self.usage: dict[str, Usage] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._close()
        self._running.append(name)
        try:
            yield
        finally:
            self._close()
            self._running.pop()

    def on(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """`work` as a stage."""

        @functools.wraps(work)
        def clocked(*args: Any, **options: Any) -> Any:
            with self.stage(name):
                return work(*args, **options)

        return clocked

    def on_each(self, name: str, work: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        """`work`, each of its items as a part of the stage."""

        @functools.wraps(work)
        def clocked(*args: Any, **options: Any) -> Iterator[Any]:
            items = work(*args, **options)
            end = object()
            while True:
                with self.stage(name):
                    item = next(items, end)
                if item is end:
                    return
                yield item

        return clocked

    def _close(self) -> None:
        now = self._watch.usage()
        if self._running:
            so_far = self.usage.setdefault(self._running[-1], Usage())
            for figure in ("wall_s", "cpu_s", "read_bytes"):
                setattr(so_far, figure, getattr(so_far, figure) + getattr(now, figure))
            for figure in _PEAKS:
                setattr(so_far, figure, max(getattr(so_far, figure), getattr(now, figure)))
        self._watch.restart()


def preprocess(config: PreprocessConfig, output: Path, workers: int, pool: bool) -> tuple[Manifest, dict[str, Usage]]:
    """Run the whole job, and give what each stage used; Ray must be running unless `pool`."""
    with TreeWatch(os.getpid()) as watch, ExitStack() as stack:
        if pool:
            stack.enter_context(pooled(workers))
        clock = StageClock(watch)
        for module, attribute, name in (
            (dataset_on_ray, "clean", "documents"),
            (dataset_on_ray, "deduplicate", "dedup clusters"),
            (dedup_on_ray, "run_units", "dedup keys"),
        ):
            stack.enter_context(mock.patch.object(module, attribute, clock.on(name, getattr(module, attribute))))
        near_edges = clock.on_each("dedup edges", dedup_on_ray._near_edges)
        stack.enter_context(mock.patch.object(dedup_on_ray, "_near_edges", near_edges))
        with clock.stage("dataset"):
            manifest = dataset_on_ray.preprocess(config, str(output), workers)
        return manifest, clock.usage


@contextmanager
def pooled(workers: int) -> Iterator[None]:
    """What runs on Ray runs on a process pool, whose processes are up."""
    # Not forked: Arrow has threads. Ray starts fresh interpreters as well.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as executor:
        list(executor.map(abs, range(workers)))
        with without_ray(executor, functools.partial(_pool_units, executor)):
            yield


def written_bytes(output: Path, stage: str) -> int:
    """Bytes of the files that `stage` left below `output`."""
    paths = [output / name for name in WRITES[stage]]
    files = [file for path in paths for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file()]
    return sum(file.stat().st_size for file in files)


def _pool_units(
    executor: ProcessPoolExecutor,
    units: Sequence[WorkUnit],
    work: Work,
    run: Attempt,
    **_: Any,
) -> list[ShardReport]:
    heaviest_first = sorted(units, key=lambda unit: -unit.weight)  # as on Ray
    futures = {unit.name: executor.submit(units_module.perform, unit, work, run) for unit in heaviest_first}
    return [futures[unit.name].result() for unit in units]
