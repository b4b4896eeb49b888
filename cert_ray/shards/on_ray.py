"""Work units on Ray Data: one row in is a batch of units, one row out is the report of one of them.

Rows carry only a unit's description and its report. The documents themselves go from storage to storage inside the
task, so memory is bounded by the unit, and a lost task is simply run again. No formulas or thresholds belong here.
"""

from __future__ import annotations

import contextlib
import logging
import pickle
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import ray
import ray.data

from cert_ray import storage
from cert_ray.errors import CertRayError
from cert_ray.manifests import ShardReport
from cert_ray.retries import tried_again
from cert_ray.shards import units as units_module
from cert_ray.shards.units import Attempt, Work, WorkUnit
from cert_ray.telemetry import logs
from cert_ray.telemetry.on_ray import count_plan, count_report
from cert_ray.telemetry.progress import Progress

logger = logging.getLogger(__name__)

Outcome = tuple[ShardReport, bool]  # and whether it existed before


def run_units(
    units: Sequence[WorkUnit],
    work: Work,
    run: Attempt,
    *,
    workers: int | None = None,
    memory_bytes: int | None = None,
) -> list[ShardReport]:
    """Run `units` and return their reports in order; units that are finished and intact are not run again.

    First, a manifest of other units in the folder is removed, so that none exists while its shards are redone, then the
    files of units that are not among these. Heavy units start first, and light ones share a task: see `units.batches`.
    A task that is run again finds the units that it had finished. A `CertRayError` in a task is raised here as itself.
    It travels as a row, since Ray keeps only the text of an exception.

    Args:
        work: picklable; runs in a Ray task with one CPU and must write only below the run's folder.
        workers: how many tasks may run at a time; None means as many as the cluster has CPUs (it may grow).
        memory_bytes: what one task needs at its peak, reserved from Ray; None reserves nothing.

    Raises:
        ConfigError: when the run's folder is in this process's own memory, where no task would find it.
        SchemaVersionError: when another stage, or another version of the schema, wrote the folder.
        SupersededError: when another run of the stage begins there meanwhile.
        CertRayError: whatever `work` raised; units that have finished are kept for the next run.
        RayTaskError: for any other error, with its traceback; errors of storage only after repeated attempts.
    """
    storage.check_shared(run.folder)
    units_module.clear_for(units, run)
    if not units:
        return []

    def run_batch(batch: pa.Table) -> Iterator[pa.Table]:
        for row in batch.to_pylist():
            for unit in map(_unit_of, row["units"]):
                tried = _tried(unit, work, run)
                yield pa.Table.from_pylist([tried])
                if tried["error"]:
                    return

    batches = units_module.batches(units, workers or int(ray.cluster_resources().get("CPU", 0)))
    with _our_context():
        dataset = ray.data.from_items(
            [{"units": [_row_of(unit) for unit in batch]} for batch in batches], override_num_blocks=len(batches)
        ).map_batches(
            run_batch,
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=1,
            memory=memory_bytes,
            # A lost worker or node is not the unit's fault: Ray Data runs it again, without limit. An error ends the
            # run.
            compute=ray.data.TaskPoolStrategy(size=min(workers, len(batches))) if workers else None,
        )
    count_plan(run.stage, len(units))
    reports: dict[str, ShardReport] = {}
    reused = 0
    with (
        logs.scope(stage=run.stage),
        logs.warnings_alone("ray.data", but="Progress bars disabled"),  # its own log has its plan and times
        Progress(run.stage, total=len(units), unit="shards") as progress,
    ):
        for report, was_there in _outcomes(dataset):
            reports[report.shard] = report
            reused += was_there
            count_report(run.stage, report, len(reports))
            logger.debug(
                "%s: shard %s %s", run.stage, report.shard, "reused" if was_there else "done", extra=_told(report)
            )
            progress.advance(
                rows=report.rows_read,
                kept=report.rows_kept,
                size_bytes=report.counts.get("content_bytes", 0),
                dropped=report.dropped,
                reused=was_there,
            )
    logger.info("%s: %d shards, %d of them reused", run.stage, len(reports), reused)
    return [reports[unit.name] for unit in units]


@contextlib.contextmanager
def _our_context() -> Iterator[None]:
    """Datasets made in the block hand over each report as soon as it is made, and draw no progress bars."""
    options = {"enable_progress_bars": False, "target_max_block_size": 1}
    context = ray.data.DataContext.get_current()
    before = {name: getattr(context, name) for name in options}
    for name, value in options.items():
        setattr(context, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)


def _row_of(unit: WorkUnit) -> dict[str, str]:
    return {"unit": unit.model_dump_json(), "version": unit.version}


def _told(report: ShardReport) -> dict[str, object]:
    """The fields of a shard's log line, besides its text."""
    figures = {"rows_read": report.rows_read, "rows_kept": report.rows_kept, "dropped": report.dropped}
    return {"shard": report.shard, **figures}


def _unit_of(row: dict[str, str]) -> WorkUnit:
    """The unit of a row. Its version is separate, because a unit's JSON leaves it out."""
    return WorkUnit.model_validate_json(row["unit"]).model_copy(update={"version": row["version"]})


def _perform(unit: WorkUnit, work: Work, run: Attempt) -> Outcome:
    """In a task: the unit's report, found or made now."""
    done = units_module.finished_report(unit, run.folder, run.config_digest, run.verb)
    if done is not None:
        return done, True
    return units_module.perform(unit, work, run), False


def _tried(unit: WorkUnit, work: Work, run: Attempt) -> dict[str, Any]:
    """In a task: the row of a unit, with its report or with the `CertRayError` that it raised."""
    try:
        report, was_there = tried_again(_perform)(unit, work, run)
    except CertRayError as error:
        return {"report": "", "reused": False, "error": pickle.dumps(error)}
    return {"report": report.model_dump_json(), "reused": was_there, "error": b""}


def _outcomes(dataset: ray.data.Dataset) -> Iterator[Outcome]:
    """The outcomes of units, as they finish; raises the first `CertRayError`."""
    for row in dataset.iter_rows():
        if row["error"]:
            raise pickle.loads(row["error"])
        yield ShardReport.model_validate_json(row["report"]), bool(row["reused"])
