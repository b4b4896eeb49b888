"""Emits the catalogue's metrics through Ray, which exports them to Prometheus."""

from __future__ import annotations

import functools

from ray.util import metrics as ray_metrics

from cert_ray.manifests import ShardReport
from cert_ray.telemetry import metrics
from cert_ray.telemetry.metrics import Metric, MetricKind


@functools.cache
def _emitter(metric: Metric) -> ray_metrics.Counter | ray_metrics.Gauge:
    kind = ray_metrics.Counter if metric.kind == MetricKind.COUNTER else ray_metrics.Gauge
    return kind(metric.name, description=f"{metric.description} ({metric.unit})", tag_keys=metric.labels)


def _add(metric: Metric, value: int, **labels: str) -> None:
    if value:  # Ray refuses to add nothing to a counter
        _emitter(metric).inc(value, tags=labels)


def count_plan(stage: str, shards: int) -> None:
    """Say how many work units `stage` has."""
    _emitter(metrics.SHARDS_PLANNED).set(shards, tags={"stage": stage})


def count_report(stage: str, report: ShardReport) -> None:
    """Count one finished unit: its rows, and its drops by reason."""
    _add(metrics.SHARDS_DONE, 1, stage=stage)
    _add(metrics.ROWS_READ, report.rows_read, stage=stage)
    _add(metrics.ROWS_KEPT, report.rows_kept, stage=stage)
    for reason, rows in report.dropped.items():
        _add(metrics.ROWS_DROPPED, rows, stage=stage, reason=reason)
