"""Nodes that joined: whether a run with fewer workers than allowed could now place one more.

In: what one worker needs. Out: between steps, whether to start again. Ray Train's own check would restart the workers
from the newest checkpoint; here the workers first write one themselves, so no step is lost.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping


class Room:
    """Looks every `look_s` seconds, the first time after `look_s`, for a node with room for one more worker."""

    def __init__(
        self, free_nodes: Callable[[], Iterable[Mapping[str, float]]], worker: Mapping[str, float], look_s: float
    ) -> None:
        """`free_nodes` returns the unused resources of each node; `worker` is what one needs. Both use Ray's names."""
        self._free_nodes, self._worker, self._look_s = free_nodes, worker, look_s
        self._looked_s = time.monotonic()

    def came(self) -> bool:
        """Whether there is such a node; False until the next look is due."""
        if time.monotonic() - self._looked_s < self._look_s:
            return False
        self._looked_s = time.monotonic()
        return any(
            all(free.get(kind, 0) >= wanted for kind, wanted in self._worker.items()) for free in self._free_nodes()
        )
