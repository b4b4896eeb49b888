"""Dashboards are what `dashboards/build.py` makes and ask for metrics that exist; PromQL and alerts are sound."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from cert_ray.telemetry.metrics import CATALOGUE

DASHBOARDS = Path(__file__).resolve().parents[2] / "dashboards"


def load_builder() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dashboards_build", DASHBOARDS / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


BUILDER = load_builder()


@pytest.fixture(scope="module")
def promtool() -> str:
    found = shutil.which("promtool")
    if found is None:
        if os.environ.get("CI") == "true":
            pytest.fail("promtool is missing, and CI=true")
        pytest.skip("needs promtool: apt-get install prometheus")
    return found


def expressions() -> list[str]:
    panels = [panel for panels in BUILDER.PANELS.values() for panel in panels]
    return [expression for panel in panels for expression in panel.series.values()]


def alert_rules() -> list[dict[str, str]]:
    groups = yaml.safe_load((DASHBOARDS / "alerts.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def series_in(expression: str) -> set[str]:
    return set(re.findall(r"\bray_\w+", expression))


def test_files_are_what_the_builder_makes() -> None:
    built = dict(BUILDER.files())
    assert set(DASHBOARDS.glob("*.json")) == {path for path in built if path.suffix == ".json"}
    for path, text in built.items():
        assert path.read_text() == text, "run python dashboards/build.py"


def test_no_panel_loses_a_series() -> None:
    """Grafana names queries by letters, of which the builder has six."""
    for title, panels in BUILDER.PANELS.items():
        drawn = json.loads((DASHBOARDS / f"{title}.json").read_text())["panels"]
        assert [len(graph["targets"]) for graph in drawn] == [len(panel.series) for panel in panels]


def test_panels_and_alerts_ask_for_metrics_that_exist() -> None:
    exported = {metric.exported_name for metric in CATALOGUE} | set(BUILDER.RAY)
    asked = set().union(*map(series_in, expressions()))
    assert asked <= exported
    assert {metric.exported_name for metric in CATALOGUE} <= asked, "a metric that nobody looks at"
    assert set().union(*(series_in(rule["expr"]) for rule in alert_rules())) <= exported
    assert asked | set().union(*(series_in(rule["expr"]) for rule in alert_rules())) >= set(BUILDER.RAY)


def labels_of(series: str) -> set[str]:
    """What a series may be asked by: the labels that it is emitted with, and those of Prometheus itself."""
    ours = {metric.exported_name: metric.labels for metric in CATALOGUE}
    buckets = {"le"} if series.endswith("_bucket") else set()
    return {*ours.get(series, BUILDER.RAY.get(series, ())), "instance", *buckets}


def strange_labels(expression: str, *texts: str) -> set[str]:
    """Labels that `expression` selects, groups or matches by, or that `texts` show, and not all its series have."""
    grouped = re.findall(r"\b(?:by|on|without|ignoring)\s*\(([^)]*)\)", expression)
    asked = {label.strip() for group in grouped for label in group.split(",") if label.strip()}
    asked |= {
        label for chosen in re.findall(r"\{([^}]*)\}", expression) for label in re.findall(r"(\w+)\s*[=!]", chosen)
    }
    for text in texts:
        asked |= set(re.findall(r"\{\{\s*(?:\$labels\.)?(\w+)\s*\}\}", text))
    return asked - set.intersection(*map(labels_of, series_in(expression)))


def test_panels_ask_by_labels_that_are_emitted() -> None:
    for panels in BUILDER.PANELS.values():
        for panel in panels:
            for legend, expression in panel.series.items():
                assert strange_labels(expression, legend) == set(), f"{panel.title}: {legend}"


def test_alerts_ask_by_labels_that_are_emitted_and_name_only_what_they_keep() -> None:
    for rule in alert_rules():
        annotations: dict[str, str] = rule["annotations"]  # type: ignore[assignment]
        assert strange_labels(rule["expr"], *annotations.values()) == set(), rule["alert"]
        kept = re.findall(r"\b(?:sum|max) by \(([^)]*)\)", rule["expr"])
        for label in re.findall(r"\$labels\.(\w+)", " ".join(annotations.values())):
            assert all(label in group for group in kept), f"{rule['alert']}: its answers have no {label}"


@pytest.mark.parametrize(
    "expression",
    [
        "sum by (modell) (rate(ray_cert_ray_completions_total[5m]))",
        'ray_cert_ray_completions_total{code=~"5.."}',
        "ray_cert_ray_train_step / on (stage) ray_cert_ray_train_steps_planned",
        "sum by (le) (ray_cert_ray_train_step)",
        "sum by (stage) (ray_cert_ray_train_step)",
    ],
)
def test_a_label_that_nobody_emits_would_be_noticed(expression: str) -> None:
    assert len(strange_labels(expression)) == 1


def test_every_metric_of_the_catalogue_is_emitted_with_its_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the functions that stages call, into Ray's own metrics, which refuse another label."""
    from cert_ray.manifests import ShardReport
    from cert_ray.telemetry import on_ray

    emitted: dict[str, set[str]] = {}

    def note(self: Any, _: float = 1, tags: dict[str, str] | None = None) -> None:
        self._get_final_tags(tags or {})  # raises for a label that is missing, or that it was not made with
        emitted[self._name] = set(tags or {})

    for kind, method in ((on_ray.ray_metrics.Counter, "inc"), (on_ray.ray_metrics.Gauge, "set")):
        monkeypatch.setattr(kind, method, note)
    monkeypatch.setattr(on_ray.ray_metrics.Histogram, "observe", note)
    report = ShardReport(shard="s", unit_digest="d", files=(), rows_read=2, rows_kept=1, dropped={"too_short": 1})
    on_ray.count_plan("documents", 3)
    on_ray.count_report("documents", report, 1)
    on_ray.count_request("cert", 200, 1.0, 0.5)
    on_ray.count_in_flight(1)
    on_ray.count_answer("cert", "model", 0.5, {"sketch": 0.1}, {"prompt": 3}, from_cache=False)
    on_ray.count_answer("cert", "model", None, {}, {}, from_cache=True)
    on_ray.count_step("base", 1, 2, 3, 4.0, 5.0, 0.4, 6)
    on_ray.count_programs({"passed": 1})
    assert emitted == {metric.name: set(metric.labels) for metric in CATALOGUE}


def test_expressions_are_promql(promtool: str, tmp_path: Path) -> None:
    rules = [{"record": f"panel:{index}", "expr": text} for index, text in enumerate(expressions())]
    file = tmp_path / "panels.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    checked = subprocess.run(
        [promtool, "check", "rules", file], capture_output=True, text=True, timeout=60, check=False
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_every_alert_fires_when_it_should_and_only_then(promtool: str) -> None:
    cases = yaml.safe_load((DASHBOARDS / "alerts_test.yaml").read_text())["tests"]
    tested = {check["alertname"] for case in cases for check in case["alert_rule_test"] if check["exp_alerts"]}
    assert tested == {rule["alert"] for rule in alert_rules()}
    done = subprocess.run(
        [promtool, "test", "rules", "alerts_test.yaml"],
        cwd=DASHBOARDS, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_says_what_to_do() -> None:
    for rule in alert_rules():
        assert rule["annotations"]["summary"], rule["alert"]  # type: ignore[index]
        assert rule["annotations"]["action"], rule["alert"]  # type: ignore[index]
