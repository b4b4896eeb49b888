"""Reasons to end the workers early, with a checkpoint: a node that leaves, one that joined, a user who stops the run.

In: what the cluster says, asked by all ranks together. Out: between steps, whether to end, and why. Clouds announce in
advance that they will take a spot machine away.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection
from typing import Literal

from cert_ray.training.together import Together

_log = logging.getLogger(__name__)

Reason = Literal["leaving", "growing", "stopped"]
# Returns the nodes of this run's ranks that will be taken away, the same on every rank; every rank calls it.
Leaving = Callable[[], Collection[str]]
Asked = Callable[[], Reason | None]  # any other reason; only rank 0 calls it
_LOOK_EVERY_S = 2.0  # clouds give notice of 25 s to two minutes; Ray checks every 5 s


class Notices:
    """Asks between steps, but not after each of many short ones: an answer takes all ranks a few milliseconds."""

    def __init__(self, leaving: Leaving | None, asked: Asked | None, together: Together) -> None:
        """None for `leaving` or `asked` means not to ask."""
        self._leaving, self._asked, self._together = leaving, asked, together
        self._looked_s = time.monotonic()
        self._steps_between, self._steps_since = 1, 0

    def came(self, step: int) -> Reason | None:
        """Why the workers should end, or None. All ranks ask after `step`, and get the same answer."""
        self._steps_since += 1
        if (self._leaving is None and self._asked is None) or self._steps_since < self._steps_between:
            return None
        nodes = self._leaving() if self._leaving is not None else ()
        reason, self._steps_between = self._together.decide(self._look)
        self._looked_s, self._steps_since = time.monotonic(), 0
        if nodes and reason != "stopped":
            reason = "leaving"
        if reason is not None and self._together.rank == 0:
            told = {
                "leaving": f"{', '.join(sorted(nodes))} will be taken away",
                "growing": "there is room for more workers",
                "stopped": "the run was asked to stop",
            }
            _log.warning("step %d: %s: a checkpoint is due", step, told[reason])
        return reason

    def _look(self) -> tuple[Reason | None, int]:
        """What rank 0 finds, and in how many steps to look again, estimated from how long the last steps took.

        After few steps that estimate is poor, so the number at most doubles each time.
        """
        step_s = (time.monotonic() - self._looked_s) / self._steps_since
        between = max(1, min(2 * self._steps_between, round(_LOOK_EVERY_S / max(step_s, 1e-6))))
        return self._asked() if self._asked is not None else None, between
