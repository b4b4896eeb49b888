"""The catalogue, and the dashboard over it: no panel asks for a metric that nobody emits."""

from __future__ import annotations

import json
import re
from pathlib import Path

from cert_ray.telemetry.metrics import CATALOGUE, MetricKind

DASHBOARDS = Path(__file__).resolve().parents[2] / "dashboards"
# Series of Ray Serve itself (ray.serve's metrics), which the serving panels use.
RAY_SERVE = {
    "ray_serve_num_http_requests_total",
    "ray_serve_num_http_error_requests_total",
    "ray_serve_http_request_latency_ms_bucket",
    "ray_serve_deployment_queued_queries",
}


def test_metric_names_are_unique_and_carry_units() -> None:
    names = [metric.name for metric in CATALOGUE]
    assert len(set(names)) == len(names)
    assert all(metric.unit and metric.description for metric in CATALOGUE)
    assert all(metric.exported_name.endswith("_total") == (metric.kind == MetricKind.COUNTER) for metric in CATALOGUE)


def test_every_panel_asks_for_a_metric_that_exists() -> None:
    exported = {metric.exported_name for metric in CATALOGUE} | RAY_SERVE
    asked = set()
    for path in DASHBOARDS.glob("*.json"):
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel["targets"]:
                asked |= set(re.findall(r"\bray_\w+", target["expr"]))
    assert asked
    assert asked <= exported
    assert {metric.exported_name for metric in CATALOGUE} <= asked, "a metric that nobody looks at"
