"""The catalogue: names are unique, and carry units."""

from __future__ import annotations

from cert_ray.telemetry.metrics import CATALOGUE, MetricKind


def test_metric_names_are_unique_and_carry_units() -> None:
    names = [metric.name for metric in CATALOGUE]
    assert len(set(names)) == len(names)
    assert all(metric.unit and metric.description for metric in CATALOGUE)
    assert all(metric.exported_name.endswith("_total") == (metric.kind == MetricKind.COUNTER) for metric in CATALOGUE)
