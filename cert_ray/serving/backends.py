"""What a front door asks: `Backend`, and the one that answers in this process.

In: a served model's name, prompts, `Sampling`, seconds. Out: answers, or batches of events and then the answers. Models
block their thread, and HTTP has one event loop: this is the bridge between them. No HTTP and no Ray in here.

Whoever stops waiting (a cancelled task, a closed stream) cancels the work, which ends with the token being drawn.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from cert_ray.serving.answering import Answerer
from cert_ray.serving.answers import CascadeAnswer
from cert_ray.serving.events import Event, SketchChosen, TextDrawn
from cert_ray.serving.sampling import Sampling


@dataclass(frozen=True, slots=True)
class Told:
    """What happened since the last time: events with their prompt's number, and finally the answers."""

    events: tuple[tuple[int, Event], ...]
    answers: tuple[CascadeAnswer, ...] | None = None


@dataclass(frozen=True, slots=True)
class Served:
    """One request that has ended, for statistics. `answers` is empty unless `status` is 200."""

    model: str
    status: int
    seconds: float
    first_s: float | None  # until the first event of a stream
    answers: tuple[CascadeAnswer, ...] = ()


class ContradictedError(Exception):
    """A second engine's answer differs from the first one's."""


class Retelling:
    """Drops from a second stream of the same answers what was already passed on, so that a stream can go on.

    The second stream starts with `begin_again`. Its answers must be equal, as they are with equal seeds.
    """

    def __init__(self) -> None:
        self._told: dict[tuple[int, int], str] = {}  # text passed on, by prompt and choice
        self._heard: dict[tuple[int, int], str] = {}  # the same for the current stream
        self._ended: set[tuple[int, int]] = set()
        self._chosen: set[int] = set()

    def begin_again(self) -> None:
        """What comes now starts from the beginning."""
        self._heard = {}

    def new(self, told: Told) -> Told:
        """The part of `told` that is new.

        Raises:
            ContradictedError: when a text contradicts what was already passed on.
        """
        events = [(prompt, new) for prompt, event in told.events for new in self._new(prompt, event)]
        return Told(tuple(events), told.answers)

    def _new(self, prompt: int, event: Event) -> list[Event]:
        if isinstance(event, SketchChosen):
            known = prompt in self._chosen
            self._chosen.add(prompt)
            return [] if known else [event]
        place = (prompt, event.index)
        before, heard = self._told.get(place, ""), self._heard.get(place, "") + event.text
        shorter = event.finish_reason is not None and len(heard) < len(before)
        if shorter or not (heard.startswith(before) or before.startswith(heard)):
            raise ContradictedError("the repeated answer differs from what was already passed on")
        self._heard[place] = heard
        self._told[place] = max(before, heard, key=len)
        ends = event.finish_reason is not None and place not in self._ended
        if ends:
            self._ended.add(place)
        text = heard[len(before) :]
        return [TextDrawn(event.index, text, event.finish_reason if ends else None)] if text or ends else []


class Backend(Protocol):
    """What answers prompts. Both methods raise `RequestError` for what they refuse."""

    @property
    def served(self) -> Mapping[str, str | None]:
        """The models by name, each with its library, as `resolving.resolve` takes them."""
        ...

    async def answer(
        self, model: str, prompts: Sequence[str], sampling: Sampling, timeout_s: float
    ) -> list[CascadeAnswer]:
        """One answer per prompt, in order."""
        ...

    def stream(
        self, model: str, prompts: Sequence[str], sampling: Sampling, timeout_s: float
    ) -> AsyncGenerator[Told, None]:
        """The same, reported while it is drawn; the last `Told` holds the answers."""
        ...


class LocalBackend:
    """A `Backend` over answerers in this process."""

    def __init__(self, answerers: Mapping[str, tuple[str | None, Answerer]], max_threads: int = 64) -> None:
        """`answerers` by name, each with its library. Requests beyond `max_threads` wait for a thread."""
        self._answerers = answerers
        self._bridge = Bridge(max_threads)

    @property
    def served(self) -> Mapping[str, str | None]:
        """The models by name, each with its library."""
        return {name: library for name, (library, _) in self._answerers.items()}

    async def answer(
        self, model: str, prompts: Sequence[str], sampling: Sampling, timeout_s: float
    ) -> list[CascadeAnswer]:
        """See `Backend`."""
        return await self._bridge.answer(self._answerers[model][1], prompts, sampling, timeout_s)

    def stream(
        self, model: str, prompts: Sequence[str], sampling: Sampling, timeout_s: float
    ) -> AsyncGenerator[Told, None]:
        """See `Backend`."""
        return self._bridge.stream(self._answerers[model][1], prompts, sampling, timeout_s)


class Bridge:
    """Runs answerers in threads, for coroutines. Each request has a thread; an answerer batches across threads."""

    def __init__(self, max_threads: int) -> None:
        self._pool = ThreadPoolExecutor(max_threads, thread_name_prefix="answer")

    async def answer(
        self, answerer: Answerer, prompts: Sequence[str], sampling: Sampling, timeout_s: float
    ) -> list[CascadeAnswer]:
        """One answer per prompt, in order.

        Raises:
            RequestError: what the answerer refuses; `DeadlineError` after `timeout_s`.
        """
        cancelled, deadline_s = threading.Event(), time.monotonic() + timeout_s
        work = self._pool.submit(
            answerer.answer, prompts, sampling, cancelled=cancelled, deadline_s=deadline_s, on_event=None
        )
        try:
            return await asyncio.wrap_future(work)
        finally:
            cancelled.set()

    async def stream(
        self, answerer: Answerer, prompts: Sequence[str], sampling: Sampling, timeout_s: float
    ) -> AsyncGenerator[Told, None]:
        """The same, reported while it is drawn. What is drawn while a batch is being sent makes up the next batch."""
        cancelled, deadline_s = threading.Event(), time.monotonic() + timeout_s
        loop = asyncio.get_running_loop()
        # None: the work has ended
        told: asyncio.Queue[tuple[int, Event] | None] = asyncio.Queue()

        def tell(item: tuple[int, Event] | None) -> None:
            if not cancelled.is_set():  # otherwise nobody listens, and the loop may be closed
                loop.call_soon_threadsafe(told.put_nowait, item)

        work: Future[list[CascadeAnswer]] = self._pool.submit(
            answerer.answer,
            prompts,
            sampling,
            cancelled=cancelled,
            deadline_s=deadline_s,
            on_event=lambda prompt, event: tell((prompt, event)),
        )
        work.add_done_callback(lambda _: tell(None))
        try:
            while True:
                batch = [await told.get()]
                while not told.empty():
                    batch.append(told.get_nowait())
                events = tuple(item for item in batch if item is not None)
                if batch[-1] is None:
                    yield Told(events, tuple(work.result()))
                    return
                yield Told(events)
        finally:
            cancelled.set()
            work.cancel()  # if no thread has begun it
