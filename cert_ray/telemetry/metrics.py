"""The metric catalogue: every metric that cert-ray emits, with its unit, labels and meaning. Names only; no emission.

Ray exports them with the prefix `ray_` (and `_total` for counters) on each node's metrics port.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class MetricKind(StrEnum):
    """How a metric behaves over time."""

    COUNTER = "counter"
    GAUGE = "gauge"


@dataclass(frozen=True, slots=True)
class Metric:
    """One entry of the catalogue."""

    name: str
    kind: MetricKind
    unit: str
    labels: tuple[str, ...]
    description: str

    @property
    def exported_name(self) -> str:
        """The name that Prometheus sees."""
        return f"ray_{self.name}" + ("_total" if self.kind == MetricKind.COUNTER else "")


SHARDS_DONE = Metric(
    "cert_ray_shards_done", MetricKind.COUNTER, "shards", ("stage",), "Work units finished, reused ones included"
)
ROWS_READ = Metric("cert_ray_rows_read", MetricKind.COUNTER, "rows", ("stage",), "Rows that a stage read")
ROWS_KEPT = Metric("cert_ray_rows_kept", MetricKind.COUNTER, "rows", ("stage",), "Rows that a stage kept")
ROWS_DROPPED = Metric(
    "cert_ray_rows_dropped", MetricKind.COUNTER, "rows", ("stage", "reason"), "Rows that a stage dropped, by reason"
)
SHARDS_PLANNED = Metric(
    "cert_ray_shards_planned", MetricKind.GAUGE, "shards", ("stage",), "Work units of the stage that is running"
)

CATALOGUE = (SHARDS_PLANNED, SHARDS_DONE, ROWS_READ, ROWS_KEPT, ROWS_DROPPED)
