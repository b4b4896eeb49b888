"""What is counted of a completion: catalogue metrics with their labels, and nothing twice."""

from __future__ import annotations

from typing import Any

import pytest

from cert_ray.telemetry import metrics, on_ray
from cert_ray.telemetry.metrics import Metric, MetricKind


class Emitters:
    """Stands for Ray's metrics, and refuses labels that the catalogue does not have."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, float, dict[str, str]]] = []

    def __call__(self, metric: Metric) -> Any:
        emitters = self

        class Emitter:
            def note(self, value: float, tags: dict[str, str] | None = None) -> None:
                assert set(tags or {}) == set(metric.labels)
                emitters.seen.append((metric.name.removeprefix("cert_ray_"), value, tags or {}))

        method = {MetricKind.COUNTER: "inc", MetricKind.GAUGE: "set", MetricKind.HISTOGRAM: "observe"}[metric.kind]
        setattr(Emitter, method, Emitter.note)
        return Emitter()

    def values(self, name: str) -> list[float]:
        return [value for seen, value, _ in self.seen if seen == name]


@pytest.fixture
def emitters(monkeypatch: pytest.MonkeyPatch) -> Emitters:
    emitters = Emitters()
    monkeypatch.setattr(on_ray, "_emitter", emitters)
    return emitters


def test_refusals_are_counted_but_do_not_shorten_latencies(emitters: Emitters) -> None:
    on_ray.count_request("cert", 200, 1.5, 0.5)
    on_ray.count_request("cert", 503, 0.001, None)
    on_ray.count_in_flight(4)
    assert emitters.values("completions") == [1, 1]
    assert emitters.values("completion_seconds") == [1.5]
    assert emitters.values("first_event_seconds") == [0.5]
    assert emitters.values("requests_in_flight") == [4]


def test_what_came_from_the_cache_is_not_counted_as_drawn(emitters: Emitters) -> None:
    tokens = {"prompt": 5, "cached": 0, "sketch": 7, "completion": 9}
    for from_cache in (False, True):
        on_ray.count_answer("cert", "generator", 0.75, {"sketch": 0.1, "generate": 0.2}, tokens, from_cache)
    on_ray.count_answer("plain", "model", None, {}, {}, False)
    assert emitters.values("answers") == [1, 1, 1]
    assert emitters.values("vote_share") == [0.75, 0.75]
    assert emitters.values("stage_seconds") == [0.1, 0.2]
    assert emitters.values("tokens") == [5, 7, 9]
    assert emitters.values("result_cache_hits") == [1]


def test_histograms_have_rising_boundaries() -> None:
    histograms = [metric for metric in metrics.CATALOGUE if metric.kind == MetricKind.HISTOGRAM]
    assert histograms
    assert all(sorted(set(metric.boundaries)) == list(metric.boundaries) != [] for metric in histograms)


def test_a_step_sets_what_was_measured_and_nothing_else(emitters: Emitters) -> None:
    on_ray.count_step("base", 3, 40, 512, 5.5, None, None, 1_000)
    assert {name: value for name, value, _ in emitters.seen} == {
        "train_tokens": 512,
        "train_step": 3,
        "train_steps_planned": 40,
        "train_loss": 5.5,
        "train_memory": 1_000,
    }


def test_programs_are_counted_by_outcome(emitters: Emitters) -> None:
    on_ray.count_programs({"passed": 2, "failed": 0, "timed_out": 1})
    assert [(value, labels) for _, value, labels in emitters.seen] == [
        (2, {"outcome": "passed"}),
        (1, {"outcome": "timed_out"}),
    ]
