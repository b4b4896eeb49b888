"""Ranks answer alike, and none is in a collective while another still works."""

from __future__ import annotations

import pytest
import torch

from cert_ray.errors import CertRayError, ConfigError, InputError
from cert_ray.training.together import Together


class _Group:
    """A process group of two in one process: what this rank does, and what the other one is said to give."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, other: object = None) -> None:
        self.done: list[str] = []
        self.other = other
        monkeypatch.setattr(torch.distributed, "all_gather_object", self._gather)
        monkeypatch.setattr(torch.distributed, "broadcast_object_list", self._broadcast)
        monkeypatch.setattr(torch.distributed, "barrier", lambda: self.done.append("barrier"))

    def wait(self) -> None:
        self.done.append("wait")

    def work(self) -> str:
        self.done.append("work")
        return "mine"

    def _gather(self, found: list[object], mine: object) -> None:
        self.done.append("gather")
        found[:] = [mine, self.other]

    def _broadcast(self, answer: list[object], src: int) -> None:
        self.done.append("broadcast")
        assert src == 0
        if self.other is not None:
            answer[:] = [self.other]


def test_collectives_begin_once_all_have_come(monkeypatch: pytest.MonkeyPatch) -> None:
    group = _Group(monkeypatch)
    together = Together(0, 2, group.wait)
    assert together.everywhere(group.work) == "mine"
    assert together.decide(group.work) == "mine"
    together.wait()
    assert group.done == ["work", "wait", "gather", "work", "wait", "broadcast", "wait"]


def test_without_means_to_wait_the_group_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    group = _Group(monkeypatch)
    together = Together(0, 2)
    together.wait()
    assert together.gathered(1) == [1, None]
    assert group.done == ["barrier", "gather"]


def test_an_error_of_ours_on_one_rank_is_raised_on_all_and_its_own_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    group = _Group(monkeypatch, ConfigError("base: only the second machine lacks it"))
    with pytest.raises(ConfigError, match="only the second"):
        Together(0, 2).everywhere(group.work)

    def lacks() -> None:
        raise InputError("pack", "is not there", "Pack it.")

    with pytest.raises(InputError, match="is not there"):
        Together(0, 2).everywhere(lacks)


def test_rank_0_decides_and_its_error_is_raised_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    group = _Group(monkeypatch, "what rank 0 found")
    assert Together(1, 2).decide(group.work) == "what rank 0 found"
    assert "work" not in group.done
    group.other = ConfigError("no")
    with pytest.raises(CertRayError, match="no"):
        Together(1, 2).decide(group.work)
