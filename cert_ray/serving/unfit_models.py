"""Of several models in one engine, those that could not be loaded: why, and when each is tried again.

In: errors, as they come. Out: refusals with the reason, in OpenAI's terms, that cost nothing. Nothing is loaded here.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from cert_ray.errors import CertRayError, RequestError

# Assumed: reading weights in vain takes up to minutes, in which others wait.
_AGAIN_S = 60.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Failure:
    reason: str
    until_s: float  # of the clock


class UnfitModels:
    """Not for several threads: a server's event loop asks."""

    def __init__(self, again_s: float = _AGAIN_S, clock: Callable[[], float] = time.monotonic) -> None:
        """A model that failed is refused for `again_s`; who asks for it then may try."""
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
        """Refuse the model `name`, which failed, for another while: somebody tries it now, and others need not."""
        self._failures[name] = replace(self._failures[name], until_s=self._clock() + self._again_s)

    def add(self, name: str, error: Exception) -> RequestError:
        """Log that the model `name` could not be loaded, and why; the refusal that tells whoever asked."""
        is_told = isinstance(error, CertRayError)  # it says what to change; of others the log has all
        _log.error("%s cannot be loaded: %s", name, error, exc_info=None if is_told else error)
        reason = str(error) if is_told else "its engine's log says why."
        self._failures[name] = _Failure(reason, self._clock() + self._again_s)
        return _refusal(name, reason)

    def remove(self, name: str) -> None:
        """The model `name` was mended."""
        self._failures.pop(name, None)


def _refusal(name: str, reason: str) -> RequestError:
    return RequestError(500, f"{name} cannot be loaded: {reason}", "model", "model_not_loaded")
