"""Signals of a driver that trains: the first is a request, the second what it was before, and both are told apart."""

from __future__ import annotations

import os
import signal

import pytest

from cert_ray.training.stopping import Stop


class _Stop(Stop):
    """Counts how often it asks."""

    asked = 0

    def ask(self) -> None:
        self.asked += 1


def _raises(number, frame):
    raise TimeoutError(number)


@pytest.fixture(params=[signal.SIGINT, signal.SIGTERM])
def number(request):
    """A signal that raises."""
    before = signal.signal(request.param, _raises)
    yield request.param
    signal.signal(request.param, before)


def test_the_first_signal_asks_and_the_second_does_what_it_did(number):
    with _Stop() as stop:
        assert not stop.came
        os.kill(os.getpid(), number)
        assert stop.came
        with pytest.raises(TimeoutError):
            os.kill(os.getpid(), number)
    assert stop.asked == 1
    assert signal.getsignal(number) is _raises


def test_a_handler_that_came_later_is_second(number):
    later = []
    with _Stop() as stop:
        signal.signal(number, lambda *_: later.append(number))
        stop.take_over(number)
        os.kill(os.getpid(), number)
        assert (stop.asked, later) == (1, [])
        os.kill(os.getpid(), number)
        assert (stop.asked, later) == (1, [number])
    assert signal.getsignal(number) is _raises


def test_a_signal_that_is_ignored_stays_so(number):
    signal.signal(number, signal.SIG_IGN)
    with _Stop() as stop:
        os.kill(os.getpid(), number)
        assert not stop.came


def test_a_second_signal_that_the_system_takes_ends_the_process():
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with _Stop():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM


def _stopped_twice(number):
    with _Stop():
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_the_exit_that_a_second_signal_brings_is_told_as_the_signal(number, error):
    """Ray leaves with 15, Ray Train with 0."""
    before = signal.signal(number, lambda *_: exit(0))
    try:
        with pytest.raises(error) as raised:
            _stopped_twice(number)
    finally:
        signal.signal(number, before)
    if error is SystemExit:
        assert raised.value.code == 128 + signal.SIGTERM


def test_an_exit_without_a_signal_is_let_be():
    with pytest.raises(SystemExit) as raised, _Stop():
        raise SystemExit(3)
    assert raised.value.code == 3


def test_a_handler_that_python_did_not_set_is_let_be(monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(signal, "getsignal", lambda _: None)  # as it says of one set by a host in C
    with _Stop():
        pass
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGINT) is before
