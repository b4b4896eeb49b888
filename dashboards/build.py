"""The Grafana dashboards, made from the metric catalogue: `python dashboards/build.py` writes `*.json` beside itself.

In: `PANELS`, one table per dashboard; a series is named by the catalogue's `Metric`, or by `RAY` where Ray emits it.
Out: JSON that Grafana imports; and `alerts.yaml` as the object that Prometheus' operator takes, in cluster/kubernetes.
`tests/dashboards` holds the files to this table, every expression to promtool, and every metric of the catalogue to a
panel.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml
from grafana_foundation_sdk.builders import dashboard, prometheus, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import DataSourceRef

from cert_ray.telemetry import metrics
from cert_ray.telemetry.metrics import Metric

FOLDER = Path(__file__).parent
_LETTERS = "ABCDEF"  # Grafana's names of a panel's queries

# Series that Ray 2.60 emits itself, and that panels or alerts use, with those of their labels that they are asked by.
RAY: Mapping[str, tuple[str, ...]] = {
    "ray_node_cpu_utilization": (),
    "ray_node_disk_free": (),
    "ray_node_disk_usage": (),
    "ray_node_gpus_utilization": ("GpuIndex",),
    "ray_node_mem_total": (),
    "ray_node_mem_used": (),
    "ray_serve_deployment_queued_queries": ("deployment",),
    "ray_serve_deployment_replica_healthy": ("deployment",),
    "ray_serve_deployment_status": ("deployment",),
    "ray_serve_http_request_latency_ms_bucket": (),
    "ray_serve_num_http_error_requests_total": (),
    "ray_serve_num_http_requests_total": (),
    "ray_serve_replica_startup_latency_ms_count": ("deployment",),
}


@dataclass(frozen=True, slots=True)
class Panel:
    """One graph: its title as a question's answer, Grafana's unit, and PromQL by legend."""

    title: str
    unit: str
    series: Mapping[str, str]
    from_zero: bool = True


def name(metric: Metric) -> str:
    """The series of a metric."""
    return metric.exported_name


def rate(metric: Metric, by: str, window: str = "2m") -> str:
    """Per second, by labels."""
    return f"sum by ({by}) (rate({name(metric)}[{window}]))"


def quantile(share: float, series: str, by: str = "") -> str:
    """Of a histogram, over five minutes."""
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({share}, sum by ({labels}) (rate({series}[5m])))"


MACHINES = (
    Panel("CPU by node", "percent", {"{{instance}}": "ray_node_cpu_utilization"}),
    Panel("Memory used by node", "percentunit", {"{{instance}}": "ray_node_mem_used / ray_node_mem_total"}),
    Panel(
        "Disk used by node",
        "percentunit",
        {"{{instance}}": "ray_node_disk_usage / (ray_node_disk_usage + ray_node_disk_free)"},
    ),
)

PANELS: Mapping[str, tuple[Panel, ...]] = {
    "preprocessing": (
        Panel(
            "Share of shards done",
            "percentunit",
            {
                "{{stage}}": f"max by (stage) ({name(metrics.SHARDS_DONE)})"
                f" / on (stage) max by (stage) ({name(metrics.SHARDS_PLANNED)})"
            },
        ),
        Panel(
            "Rows per second",
            "rowsps",
            {"{{stage}} read": rate(metrics.ROWS_READ, "stage"), "{{stage}} kept": rate(metrics.ROWS_KEPT, "stage")},
        ),
        Panel(
            "Rows dropped since the nodes started, by reason",
            "short",
            {"{{stage}} {{reason}}": f"sum by (stage, reason) ({name(metrics.ROWS_DROPPED)})"},
        ),
        Panel(
            "Share of rows dropped",
            "percentunit",
            {"{{stage}}": f"{rate(metrics.ROWS_DROPPED, 'stage', '10m')} / {rate(metrics.ROWS_READ, 'stage', '10m')}"},
        ),
        *MACHINES,
    ),
    "serving": (
        Panel(
            "Requests per second, by status",
            "reqps",
            {
                "{{model}} {{status}}": rate(metrics.COMPLETIONS, "model, status"),
                "all, at the proxies": "sum(rate(ray_serve_num_http_requests_total[2m]))",
                "errors, at the proxies": "sum(rate(ray_serve_num_http_error_requests_total[2m]))",
            },
        ),
        Panel(
            "Time of a completion",
            "s",
            {
                "{{model}} median": quantile(0.5, name(metrics.COMPLETION_SECONDS), "model"),
                "{{model}} p99": quantile(0.99, name(metrics.COMPLETION_SECONDS), "model"),
            },
        ),
        Panel(
            "Time to the first event of a stream",
            "s",
            {"{{model}} median": quantile(0.5, name(metrics.FIRST_EVENT_SECONDS), "model")},
        ),
        Panel(
            "Time by stage, median",
            "s",
            {"{{model}} {{stage}}": quantile(0.5, name(metrics.STAGE_SECONDS), "model, stage")},
        ),
        Panel("Answers per second, by route", "ops", {"{{model}} {{route}}": rate(metrics.ANSWERS, "model, route")}),
        Panel(
            "Share of the sketches asked for that voted for the winner",
            "percentunit",
            {
                "{{model}} median": quantile(0.5, name(metrics.VOTE_SHARE), "model"),
                "{{model}} p10": quantile(0.1, name(metrics.VOTE_SHARE), "model"),
            },
        ),
        Panel("Tokens per second, by kind", "short", {"{{model}} {{kind}}": rate(metrics.TOKENS, "model, kind")}),
        Panel(
            "Share of answers from the cache",
            "percentunit",
            {"{{model}}": f"{rate(metrics.CACHE_HITS, 'model')} / {rate(metrics.ANSWERS, 'model')}"},
        ),
        Panel(
            "Waiting",
            "short",
            {
                "in flight": f"sum({name(metrics.IN_FLIGHT)})",
                "queued, {{deployment}}": "sum by (deployment) (ray_serve_deployment_queued_queries)",
            },
        ),
        Panel(
            "Engines and front doors",
            "short",
            {
                "healthy, {{deployment}}": "sum by (deployment) (ray_serve_deployment_replica_healthy)",
                "started in 10 min, {{deployment}}": "sum by (deployment)"
                " (increase(ray_serve_replica_startup_latency_ms_count[10m]))",
            },
        ),
        Panel(
            "Latency at the proxies",
            "ms",
            {
                "median": quantile(0.5, "ray_serve_http_request_latency_ms_bucket"),
                "p99": quantile(0.99, "ray_serve_http_request_latency_ms_bucket"),
            },
        ),
    ),
    "training": (
        Panel(
            "Loss",
            "none",
            {"{{model}} training": name(metrics.TRAIN_LOSS), "{{model}} held out": name(metrics.HELD_OUT_LOSS)},
            from_zero=False,
        ),
        Panel(
            "Share of steps done",
            "percentunit",
            {"{{model}}": f"{name(metrics.TRAIN_STEP)} / {name(metrics.TRAIN_STEPS_PLANNED)}"},
        ),
        Panel("Tokens per second", "short", {"{{model}}": rate(metrics.TRAIN_TOKENS, "model")}),
        Panel("Model FLOPs utilization", "percentunit", {"{{model}}": name(metrics.TRAIN_MFU)}),
        Panel("Memory of worker 0", "bytes", {"{{model}}": name(metrics.TRAIN_MEMORY)}),
        Panel("GPU by node", "percent", {"{{instance}} {{GpuIndex}}": "ray_node_gpus_utilization"}),
        *MACHINES,
    ),
    "evaluation": (
        Panel("Programs per second, by outcome", "ops", {"{{outcome}}": rate(metrics.PROGRAMS_RUN, "outcome")}),
        Panel(
            "Programs since the nodes started, by outcome",
            "short",
            {"{{outcome}}": f"sum by (outcome) ({name(metrics.PROGRAMS_RUN)})"},
        ),
        *MACHINES,
    ),
}


def build(title: str) -> str:
    """The JSON of one dashboard."""
    source = DataSourceRef(type_val="prometheus", uid="${datasource}")
    built = (
        dashboard.Dashboard(f"cert-ray: {title}")
        .uid(f"cert-ray-{title}")
        .tags(["cert-ray"])
        .refresh("15s")
        .time("now-1h", "now")
        .timezone("browser")
        .with_variable(dashboard.DatasourceVariable("datasource").type("prometheus"))
    )
    for panel in PANELS[title]:
        graph = timeseries.Panel().title(panel.title).unit(panel.unit).datasource(source).span(12).height(8)
        if panel.from_zero:
            graph.min(0)
        assert len(panel.series) <= len(_LETTERS), panel.title
        for letter, (legend, expression) in zip(_LETTERS, panel.series.items(), strict=False):
            query = prometheus.Dataquery().expr(expression).legend_format(legend).ref_id(letter).datasource(source)
            graph.with_target(query)
        built.with_panel(graph)
    return str(JSONEncoder(sort_keys=True, indent=1).encode(built.build())) + "\n"


def rule_object() -> str:
    """`alerts.yaml` as a PrometheusRule."""
    made = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "cert-ray"},
        "spec": yaml.safe_load((FOLDER / "alerts.yaml").read_text()),
    }
    return "# Made by dashboards/build.py of dashboards/alerts.yaml.\n" + yaml.safe_dump(
        made, sort_keys=False, width=120
    )


def files() -> Iterator[tuple[Path, str]]:
    """Every file that is made, and its text."""
    for title in PANELS:
        yield FOLDER / f"{title}.json", build(title)
    yield FOLDER.parent / "cluster/kubernetes/monitoring/alerts.yaml", rule_object()


if __name__ == "__main__":
    for path, text in files():
        path.write_text(text)
