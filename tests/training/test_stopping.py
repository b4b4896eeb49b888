"""Signals of a driver that trains: the first is a request, the second what it was before, and both are told apart."""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace

import pytest
import ray

from cert_ray.training.stopping import Stop, asked


@pytest.fixture
def actors(monkeypatch):
    """The names of the actors that there are, as Ray would keep them."""
    names = []

    def options(name):
        return SimpleNamespace(remote=lambda: names.append(name) or name)

    def get_actor(name):
        if name not in names:
            raise ValueError(name)

    monkeypatch.setattr(ray, "remote", lambda **_: lambda _: SimpleNamespace(options=options))
    monkeypatch.setattr(ray, "kill", names.remove)
    monkeypatch.setattr(ray, "get_actor", get_actor)
    return names


def _raises(number, frame):
    raise TimeoutError(number)


@pytest.fixture(params=[signal.SIGINT, signal.SIGTERM])
def number(request):
    """A signal that raises."""
    before = signal.signal(request.param, _raises)
    yield request.param
    signal.signal(request.param, before)


def test_the_first_signal_asks_and_the_second_does_what_it_did(actors, number):
    with Stop() as stop:
        assert not asked(stop.name)
        os.kill(os.getpid(), number)
        assert asked(stop.name)
        assert stop.came
        with pytest.raises(TimeoutError):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is _raises
    assert not actors


def test_a_handler_that_came_later_is_second(actors, number):
    with Stop() as stop:
        signal.signal(number, lambda *_: actors.append("later"))
        stop.take_over(number)
        os.kill(os.getpid(), number)
        assert actors == [stop.name]
        os.kill(os.getpid(), number)
        assert actors == [stop.name, "later"]
    assert signal.getsignal(number) is _raises


def test_a_signal_that_is_ignored_stays_so(actors, number):
    signal.signal(number, signal.SIG_IGN)
    with Stop() as stop:
        os.kill(os.getpid(), number)
        assert not stop.came


def test_a_second_signal_that_the_system_takes_ends_the_process(actors):
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with Stop():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM


def _stopped_twice(number):
    with Stop():
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_the_exit_that_a_second_signal_brings_is_told_as_the_signal(actors, number, error):
    """Ray leaves with 15, Ray Train with 0."""
    before = signal.signal(number, lambda *_: exit(0))
    try:
        with pytest.raises(error) as raised:
            _stopped_twice(number)
    finally:
        signal.signal(number, before)
    if error is SystemExit:
        assert raised.value.code == 128 + signal.SIGTERM


def test_an_exit_without_a_signal_is_let_be(actors):
    with pytest.raises(SystemExit) as raised, Stop():
        raise SystemExit(3)
    assert raised.value.code == 3


def test_a_head_that_does_not_answer_stops_nothing(monkeypatch):
    def fails(name):
        raise ray.exceptions.RpcError("unavailable")

    monkeypatch.setattr(ray, "get_actor", fails)
    assert not asked("name")


def test_a_handler_that_python_did_not_set_is_let_be(actors, monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(signal, "getsignal", lambda _: None)  # as it says of one set by a host in C
    with Stop():
        pass
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGINT) is before
