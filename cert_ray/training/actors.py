"""The small actors of a run: plain classes, made into actors by `on_ray`.

They stand apart because an actor's process imports the module of its class: this one imports neither Ray Train nor
torch, which take seconds.
"""

from __future__ import annotations

from cert_ray.errors import CertRayError


class Verdict:
    """Remembers what ended one worker for good: all that Ray Train starts then ask before they work."""

    def __init__(self) -> None:
        """Nothing has ended any of them."""
        self._error: CertRayError | None = None

    def pass_on(self, error: CertRayError) -> None:
        """Remember `error`, unless another came first."""
        self._error = self._error or error

    def passed(self) -> CertRayError | None:
        """What was passed on, if anything."""
        return self._error


class Stopped:
    """Says by being there that the run is to stop."""
