"""Nodes that are announced to leave: each is news once, and short steps are not all followed by a question."""

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


def test_each_node_is_news_once_and_told(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    leaving: list[str] = []
    asked = Notices(lambda: leaving, _OneRank())
    answers = []
    with caplog.at_level(logging.WARNING):
        for step in range(1, 8):
            clock[0] += 5.0
            if step == 3:
                leaving.append("node-a")
            if step == 5:
                leaving.append("node-b")
            answers.append(asked.came(step))
    assert answers == [False, False, True, False, True, False, False]
    assert [record.getMessage() for record in caplog.records] == [
        "step 3: node-a will be taken away: a checkpoint is due",
        "step 5: node-b will be taken away: a checkpoint is due",
    ]


def test_the_cluster_is_asked_every_two_seconds_of_steps(clock: list[float]) -> None:
    asked_at: list[float] = []

    def leaving() -> list[str]:
        asked_at.append(clock[0])
        return []

    asked = Notices(leaving, _OneRank())
    for step in range(1, 101):
        clock[0] += 0.125
        asked.came(step)
    assert asked_at[:5] == [0.125, 0.375, 0.875, 1.875, 3.875]  # one step, two, four, eight, sixteen
    assert asked_at[5:] == [5.875 + 2.0 * number for number in range(4)]


def test_without_a_cluster_to_ask_there_is_never_news() -> None:
    asked = Notices(None, _OneRank())
    assert not any(asked.came(step) for step in range(1, 10))
