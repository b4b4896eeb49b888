"""Recently read prompts, kept for requests that begin alike and for the second stage of their own request.

In: prompts' tokens, and what a model keeps of them (keys and values). Out: the longest common beginning that is kept. A
prompt between two stages is pinned: however many and however long the requests are, it stays until its second stage has
read it. So the limit applies to prompts that may never come again. Prompts of requests at work are bounded by how many
requests are answered at once, as their branches are.
"""

from __future__ import annotations

import itertools
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from cert_ray.serving.engines import Work

# A shorter common beginning is not worth copying. Assumed.
_LEAST_SHARED_TOKENS: Final = 8


class Keeps(Protocol):
    """What is needed of a model's forward pass."""

    def begin(self) -> Any:
        """The empty cache of a new request."""
        ...

    def beginning(self, kept: Any, tokens: int) -> Any | None:
        """A copy of what is kept of a prompt's first tokens; None if that is not possible."""
        ...


class Pin:
    """Holds a prompt as long as somebody holds the pin."""

    def __init__(self, prompt: tuple[int, ...]) -> None:
        self.prompt = prompt


class KeptPrompts:
    """Keys and values of recently read prompts, for requests that begin alike. The least recently used go first.

    No kept prompt is the beginning of another: the longer one serves both.
    """

    def __init__(self, model: Keeps, most_tokens: int) -> None:
        """Keep up to `most_tokens` of prompts, plus pinned ones; 0 keeps nothing."""
        self._model, self._most_tokens = model, most_tokens
        self._kept: OrderedDict[tuple[int, ...], Any] = OrderedDict()
        # Changed in whatever thread lets a pin go; a `WeakSet` must not change while it is iterated over.
        self._pins: dict[int, tuple[int, ...]] = {}
        self._numbers = itertools.count()

    def find(self, prompt: Sequence[int], work: Work) -> tuple[Any, int]:
        """What is kept for a new request with `prompt`, and how many of its tokens need not be read."""
        self.trim()
        best, shared = None, 0
        if not work.score_prompt:
            asked = np.asarray(prompt)
            for other in self._kept:
                common = _common_beginning(asked, np.asarray(other))
                if common > shared:
                    best, shared = other, common
        shared = min(shared, len(prompt) - 1)  # the last token is read for its logits
        if best is None or shared < _LEAST_SHARED_TOKENS:
            return self._model.begin(), 0
        self._kept.move_to_end(best)
        return self._model.beginning(self._kept[best], shared), shared

    def wants(self, prompt: Sequence[int]) -> bool:
        """Whether this prompt is worth keeping, and not yet kept, either itself or as the beginning of another."""
        asked = tuple(prompt)
        if self._most_tokens == 0 or (len(asked) > self._most_tokens and not self._is_pinned(asked)):
            return False
        return not any(other[: len(asked)] == asked for other in self._kept)

    def add(self, prompt: Sequence[int], kept: Any) -> None:
        """Keep a copy of what is kept of a prompt that was just read."""
        copied = self._model.beginning(kept, len(prompt))
        if copied is None:
            return
        added = tuple(prompt)
        for other in [other for other in self._kept if added[: len(other)] == other]:
            del self._kept[other]
        self._kept[added] = copied
        self.trim()

    def trim(self) -> None:
        """Drop what is beyond the limit and not pinned. Call this when a request has ended."""
        excess = sum(map(len, self._kept)) - self._most_tokens
        for other in list(self._kept):
            if excess > 0 and not self._is_pinned(other):
                del self._kept[other]
                excess -= len(other)

    def pin(self, prompt: Sequence[int]) -> Pin:
        """A pin that keeps `prompt`, or a longer one in its place, while the pin is held. Call this before `add`."""
        pin, number = Pin(tuple(prompt)), next(self._numbers)
        self._pins[number] = pin.prompt
        weakref.finalize(pin, self._pins.pop, number, None).atexit = False
        return pin

    def _is_pinned(self, prompt: tuple[int, ...]) -> bool:
        return any(prompt[: len(pinned)] == pinned for pinned in list(self._pins.values()))


def _common_beginning(one: npt.NDArray[np.int64], other: npt.NDArray[np.int64]) -> int:
    size = min(len(one), len(other))
    differs = np.flatnonzero(one[:size] != other[:size])
    return int(differs[0]) if len(differs) else size
