"""Which requests are taken at all: those that can be answered in time. The others are refused at once.

In: when requests begin and end, and how. Out: admission, or a 503 that says when to try again. This is no queue: what
is admitted waits elsewhere, and is never more than `max_in_flight` requests.

Two things are learned, both per prompt, since each prompt of a list is answered by itself. From answers given while
requests wait: the time that a prompt takes, and so how long one more would wait. This holds if the number of requests
worked on together is as configured. From missed deadlines: how many prompts may be here at all. Where requests share an
engine's time, or fewer engines run than may, all can be late before any wait is seen. What a prompt asks for (n,
tokens) does not count: samples are drawn jointly, and few answers are as long as they may be.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cert_ray.errors import DeadlineError, RequestError

# The rate is a moving average over the last prompts, later ones counting more. Assumed: sixteen are steady enough.
_WEIGHT = 1 / 16
# A larger share of late ones means that too many requests are here; a smaller one, that those few ask for too much.
# Assumed: three in a row are needed after none.
_TOLERATED = 1 / 8
# Share of what can be answered by a deadline that is let in once too many were late. Assumed: with all of it, answers
# would come just in time, and those that take longer than most would be late.
_LET_IN = 3 / 4


class Admission:
    """Counts the requests in flight, and measures how fast they are answered. For one event loop."""

    def __init__(
        self,
        max_in_flight: int,
        at_once: int,
        timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
        observe: Callable[[int], None] = lambda _: None,
    ) -> None:
        """`at_once` requests are worked on together; each is given up after `timeout_s`.

        `observe` gets the number in flight whenever a request begins or ends.
        """
        self._max_in_flight, self._at_once, self._timeout_s, self._clock = max_in_flight, at_once, timeout_s, clock
        self._observe = observe
        self.in_flight = 0
        self._prompts = 0  # of the requests in flight
        self._gap_s: float | None = None  # seconds per prompt answered while requests wait
        # Since when all `at_once` places are taken, or since a request last ended while they were; None: some are free.
        self._full_since: float | None = None
        self._answered_last = False  # whether the request that ended last was answered
        self._answers = 0  # prompts answered
        self._late_share = 0.0  # late ones among those answered or late, since the limit was last lowered
        self._limit = math.inf  # while fewer prompts are in flight, one more request is let in, however large

    @contextmanager
    def admit(self, prompts: int = 1) -> Iterator[None]:
        """Hold the place of one request with this many prompts. When no other request is there, it is always taken.

        Raises:
            RequestError: 503, when there is no place, or the wait would outlast the deadline.
        """
        wait_s = self.expected_wait_s(prompts)
        if self.in_flight >= self._max_in_flight or self._prompts > self._limit - 1:
            raise _overloaded("The server is busy: try again.", self._gap_s or 1.0)
        if wait_s > self._timeout_s:
            problem = f"The wait is {wait_s:.0f} s now, the limit {self._timeout_s:g} s: try again."
            raise _overloaded(problem, wait_s - self._timeout_s)
        self.in_flight += 1
        self._prompts += prompts
        if self.in_flight == self._at_once:
            self._full_since = self._clock()
        self._observe(self.in_flight)
        began, answers_before, answered = self._clock(), self._answers, False
        try:
            yield
        except DeadlineError:
            self._lower_limit(self._answers - answers_before)
            raise
        else:
            answered = True
            self._raise_limit(self._clock() - began, prompts)
        finally:
            self._end(answered, prompts)

    def expected_wait_s(self, prompts: int = 1) -> float:
        """Seconds until a request that comes now is answered; 0 if it starts at once or nothing is known yet."""
        if self._gap_s is None or self.in_flight < self._at_once:
            return 0.0
        return self._gap_s * (self._prompts + prompts)

    def _raise_limit(self, took_s: float, prompts: int) -> None:
        """After an answer, raise the limit a little: by at most one prompt after as many answers as the limit allows.

        The nearer the deadline was, the less it rises, so that deadlines are approached but not run into.
        """
        self._answers += prompts
        self._late_share -= _WEIGHT * self._late_share
        slack = max(0.0, 1 - took_s / self._timeout_s)
        self._limit += prompts * slack / self._limit

    def _lower_limit(self, answers: int) -> None:
        """If too many are late, let in no more than can be in time: `answers` came while this request waited."""
        self._late_share += _WEIGHT * (1 - self._late_share)
        if self._late_share > _TOLERATED:
            self._limit = max(1.0, min(self._limit, _LET_IN * answers))
            self._late_share = 0.0

    def _end(self, answered: bool, prompts: int) -> None:
        """Count out one request, and measure the gap: the time since the last answer in which all places were taken.

        Other times show how often requests come, not how fast they are answered: an idle hour is no gap.
        """
        now = self._clock()
        # A request that was cancelled or refused says nothing about the rate, nor does the gap after it.
        if answered and self._answered_last and self._full_since is not None:
            gap_s = (now - self._full_since) / prompts
            weight = 1 - (1 - _WEIGHT) ** prompts  # the same as for that many single answers
            self._gap_s = gap_s if self._gap_s is None else self._gap_s + weight * (gap_s - self._gap_s)
        self._answered_last = answered
        self.in_flight -= 1
        self._prompts -= prompts
        self._full_since = now if self.in_flight >= self._at_once else None
        self._observe(self.in_flight)


def _overloaded(problem: str, retry_after_s: float) -> RequestError:
    return RequestError(503, problem, None, "overloaded", retry_after_s=max(1, math.ceil(retry_after_s)))
