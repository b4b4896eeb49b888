"""What the tests of the front door need: a backend that says what it is told, and a server on loopback."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import uvicorn

from cert_ray.errors import RequestError
from cert_ray.serving.answers import CascadeAnswer, Route
from cert_ray.serving.backends import Told
from cert_ray.serving.engines import Completion, TokenLogprobs
from cert_ray.serving.events import Event, SketchCandidate, SketchChosen, TextDrawn
from cert_ray.serving.sampling import Sampling
from cert_ray.sketching import Placeholder

SKETCH = SketchChosen(
    text="x = number",
    placeholders=(Placeholder(4, 10, "number"),),
    votes=3,
    vote_share=0.75,
    sketches=4,
    candidates=(
        SketchCandidate("x = number", (Placeholder(4, 10, "number"),), 3, -0.5),
        SketchCandidate("x = df", (), 1, -1.0),
    ),
)


class ScriptedBackend:
    """A `Backend` whose every choice is `" = <number of the choice>"`, drawn in two pieces; or which refuses.

    With `hold`, nothing is told after the first event until `release` is set; a `fault` is raised then. `ended` is set
    when a call ends in any way.
    """

    def __init__(
        self,
        refusal: Exception | None = None,
        served: Mapping[str, str | None] | None = None,
        hold: bool = False,
        fault: Exception | None = None,
    ) -> None:
        self.served: Mapping[str, str | None] = served or {"org/cert": None}
        self._refusal, self._hold, self._fault = refusal, hold, fault
        self.asked: list[tuple[str, list[str], Sampling]] = []
        self.begun, self.ended, self.release = threading.Event(), threading.Event(), threading.Event()
        self.running = 0

    async def answer(
        self, model: str, prompts: Sequence[str], sampling: Sampling, timeout_s: float
    ) -> list[CascadeAnswer]:
        [*_, told] = [told async for told in self.stream(model, prompts, sampling, timeout_s)]
        assert told.answers is not None
        return list(told.answers)

    async def stream(
        self, model: str, prompts: Sequence[str], sampling: Sampling, timeout_s: float
    ) -> AsyncGenerator[Told, None]:
        self.asked.append((model, list(prompts), sampling))
        self.running += 1
        try:
            if self._refusal is not None:
                raise self._refusal
            self.begun.set()
            yield Told(tuple((place, SKETCH) for place in range(len(prompts))))
            while self._hold and not self.release.is_set():
                await asyncio.sleep(0.005)
            if self._fault is not None:
                raise self._fault
            events: list[tuple[int, Event]] = []
            for place in range(len(prompts)):
                for index in range(sampling.n):
                    events += [(place, TextDrawn(index, " =")), (place, TextDrawn(index, f" {index}", "stop"))]
            yield Told(tuple(events))
            yield Told((), tuple(self._answer(prompt, sampling) for prompt in prompts))
        finally:
            self.running -= 1
            self.ended.set()

    def _answer(self, prompt: str, sampling: Sampling) -> CascadeAnswer:
        def logprobs(*tokens: str) -> TokenLogprobs | None:
            if sampling.logprobs is None:
                return None
            offsets = [sum(map(len, tokens[:place])) for place in range(len(tokens))]
            numbers = (-0.25,) * len(tokens)
            return TokenLogprobs(tokens, numbers, tuple({token: -0.25} for token in tokens), tuple(offsets))

        choices = tuple(
            Completion((1, 2), f" = {index}", "stop", -0.25, logprobs(" =", f" {index}")) for index in range(sampling.n)
        )
        return CascadeAnswer(
            choices,
            Route.GENERATOR,
            sketch=SKETCH.text,
            sketch_votes=SKETCH.votes,
            vote_share=SKETCH.vote_share,
            prompt_tokens=3,
            timings_s={"sketch": 0.1, "generate": 0.2},
            chosen=SKETCH,
            cached_tokens=1,
            completion_tokens=2 * sampling.drawn,
            sketch_tokens=9,
            prompt_logprobs=logprobs(prompt) if sampling.echo else None,
        )


BUSY = RequestError(503, "busy", None, "overloaded", retry_after_s=7)


@contextmanager
def listening(app: Any) -> Iterator[str]:
    """The base URL of `app`, served by uvicorn on a free port of loopback."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off", ws="none"))
        started = threading.Event()
        startup = server.startup

        async def startup_and_tell(sockets: Any = None) -> None:
            await startup(sockets)
            started.set()

        server.startup = startup_and_tell  # type: ignore[method-assign]
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        assert started.wait(30)
        try:
            yield f"http://127.0.0.1:{bound.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(30)
