"""Nodes that joined: whether a run of fewer workers than it may have would now find a place for one more.

In: what one worker wants. Out: between steps, whether to start again. Ray Train's own look would start the workers anew
from the newest checkpoint; one that workers take themselves costs no step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping


class Room:
    """Looks every `look_s` seconds, first after so many, for a node that is free for one more worker."""

    def __init__(
        self, free_nodes: Callable[[], Iterable[Mapping[str, float]]], worker: Mapping[str, float], look_s: float
    ) -> None:
        """`free_nodes`: what each node has that nobody uses; as `worker`, what one wants, by Ray's names."""
        self._free_nodes, self._worker, self._look_s = free_nodes, worker, look_s
        self._looked_s = time.monotonic()

    def came(self) -> bool:
        """Whether there is one; False until the next look is due."""
        if time.monotonic() - self._looked_s < self._look_s:
            return False
        self._looked_s = time.monotonic()
        return any(
            all(free.get(kind, 0) >= wanted for kind, wanted in self._worker.items()) for free in self._free_nodes()
        )
