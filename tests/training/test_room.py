"""Room for one more worker: on one node, at the times of a look."""

from __future__ import annotations

import pytest

from cert_ray.training import room
from cert_ray.training.room import Room

WORKER = {"CPU": 2, "GPU": 1}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(room.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize(
    ("free", "expected"),
    [
        ([{"CPU": 2.0, "GPU": 1.0}], True),
        ([{"CPU": 2.0}, {"CPU": 1.0, "GPU": 1.0}], False),  # not on one of them
        ([{"CPU": 2.0}, {"CPU": 3.0, "GPU": 8.0}], True),
        ([], False),
    ],
)
def test_one_node_must_have_all_of_it(clock: list[float], free: list[dict[str, float]], expected: bool) -> None:
    looks = Room(lambda: free, WORKER, 10.0)
    clock[0] = 10.0
    assert looks.came() is expected


def test_it_is_looked_for_when_that_is_due(clock: list[float]) -> None:
    looked: list[float] = []

    def free() -> list[dict[str, float]]:
        looked.append(clock[0])
        return []

    looks = Room(free, WORKER, 10.0)
    for second in range(25):
        clock[0] = float(second)
        looks.came()
    assert looked == [10.0, 20.0]
