"""Room for one more worker: on one node that stays, at the times of a look."""

from __future__ import annotations

import pytest
import ray

from cert_ray.training import room
from cert_ray.training.room import Room

WORKER = {"CPU": 2, "GPU": 1}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(room.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize(
    ("free", "leaving", "expected"),
    [
        ({"a": {"CPU": 2.0, "GPU": 1.0}}, {}, True),
        ({"a": {"CPU": 2.0}, "b": {"CPU": 1.0, "GPU": 1.0}}, {}, False),  # not on one of them
        ({"a": {"CPU": 8.0, "GPU": 8.0}}, {"a": 0}, False),
        ({"a": {"CPU": 8.0, "GPU": 8.0}, "b": {"CPU": 2.0, "GPU": 1.0}}, {"a": 0}, True),
        ({}, {}, False),
    ],
)
def test_one_node_that_stays_must_have_all_of_it(
    monkeypatch: pytest.MonkeyPatch,
    clock: list[float],
    free: dict[str, dict[str, float]],
    leaving: dict[str, int],
    expected: bool,
) -> None:
    monkeypatch.setattr(room.state, "available_resources_per_node", lambda: free)
    monkeypatch.setattr(room.state, "get_draining_nodes", lambda: leaving)
    looks = Room(WORKER, 10.0)
    clock[0] = 10.0
    assert looks.came() is expected


def test_it_is_looked_for_when_that_is_due(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    looked = []
    monkeypatch.setattr(room.state, "available_resources_per_node", lambda: looked.append(clock[0]) or {})
    monkeypatch.setattr(room.state, "get_draining_nodes", dict)
    looks = Room(WORKER, 10.0)
    for second in range(25):
        clock[0] = float(second)
        looks.came()
    assert looked == [10.0, 20.0]


def test_a_head_that_is_away_has_none(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    def fails() -> None:
        raise ray.exceptions.RpcError("unavailable")

    monkeypatch.setattr(room.state, "get_draining_nodes", fails)
    looks = Room(WORKER, 10.0)
    clock[0] = 10.0
    assert not looks.came()


@pytest.mark.ray
def test_ray_tells_both_of_its_nodes(ray_cluster: None) -> None:
    """Neither is among what Ray promises to keep."""
    assert room.state.get_draining_nodes() == {}
    assert [resources.get("CPU", 0) > 0 for resources in room.state.available_resources_per_node().values()] == [True]
