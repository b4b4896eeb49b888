"""Nodes that joined: whether a run of fewer workers than it may have would now find a place for one more.

In: what one worker wants. Out: between steps, whether to start again. Ray Train's own look would start the workers anew
from the newest checkpoint; one that workers take themselves costs no step.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import ray
from ray._private.state import state  # where alone Ray 2.60 tells of each node


class Room:
    """Looks every `look_s` seconds, first after so many, for a node that is free for one more worker."""

    def __init__(self, worker: Mapping[str, float], look_s: float) -> None:
        """`worker`: the resources of one, as Ray names them."""
        self._worker, self._look_s = worker, look_s
        self._looked_s = time.monotonic()

    def came(self) -> bool:
        """Whether there is one; False until the next look is due, and while the head is away."""
        if time.monotonic() - self._looked_s < self._look_s:
            return False
        self._looked_s = time.monotonic()
        try:
            leaving = state.get_draining_nodes()
            free = state.available_resources_per_node()
        except ray.exceptions.RayError:
            return False
        return any(
            node not in leaving and all(resources.get(kind, 0) >= wanted for kind, wanted in self._worker.items())
            for node, resources in free.items()
        )
