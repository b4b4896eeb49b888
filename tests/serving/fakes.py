"""An answerer without models: `Answerer.answer`'s signature stands here, once for all stand-ins."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial

from cert_ray.serving.answering import Answerer, check_wanted
from cert_ray.serving.answers import CascadeAnswer, Listener
from cert_ray.serving.events import Event
from cert_ray.serving.sampling import Sampling


class FakeAnswerer(Answerer):
    """Answers prompts one after the other by `answer_one`, in the calling thread."""

    def __init__(self) -> None:
        """No model is needed."""

    def answer(
        self,
        prompts: Sequence[str],
        sampling: Sampling,
        *,
        cancelled: threading.Event | None = None,
        deadline_s: float | None = None,
        on_event: Callable[[int, Event], None] | None = None,
    ) -> list[CascadeAnswer]:
        """See `Answerer.answer`."""
        check = partial(check_wanted, cancelled, deadline_s)
        listeners = [Listener(check, on_event and partial(on_event, place)) for place in range(len(prompts))]
        return [self.answer_one(prompt, sampling, one) for prompt, one in zip(prompts, listeners, strict=True)]

    def answer_one(self, prompt: str, sampling: Sampling, listener: Listener) -> CascadeAnswer:
        """What a stand-in says."""
        raise NotImplementedError
