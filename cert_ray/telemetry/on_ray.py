"""Emits the catalogue's metrics through Ray, which exports them to Prometheus."""

from __future__ import annotations

import functools
from collections.abc import Mapping

from ray.util import metrics as ray_metrics

from cert_ray.manifests import ShardReport
from cert_ray.telemetry import metrics
from cert_ray.telemetry.metrics import Metric, MetricKind


@functools.cache
def _emitter(metric: Metric) -> ray_metrics.Counter | ray_metrics.Gauge | ray_metrics.Histogram:
    description = f"{metric.description} ({metric.unit})"
    if metric.kind == MetricKind.HISTOGRAM:
        return ray_metrics.Histogram(
            metric.name, description=description, boundaries=list(metric.boundaries), tag_keys=metric.labels
        )
    kind = ray_metrics.Counter if metric.kind == MetricKind.COUNTER else ray_metrics.Gauge
    return kind(metric.name, description=description, tag_keys=metric.labels)


def _add(metric: Metric, value: int, **labels: str) -> None:
    if value:  # Ray refuses to add nothing to a counter
        _emitter(metric).inc(value, tags=labels)


def _observe(metric: Metric, value: float, **labels: str) -> None:
    _emitter(metric).observe(value, tags=labels)


def count_plan(stage: str, shards: int) -> None:
    """Set how many work units `stage` has, none of them done."""
    _emitter(metrics.SHARDS_PLANNED).set(shards, tags={"stage": stage})
    _emitter(metrics.SHARDS_DONE).set(0, tags={"stage": stage})


def count_report(stage: str, report: ShardReport, done: int) -> None:
    """Count one finished unit, the `done`th of this run: its rows, and its drops by reason."""
    _emitter(metrics.SHARDS_DONE).set(done, tags={"stage": stage})
    _add(metrics.ROWS_READ, report.rows_read, stage=stage)
    _add(metrics.ROWS_KEPT, report.rows_kept, stage=stage)
    for reason, rows in report.dropped.items():
        _add(metrics.ROWS_DROPPED, rows, stage=stage, reason=reason)


def count_in_flight(requests: int) -> None:
    """Set how many completion requests this front door has. Call it whenever one comes or ends."""
    _emitter(metrics.IN_FLIGHT).set(requests)


def count_request(model: str, status: int, seconds: float, first_event_s: float | None) -> None:
    """Count one completion request that has ended."""
    _add(metrics.COMPLETIONS, 1, model=model, status=str(status))
    if status == 200:  # refusals are quick, and would hide how long answers take
        _observe(metrics.COMPLETION_SECONDS, seconds, model=model)
    if first_event_s is not None:
        _observe(metrics.FIRST_EVENT_SECONDS, first_event_s, model=model)


def count_answer(
    model: str,
    route: str,
    vote_share: float | None,
    timings_s: Mapping[str, float],
    tokens: Mapping[str, int],
    from_cache: bool,
) -> None:
    """Count the answer to one prompt. `tokens` are by kind; `vote_share` is None without a vote."""
    _add(metrics.ANSWERS, 1, model=model, route=route)
    if vote_share is not None:
        _observe(metrics.VOTE_SHARE, vote_share, model=model)
    if from_cache:  # time and tokens were counted when it was drawn
        _add(metrics.CACHE_HITS, 1, model=model)
        return
    for stage, seconds in timings_s.items():
        _observe(metrics.STAGE_SECONDS, seconds, model=model, stage=stage)
    for kind, count in tokens.items():
        _add(metrics.TOKENS, count, model=model, kind=kind)


def count_step(
    model: str,
    step: int,
    steps: int,
    tokens: int,
    loss: float,
    held_out_loss: float | None,
    mfu: float | None,
    memory_bytes: int | None,
) -> None:
    """Report where a training run stands after a step that learned from `tokens` tokens. None: not measured."""
    _add(metrics.TRAIN_TOKENS, tokens, model=model)
    measured = {
        metrics.TRAIN_STEP: step,
        metrics.TRAIN_STEPS_PLANNED: steps,
        metrics.TRAIN_LOSS: loss,
        metrics.HELD_OUT_LOSS: held_out_loss,
        metrics.TRAIN_MFU: mfu,
        metrics.TRAIN_MEMORY: memory_bytes,
    }
    for metric, value in measured.items():
        if value is not None:
            _emitter(metric).set(value, tags={"model": model})


def count_programs(outcomes: Mapping[str, int]) -> None:
    """Count generated programs that were executed, by outcome."""
    for outcome, count in outcomes.items():
        _add(metrics.PROGRAMS_RUN, count, outcome=outcome)
