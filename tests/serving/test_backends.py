"""The bridge from threads to coroutines: answers, events in order, and an end to work that nobody waits for."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from cert_ray.errors import DeadlineError, RequestCancelledError, RequestError
from cert_ray.serving.answers import CascadeAnswer, Listener, Route
from cert_ray.serving.backends import ContradictedError, LocalBackend, Retelling, Told
from cert_ray.serving.events import SketchChosen, TextDrawn
from cert_ray.serving.sampling import Sampling
from tests.serving.fakes import FakeAnswerer


class SlowAnswerer(FakeAnswerer):
    """An answerer that draws `tokens` tokens, each as soon as it is wanted, or until it is no longer wanted."""

    def __init__(self, tokens: int = 3) -> None:
        self._tokens = tokens
        self.begun, self.ended = threading.Event(), threading.Event()
        self.outcome: type[Exception] | None = None

    def answer_one(self, prompt: str, sampling: Sampling, listener: Listener) -> CascadeAnswer:
        self.begun.set()
        try:
            if prompt == "refuse":
                raise RequestError(400, "too long", "prompt")
            for token in range(self._tokens):
                listener.check()
                if listener.tell is not None:
                    listener.tell(TextDrawn(0, str(token)))
                time.sleep(0.001)
        except RequestError as error:
            self.outcome = type(error)
            raise
        finally:
            self.ended.set()
        return CascadeAnswer((), Route.MODEL)


def backend_of(answerer: SlowAnswerer) -> LocalBackend:
    return LocalBackend({"cert": (None, answerer)})


async def told_by(answerer: SlowAnswerer, prompt: str = "x") -> list[Told]:
    return [told async for told in backend_of(answerer).stream("cert", [prompt], Sampling(), 60)]


def test_what_is_told_is_everything_in_order_and_then_the_answers() -> None:
    *before, last = asyncio.run(told_by(SlowAnswerer(50)))
    events = [event for told in (*before, last) for _, event in told.events]
    assert events == [TextDrawn(0, str(token)) for token in range(50)]
    assert all(told.answers is None for told in before)
    assert last.answers == (CascadeAnswer((), Route.MODEL),)


def test_a_second_telling_is_told_from_where_the_first_one_stopped() -> None:
    sketch = SketchChosen("s", (), 1, 1.0, 1, ())
    first = Told(((0, sketch), (0, TextDrawn(0, "ab")), (0, TextDrawn(1, "x", "stop"))))
    retelling = Retelling()
    assert retelling.new(first) == first
    retelling.begin_again()
    again = Told(((0, sketch), (0, TextDrawn(0, "a")), (0, TextDrawn(1, "x", "stop")), (0, TextDrawn(0, "bc"))))
    assert retelling.new(again) == Told(((0, TextDrawn(0, "c")),))
    end = Told(((0, TextDrawn(0, "", "length")),), (CascadeAnswer((), Route.MODEL),))
    assert retelling.new(end) == end
    retelling.begin_again()
    with pytest.raises(ContradictedError, match="differs"):
        retelling.new(Told(((0, TextDrawn(0, "ac")),)))


def test_refusals_come_through_both_ways() -> None:
    with pytest.raises(RequestError, match="too long"):
        asyncio.run(backend_of(SlowAnswerer()).answer("cert", ["refuse"], Sampling(), 60))
    with pytest.raises(RequestError, match="too long"):
        asyncio.run(told_by(SlowAnswerer(), "refuse"))


def test_an_answer_that_is_not_awaited_any_more_is_not_drawn_to_its_end() -> None:
    answerer = SlowAnswerer(1_000_000)

    async def go_away() -> None:
        task = asyncio.ensure_future(backend_of(answerer).answer("cert", ["x"], Sampling(), 60))
        await asyncio.to_thread(answerer.begun.wait)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(go_away())
    assert answerer.ended.wait(10)
    assert answerer.outcome is RequestCancelledError


def test_a_stream_that_is_closed_is_not_drawn_to_its_end() -> None:
    answerer = SlowAnswerer(1_000_000)

    async def go_away() -> None:
        stream = backend_of(answerer).stream("cert", ["x"], Sampling(), 60)
        await anext(stream)
        await stream.aclose()

    asyncio.run(go_away())
    assert answerer.ended.wait(10)
    assert answerer.outcome is RequestCancelledError


def test_the_deadline_ends_the_work_in_its_thread() -> None:
    answerer = SlowAnswerer(1_000_000)
    with pytest.raises(DeadlineError):
        asyncio.run(backend_of(answerer).answer("cert", ["x"], Sampling(), 0.05))
    assert answerer.ended.is_set()
