"""Nodes that are going to be taken away, as a cloud announces of its spot machines: the time for one more checkpoint.

In: what the cluster says, asked by all ranks together. Out: between steps, whether there is news.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection

from cert_ray.training.together import Together

_log = logging.getLogger(__name__)

# The nodes of this run's ranks that are going to be taken away, the same on every rank; every rank calls it.
Leaving = Callable[[], Collection[str]]
_LOOK_EVERY_S = 2.0  # clouds announce 25 s to two minutes before; Ray looks every 5 s


class Notices:
    """Asks after steps, and not after each of many short ones: an answer takes all ranks a few milliseconds."""

    def __init__(self, leaving: Leaving | None, together: Together) -> None:
        self._leaving, self._together = leaving, together
        self._known: set[str] = set()
        self._looked_s = time.monotonic()
        self._steps_between, self._steps_since = 1, 0

    def came(self, step: int) -> bool:
        """Whether a further node was announced; all ranks ask after `step`, and get one answer."""
        self._steps_since += 1
        if self._leaving is None or self._steps_since < self._steps_between:
            return False
        new = set(self._leaving()) - self._known
        self._known |= new
        self._steps_between = self._together.decide(self._next_look)
        self._looked_s, self._steps_since = time.monotonic(), 0
        if new and self._together.rank == 0:
            _log.warning("step %d: %s will be taken away: a checkpoint is due", step, ", ".join(sorted(new)))
        return bool(new)

    def _next_look(self) -> int:
        """In how many steps, by how long the last ones took; of few steps that says little."""
        step_s = (time.monotonic() - self._looked_s) / self._steps_since
        return max(1, min(2 * self._steps_between, round(_LOOK_EVERY_S / max(step_s, 1e-6))))
