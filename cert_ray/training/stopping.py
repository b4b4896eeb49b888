"""Ctrl-C and SIGTERM while workers train: the first asks them to end with a checkpoint, the second acts as usual.

In: signals to the driver. Out: the request to the workers, and the exception that the run ends with.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from abc import ABC, abstractmethod
from types import FrameType
from typing import Any, Self

_log = logging.getLogger(__name__)

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop(ABC):
    """A context for the driver of a run. It has no effect outside the main thread, where signals cannot be handled."""

    def __init__(self) -> None:
        self._came: int | None = None
        self._next: dict[int, Any] = {}  # by signal, the handler for the second one
        self._before: dict[int, Any] = {}

    @abstractmethod
    def ask(self) -> None:
        """Tell the workers, without waiting for them; called once, at the first signal."""

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                self._before[number] = signal.getsignal(number)
                self.take_over(number)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._before.items():
            if handler is not None:  # None: not set from Python, which cannot restore it
                signal.signal(number, handler)
        if kind is SystemExit and self.came:  # Ray and Ray Train react so to a second signal, with their own statuses
            raise self.told()

    def take_over(self, number: int) -> None:
        """Handle the signal before its current handler, if that was set from Python and does not ignore it."""
        handler = signal.getsignal(number)
        if handler not in (None, signal.SIG_IGN, self._handle):
            self._next[number] = handler
            signal.signal(number, self._handle)

    @property
    def came(self) -> bool:
        """Whether the run was asked to stop."""
        return self._came is not None

    def told(self) -> BaseException:
        """The exception to end the run with, as for any interrupted program."""
        return KeyboardInterrupt() if self._came == signal.SIGINT else SystemExit(128 + (self._came or 0))

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._came is None:
            self._came = number
            _log.warning("stopping with a checkpoint, after the step at hand; the same again stops at once")
            self.ask()
            return
        handler = self._next[number]
        if callable(handler):
            handler(number, frame)
        else:  # the system's own
            signal.signal(number, handler)
            os.kill(os.getpid(), number)
