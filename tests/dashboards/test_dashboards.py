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
    assert {path.name for path in DASHBOARDS.glob("*.json")} == {path.name for path in built}
    for path, text in built.items():
        assert path.read_text() == text, "run python dashboards/build.py"


def test_no_panel_loses_a_series() -> None:
    """Grafana names queries by letters, of which the builder has six."""
    for title, panels in BUILDER.PANELS.items():
        drawn = json.loads((DASHBOARDS / f"{title}.json").read_text())["panels"]
        assert [len(graph["targets"]) for graph in drawn] == [len(panel.series) for panel in panels]


def test_panels_and_alerts_ask_for_metrics_that_exist() -> None:
    exported = {metric.exported_name for metric in CATALOGUE} | BUILDER.RAY
    asked = set().union(*map(series_in, expressions()))
    assert asked <= exported
    assert {metric.exported_name for metric in CATALOGUE} <= asked, "a metric that nobody looks at"
    assert set().union(*(series_in(rule["expr"]) for rule in alert_rules())) <= exported
    assert asked | set().union(*(series_in(rule["expr"]) for rule in alert_rules())) >= BUILDER.RAY


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
