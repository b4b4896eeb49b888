"""The metric catalogue: every metric that cert-ray emits, with its unit, labels and meaning. Names only; no emission.

Ray exports them with the prefix `ray_` (and `_total` for counters) on each node's metrics port. Ray 2.60 adds up a
counter over all processes that a node has had, and keeps it when they are gone: a counter counts since the node's
start, over all runs. What belongs to one run, such as how far it is, is a gauge, which goes a minute after its process
(seen by `tests/dashboards/scrape.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class MetricKind(StrEnum):
    """How a metric behaves over time."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Metric:
    """One entry of the catalogue."""

    name: str
    kind: MetricKind
    unit: str
    labels: tuple[str, ...]
    description: str
    boundaries: tuple[float, ...] = ()  # of a histogram's buckets

    @property
    def exported_name(self) -> str:
        """The name that Prometheus sees; for a histogram, that of its buckets."""
        endings = {MetricKind.COUNTER: "_total", MetricKind.GAUGE: "", MetricKind.HISTOGRAM: "_bucket"}
        return f"ray_{self.name}{endings[self.kind]}"


SHARDS_DONE = Metric(
    "cert_ray_shards_done",
    MetricKind.GAUGE,
    "shards",
    ("stage",),
    "Work units of the stage that are finished or reused",
)
ROWS_READ = Metric("cert_ray_rows_read", MetricKind.COUNTER, "rows", ("stage",), "Rows that a stage read")
ROWS_KEPT = Metric("cert_ray_rows_kept", MetricKind.COUNTER, "rows", ("stage",), "Rows that a stage kept")
ROWS_DROPPED = Metric(
    "cert_ray_rows_dropped", MetricKind.COUNTER, "rows", ("stage", "reason"), "Rows that a stage dropped, by reason"
)
SHARDS_PLANNED = Metric(
    "cert_ray_shards_planned", MetricKind.GAUGE, "shards", ("stage",), "Work units planned for the running stage"
)

# From a token on a GPU to a long answer on a CPU.
_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0)
_SHARES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)

COMPLETIONS = Metric(
    "cert_ray_completions", MetricKind.COUNTER, "requests", ("model", "status"), "Completion requests by HTTP status"
)
COMPLETION_SECONDS = Metric(
    "cert_ray_completion_seconds",
    MetricKind.HISTOGRAM,
    "s",
    ("model",),
    "Time of a completion, waiting included",
    _SECONDS,
)
FIRST_EVENT_SECONDS = Metric(
    "cert_ray_first_event_seconds", MetricKind.HISTOGRAM, "s", ("model",), "Time to a stream's first event", _SECONDS
)
STAGE_SECONDS = Metric(
    "cert_ray_stage_seconds", MetricKind.HISTOGRAM, "s", ("model", "stage"), "Time of an answer by stage", _SECONDS
)
VOTE_SHARE = Metric(
    "cert_ray_vote_share",
    MetricKind.HISTOGRAM,
    "share",
    ("model",),
    "Share of the requested sketches that had voted for the winner when the vote ended",
    _SHARES,
)
ANSWERS = Metric("cert_ray_answers", MetricKind.COUNTER, "prompts", ("model", "route"), "Prompts answered, by route")
TOKENS = Metric(
    "cert_ray_tokens",
    MetricKind.COUNTER,
    "tokens",
    ("model", "kind"),
    "Tokens by kind: of prompts, the cached ones among these, of sketches, of completions",
)
CACHE_HITS = Metric(
    "cert_ray_result_cache_hits", MetricKind.COUNTER, "prompts", ("model",), "Prompts answered from the result cache"
)
IN_FLIGHT = Metric(
    "cert_ray_requests_in_flight",
    MetricKind.GAUGE,
    "requests",
    (),
    "Completion requests that a front door has in work or waiting",
)

TRAIN_STEP = Metric("cert_ray_train_step", MetricKind.GAUGE, "steps", ("model",), "Steps done")
TRAIN_STEPS_PLANNED = Metric("cert_ray_train_steps_planned", MetricKind.GAUGE, "steps", ("model",), "Steps of the run")
TRAIN_LOSS = Metric("cert_ray_train_loss", MetricKind.GAUGE, "nats/token", ("model",), "Loss of the newest step")
HELD_OUT_LOSS = Metric(
    "cert_ray_held_out_loss", MetricKind.GAUGE, "nats/token", ("model",), "Loss of held-out rows, when last measured"
)
TRAIN_TOKENS = Metric(
    "cert_ray_train_tokens", MetricKind.COUNTER, "tokens", ("model",), "Tokens trained on since the latest start"
)
TRAIN_MFU = Metric(
    "cert_ray_train_mfu", MetricKind.GAUGE, "share", ("model",), "Model FLOPs utilization of the newest step"
)
TRAIN_MEMORY = Metric(
    "cert_ray_train_memory", MetricKind.GAUGE, "bytes", ("model",), "Peak memory of worker 0's GPU, or its resident set"
)
PROGRAMS_RUN = Metric(
    "cert_ray_programs_run", MetricKind.COUNTER, "programs", ("outcome",), "Generated programs executed, by outcome"
)

CATALOGUE = (
    SHARDS_PLANNED,
    SHARDS_DONE,
    ROWS_READ,
    ROWS_KEPT,
    ROWS_DROPPED,
    COMPLETIONS,
    COMPLETION_SECONDS,
    FIRST_EVENT_SECONDS,
    STAGE_SECONDS,
    VOTE_SHARE,
    ANSWERS,
    TOKENS,
    CACHE_HITS,
    IN_FLIGHT,
    TRAIN_STEP,
    TRAIN_STEPS_PLANNED,
    TRAIN_LOSS,
    HELD_OUT_LOSS,
    TRAIN_TOKENS,
    TRAIN_MFU,
    TRAIN_MEMORY,
    PROGRAMS_RUN,
)
