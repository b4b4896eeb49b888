"""Which of several models in one engine could not be loaded, why, and when each is tried again.

In: errors, as they come. Out: refusals that give the reason in OpenAI's terms and cost nothing. Nothing is loaded here.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from cert_ray.errors import CertRayError, RequestError

# Assumed: a failed load takes up to minutes, during which others wait.
_AGAIN_S = 60.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Failure:
    reason: str
    until_s: float  # of the clock


class UnfitModels:
    """Not thread-safe: for a server's event loop."""

    def __init__(self, again_s: float = _AGAIN_S, clock: Callable[[], float] = time.monotonic) -> None:
        """A model that failed is refused for `again_s`; the next request for it after that may try again."""
        self._again_s, self._clock = again_s, clock
        self._failures: dict[str, _Failure] = {}

    def __len__(self) -> int:
        return len(self._failures)

    def refuse(self, name: str) -> None:
        """Raise `RequestError` (500) with the reason while the model `name` is not to be tried."""
        failure = self._failures.get(name)
        if failure is not None and self._clock() < failure.until_s:
            raise _refusal(name, failure.reason)

    def __contains__(self, name: str) -> bool:
        """Whether the model `name` failed, and has not been mended since."""
        return name in self._failures

    def postpone(self, name: str) -> None:
        """Refuse the failed model `name` for another while: one request tries it now, and the others need not."""
        self._failures[name] = replace(self._failures[name], until_s=self._clock() + self._again_s)

    def add(self, name: str, error: Exception) -> RequestError:
        """Log why the model `name` could not be loaded; returns the refusal for the request that asked for it."""
        is_told = isinstance(error, CertRayError)  # it says what to change; other errors go to the log in full
        _log.error("%s cannot be loaded: %s", name, error, exc_info=None if is_told else error)
        reason = str(error) if is_told else "its engine's log says why."
        self._failures[name] = _Failure(reason, self._clock() + self._again_s)
        return _refusal(name, reason)

    def remove(self, name: str) -> None:
        """Forget the failure of the model `name`: it was mended."""
        self._failures.pop(name, None)


def _refusal(name: str, reason: str) -> RequestError:
    return RequestError(500, f"{name} cannot be loaded: {reason}", "model", "model_not_loaded")
