"""Requests are taken while they can be answered in time, and refused at once when not."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from cert_ray.errors import RequestError
from cert_ray.serving.admission import Admission


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def serve(admission: Admission, clock: Clock, requests: int, gap_s: float) -> None:
    """`requests` come together, and are answered one by one, `gap_s` apart."""
    places = [ExitStack() for _ in range(requests)]
    for place in places:
        place.enter_context(admission.admit())
    for place in places:
        clock.now += gap_s
        place.close()


def test_there_are_never_more_than_the_bound() -> None:
    admission = Admission(2, 1, 60)
    with admission.admit(), admission.admit():
        with pytest.raises(RequestError) as refused, admission.admit():
            pass
        assert (refused.value.status, refused.value.code) == (503, "overloaded")
        assert admission.in_flight == 2
    assert admission.in_flight == 0
    with admission.admit():
        pass


def test_the_wait_follows_from_the_rate_of_answers() -> None:
    clock = Clock()
    admission = Admission(100, 2, 1_000, clock)
    assert admission.expected_wait_s() == 0
    serve(admission, clock, 40, gap_s=3)
    assert admission.expected_wait_s() == 0  # nothing waits
    with ExitStack() as places:
        for _ in range(9):
            places.enter_context(admission.admit())
        assert admission.expected_wait_s() == pytest.approx(30)  # the tenth ends after ten gaps


def test_what_would_miss_its_deadline_is_refused_with_the_time_to_come_back() -> None:
    clock = Clock()
    admission = Admission(100, 1, 20, clock)
    serve(admission, clock, 6, gap_s=3)
    with ExitStack() as places:
        for _ in range(6):
            places.enter_context(admission.admit())
        with pytest.raises(RequestError, match="The wait is 21 s") as refused, admission.admit():
            pass
        assert refused.value.retry_after_s == 1


def test_a_server_that_became_quick_again_is_noticed() -> None:
    clock = Clock()
    admission = Admission(100, 1, 20, clock)
    serve(admission, clock, 3, gap_s=100)
    for _ in range(200):  # one at a time is always taken
        serve(admission, clock, 1, gap_s=0.1)
    with admission.admit(), admission.admit():
        assert admission.expected_wait_s() < 1


def test_requests_that_fail_say_nothing_about_the_rate() -> None:
    clock = Clock()
    admission = Admission(100, 1, 20, clock)
    for _ in range(5):
        clock.now += 50
        with pytest.raises(ZeroDivisionError), admission.admit(), admission.admit():
            raise ZeroDivisionError
    with admission.admit():
        assert admission.expected_wait_s() == 0


@pytest.mark.parametrize("at_once", [1, 4])
def test_an_hour_without_requests_is_no_hour_of_waiting(at_once: int) -> None:
    clock = Clock()
    admission = Admission(100, at_once, 20, clock)
    for _ in range(3):  # now and then one, and then as many as are worked on together, of a second each
        serve(admission, clock, 1, gap_s=1)
        clock.now += 3_600
        places = [ExitStack() for _ in range(at_once)]
        for place in places:
            place.enter_context(admission.admit())
        clock.now += 1
        places.pop().close()
        with admission.admit(), admission.admit():
            assert admission.expected_wait_s() <= at_once + 2
        for place in places:
            place.close()
