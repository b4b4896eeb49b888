"""Work units on Ray: one task is one unit, what it returns is its report.

Tasks are given a unit's description and return its report; the documents themselves go from storage to storage inside
the task, so memory is bounded by the unit and a lost task is simply run again. Ray's plain tasks do this, not its Data
library: there is nothing to stream, and a `Dataset` execution has a price of its own (docs/architecture.md). No formula
and no threshold of a stage stands here.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import ray

from cert_ray.errors import CertRayError
from cert_ray.manifests import ShardReport
from cert_ray.shards import units as units_module
from cert_ray.shards.units import Work, WorkUnit
from cert_ray.telemetry.on_ray import count_plan, count_report
from cert_ray.telemetry.progress import Progress

logger = logging.getLogger(__name__)

# Without `workers`: far more than a cluster runs at a time, so that an autoscaler sees what is wanted. Assumed.
_MOST_IN_FLIGHT = 2_000

Outcome = tuple[ShardReport, bool]  # and whether it was there before


def run_units(
    units: Sequence[WorkUnit],
    work: Work,
    *,
    folder: str,
    config_digest: str,
    stage: str,
    verb: str,
    workers: int | None = None,
    memory_bytes: int | None = None,
) -> list[ShardReport]:
    """The report of every unit, in the order of `units`; units that are finished and whole are not run again.

    A manifest of other units in `folder` is removed first, so none stands while its shards are redone. Heavy units
    start first, so that the last ones to end are small.
    An error raised on purpose in a task comes back as itself, without Ray's wrapping.

    Args:
        work: picklable; runs in a Ray task with one CPU and must write below `folder` only.
        workers: at most so many tasks at a time; None is as many as the cluster has CPUs (it may grow).
        memory_bytes: what one task needs at its peak, reserved from Ray; None reserves nothing.

    Raises:
        SchemaVersionError: when another stage, or another version of the schema, wrote `folder`.
        SupersededError: when another run of the stage begins in `folder` meanwhile.
        CertRayError: whatever `work` raised; other units may have finished and are kept for the next run.
    """
    units_module.withdraw_manifest(units, folder, config_digest, stage, verb)
    if not units:
        return []
    given = ray.put((work, folder, config_digest, stage, verb, units_module.begin_attempt(folder)))
    # A lost worker or node is no fault of the unit, however often it happens; an error of the unit ends the run.
    task = ray.remote(num_cpus=1, memory=memory_bytes, max_retries=-1)(_perform)
    count_plan(stage, len(units))
    reports: dict[str, ShardReport] = {}
    reused = 0
    with Progress(stage, total=len(units), unit="shards") as progress:
        for report, was_there in _outcomes(units, task, given, stage, workers or _MOST_IN_FLIGHT):
            reports[report.shard] = report
            reused += was_there
            count_report(stage, report)
            progress.advance(
                rows=report.rows_read,
                kept=report.rows_kept,
                size_bytes=report.counts.get("content_bytes", 0),
                dropped=report.dropped,
                reused=was_there,
            )
    logger.info("%s: %d shards, %d of them reused", stage, len(reports), reused)
    return [reports[unit.name] for unit in units]


def _perform(unit: WorkUnit, given: tuple[Work, str, str, str, str, str]) -> Outcome:
    """In a task: the unit's report, made now or found."""
    work, folder, config_digest, stage, verb, attempt = given
    done = units_module.finished_report(unit, folder, config_digest, verb)
    if done is not None:
        return done, True
    return units_module.perform(unit, work, folder, config_digest, stage, attempt), False


def _outcomes(units: Sequence[WorkUnit], task: Any, given: ray.ObjectRef, stage: str, most: int) -> Iterator[Outcome]:
    """What each unit gave, as they end, at most `most` of them under way."""
    waiting = iter(sorted(units, key=lambda unit: -unit.weight))
    pending: list[ray.ObjectRef] = []
    try:
        while True:
            while len(pending) < most and (unit := next(waiting, None)) is not None:
                pending.append(task.options(name=f"{stage} {unit.name}").remote(unit, given))
            if not pending:
                return
            ended, pending = ray.wait(pending)
            yield ray.get(ended[0])
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        while cause is not None and not isinstance(cause, CertRayError):
            cause = cause.__cause__
        raise (cause or error) from None
    finally:
        for ref in pending:  # nobody waits for them any more
            ray.cancel(ref)
