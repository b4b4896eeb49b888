"""Ctrl-C and SIGTERM while workers train: the first one asks them to end with a checkpoint, the next one means what it
meant before.

In: signals of the driver. Out: the question to the workers, and the exception that tells of the stop.
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
    """To be entered by the driver of a run, which is not to be stopped so from another thread than the main one."""

    def __init__(self) -> None:
        self._came: int | None = None
        self._next: dict[int, Any] = {}  # by signal, what a second one does
        self._before: dict[int, Any] = {}

    @abstractmethod
    def ask(self) -> None:
        """Let the workers know, without waiting for them; called once, at the first signal."""

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                self._before[number] = signal.getsignal(number)
                self.take_over(number)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._before.items():
            if handler is not None:  # a host's own, not set from Python, which Python cannot set again
                signal.signal(number, handler)
        if kind is SystemExit and self.came:  # as Ray and Ray Train take a second signal, with statuses of their own
            raise self.told()

    def take_over(self, number: int) -> None:
        """Come before what the signal does now. Only what is set from Python, and does not ignore it, can be asked."""
        handler = signal.getsignal(number)
        if handler not in (None, signal.SIG_IGN, self._handle):
            self._next[number] = handler
            signal.signal(number, self._handle)

    @property
    def came(self) -> bool:
        """Whether the run was to stop."""
        return self._came is not None

    def told(self) -> BaseException:
        """What the run is to end with: what an interrupted program ends with."""
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
