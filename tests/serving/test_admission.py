"""Requests are taken while they can be answered in time, and refused at once when not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from itertools import cycle, repeat

import pytest

from cert_ray.errors import DeadlineError, RequestError
from cert_ray.serving.admission import Admission


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def serve(admission: Admission, clock: Clock, requests: int, gap_s: float, prompts: int = 1) -> None:
    """`requests` of so many prompts come together, and are answered one by one, `gap_s` apart."""
    places = [ExitStack() for _ in range(requests)]
    for place in places:
        place.enter_context(admission.admit(prompts))
    for place in places:
        clock.now += gap_s
        place.close()


def miss_deadline(place: ExitStack) -> None:
    with suppress(DeadlineError), place:
        raise DeadlineError(504, "late", None, "timeout")


@dataclass
class Held:
    place: ExitStack
    came_s: float
    prompts: int
    work_s: float


@dataclass
class Engines:
    """Engines of `places` each, first come, first served; what waits or is worked on for `timeout_s` is given up."""

    admission: Admission
    clock: Clock
    places: int
    work_s: float  # of a prompt alone
    timeout_s: float
    shared: bool = False  # an engine's prompts share its time; else each is as quick as it would be alone
    prompts: Iterator[int] = field(default_factory=lambda: repeat(1))  # of the requests that come
    held: list[Held] = field(default_factory=list)

    def run(self, seconds: float, load: float, engines: int = 1) -> Counter[str]:
        """How prompts ended, of whose requests `load` times as many come as the engines can answer of one prompt."""
        ended: Counter[str] = Counter()
        step_s, owed = 0.1, 0.0
        per_s = engines * (1 if self.shared else self.places) / self.work_s
        for _ in range(round(seconds / step_s)):
            self.clock.now += step_s
            owed += load * max(per_s, 1 / self.work_s) * step_s
            while owed >= 1:
                owed -= 1
                ended.update(self._come())
            worked_on = self.held[: engines * self.places]
            together = sum(one.prompts for one in worked_on)
            for one in worked_on:
                one.work_s -= step_s * (one.prompts * min(1, engines / together) if self.shared else 1)
            for one in list(self.held):
                if one.work_s <= 0:
                    one.place.close()
                    ended["answered"] += one.prompts
                elif self.clock.now - one.came_s >= self.timeout_s:
                    miss_deadline(one.place)
                    ended["late"] += one.prompts
                else:
                    continue
                self.held.remove(one)
        return ended

    def _come(self) -> list[str]:
        place, prompts = ExitStack(), next(self.prompts)
        try:
            place.enter_context(self.admission.admit(prompts))
        except RequestError:
            return ["refused"]
        self.held.append(Held(place, self.clock.now, prompts, self.work_s * (prompts if self.shared else 1)))
        return []


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


@pytest.mark.parametrize("first", [5, 32])
def test_each_prompt_of_a_list_counts_but_a_request_alone_is_always_taken(first: int) -> None:
    clock = Clock()
    admission = Admission(100, 1, 20, clock)
    serve(admission, clock, 2, gap_s=3, prompts=2)  # 1.5 s for each
    with admission.admit(first):
        assert admission.expected_wait_s(3) == pytest.approx((first + 3) * 1.5)
        with pytest.raises(RequestError, match="The wait is"), admission.admit(9):
            pass
        assert (admission.expected_wait_s(8) > 20) == (first > 5)


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


@pytest.mark.parametrize(("places", "work_s"), [(16, 5), (16, 3), (8, 10)])
def test_requests_that_share_an_engine_are_answered_however_many_come(places: int, work_s: float) -> None:
    clock = Clock()
    engines = Engines(Admission(places + 64, places, 60, clock), clock, places, work_s, timeout_s=60, shared=True)
    first, second = (engines.run(300, load=10) for _ in range(2))
    assert first["answered"] + second["answered"] >= 600 / work_s / 2
    assert first["late"] <= places + 64  # what was taken before anything was known
    assert second["late"] <= second["answered"] / 8


@pytest.mark.parametrize(("few", "many", "work_s"), [(9, 16, 1), (3, 8, 1), (19, 32, 1), (3, 8, 3)])
def test_requests_of_many_prompts_and_of_one_are_answered_in_time(few: int, many: int, work_s: float) -> None:
    clock, mix = Clock(), cycle([1] * few + [many])
    admission = Admission(16 + 64, 16, 60, clock)
    engines = Engines(admission, clock, 16, work_s, timeout_s=60, shared=True, prompts=mix)
    engines.run(900, load=10)
    after = engines.run(900, load=10)
    assert after["answered"] >= 0.8 * 900 / work_s
    assert after["late"] <= after["answered"] / 8


def test_after_an_overload_all_are_answered_again() -> None:
    clock = Clock()
    engines = Engines(Admission(80, 16, 60, clock), clock, places=16, work_s=5, timeout_s=60, shared=True)
    engines.run(600, load=10)
    engines.run(120, load=0.9)
    after = engines.run(1_000, load=0.9)
    assert after.keys() == {"answered"}
    assert after["answered"] == pytest.approx(180, abs=2)


def test_fewer_engines_than_there_may_be_get_no_more_than_they_can_answer_and_more_when_there_are_more() -> None:
    clock = Clock()
    engines = Engines(Admission(8 * 8 + 64, 8 * 8, 60, clock), clock, places=8, work_s=10, timeout_s=60)
    first, second = (engines.run(300, load=10) for _ in range(2))
    assert first["late"] <= 8 * 8 + 64
    assert second["late"] <= second["answered"] / 8
    assert second["answered"] >= 0.9 * 300 * 8 / 10
    engines.run(600, load=2, engines=8)
    scaled = engines.run(300, load=2, engines=8)
    assert scaled["answered"] >= 0.9 * 300 * 8 * 8 / 10
    assert scaled["late"] <= scaled["answered"] / 8


def test_engines_that_stood_still_are_fully_used_again() -> None:
    clock = Clock()
    engines = Engines(Admission(80, 16, 60, clock), clock, places=16, work_s=10, timeout_s=60)
    engines.run(200, load=10)
    assert engines.run(200, load=10, engines=0)["answered"] == 0
    engines.run(300, load=10)
    assert engines.run(300, load=10)["answered"] >= 0.9 * 300 * 16 / 10


def test_faults_and_a_late_request_now_and_then_take_no_places_away() -> None:
    clock = Clock()
    admission = Admission(20, 4, 60, clock)
    for _ in range(10):
        for _ in range(3):
            with suppress(ZeroDivisionError), admission.admit():
                clock.now += 60
                raise ZeroDivisionError
        place = ExitStack()
        place.enter_context(admission.admit())
        clock.now += 60
        miss_deadline(place)
        serve(admission, clock, 20, gap_s=0.1)  # all of them are taken
