"""What ends the workers early: nodes that leave, and a stop; short steps are not all followed by a question."""

from __future__ import annotations

import logging

import pytest

from cert_ray.training import notices
from cert_ray.training.notices import Notices
from cert_ray.training.together import Together


class _OneRank(Together):
    def __init__(self) -> None:
        super().__init__(0, 1)

    def decide(self, decision):  # type: ignore[no-untyped-def]
        return decision()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(notices.time, "monotonic", lambda: now[0])
    return now


def test_a_node_that_leaves_is_told_and_ends_the_workers(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    leaving: list[str] = []
    asked = Notices(lambda: leaving, None, _OneRank())
    clock[0] += 5.0
    assert asked.came(1) is None
    leaving += ["node-b", "node-a"]
    clock[0] += 5.0
    with caplog.at_level(logging.WARNING):
        assert asked.came(2) == "leaving"
    assert caplog.messages == ["step 2: node-a, node-b will be taken away: a checkpoint is due"]


def test_a_stop_comes_before_nodes_that_leave(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    asked = Notices(lambda: ["node-a"], lambda: "stopped", _OneRank())
    clock[0] += 5.0
    with caplog.at_level(logging.WARNING):
        assert asked.came(1) == "stopped"
    assert caplog.messages == ["step 1: the run was asked to stop: a checkpoint is due"]


def test_a_node_that_leaves_comes_before_one_that_joined(clock: list[float]) -> None:
    clock[0] += 5.0
    assert Notices(lambda: ["node-a"], lambda: "growing", _OneRank()).came(1) == "leaving"
    assert Notices(list, lambda: "growing", _OneRank()).came(1) == "growing"


@pytest.mark.parametrize("who", ["leaving", "asked"])
def test_they_are_asked_every_two_seconds_of_steps(clock: list[float], who: str) -> None:
    asked_at: list[float] = []

    def leaving() -> list[str]:
        asked_at.append(clock[0])
        return []

    def ask() -> None:
        asked_at.append(clock[0])

    asked = Notices(leaving, None, _OneRank()) if who == "leaving" else Notices(None, ask, _OneRank())
    for step in range(1, 101):
        clock[0] += 0.125
        assert asked.came(step) is None
    assert asked_at[:5] == [0.125, 0.375, 0.875, 1.875, 3.875]  # one step, two, four, eight, sixteen
    assert asked_at[5:] == [5.875 + 2.0 * number for number in range(4)]


def test_with_nobody_to_ask_there_is_never_news() -> None:
    asked = Notices(None, None, _OneRank())
    assert not any(asked.came(step) for step in range(1, 10))
