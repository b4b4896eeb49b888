"""Progress of long work: a live bar at a terminal, a plain log line every few seconds elsewhere.

In: how much there is, and each step as it is done. Out: lines on stderr through `logging` or rich. Nothing here knows
what a stage does.
"""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType
from typing import Self

import rich.progress

logger = logging.getLogger(__name__)

_LINE_EVERY_S = 5.0  # assumed: often enough to see life, rare enough for a log


class Progress:
    """Counts steps of `total` and sums named figures beside them. Use as a context manager."""

    def __init__(self, name: str, total: int, unit: str) -> None:
        self._name, self._total, self._unit = name, total, unit
        self._done = 0
        self._sums: dict[str, int] = {}
        self._started_s = self._last_line_s = time.monotonic()
        self._bar: rich.progress.Progress | None = None
        self._task: rich.progress.TaskID | None = None

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            import rich.console

            self._bar = rich.progress.Progress(
                *rich.progress.Progress.get_default_columns(),
                rich.progress.TextColumn("{task.fields[figures]}"),
                console=rich.console.Console(stderr=True),
                transient=True,
            )
            self._task = self._bar.add_task(self._name, total=self._total, figures="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        if kind is None:
            self._line()

    def advance(self, steps: int, **figures: int) -> None:
        """Count `steps` more, and add `figures` to their sums."""
        self._done += steps
        for name, value in figures.items():
            self._sums[name] = self._sums.get(name, 0) + value
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self._done, figures=self._figures())
        elif time.monotonic() - self._last_line_s >= _LINE_EVERY_S:
            self._line()

    def _figures(self) -> str:
        return " ".join(f"{name}={value:,}" for name, value in self._sums.items())

    def _line(self) -> None:
        self._last_line_s = time.monotonic()
        elapsed_s = self._last_line_s - self._started_s
        remaining = self._total - self._done
        eta = f" eta_s={elapsed_s / self._done * remaining:.0f}" if self._done and remaining else ""
        logger.info(
            "%s: %d/%d %s %s elapsed_s=%.1f%s",
            self._name, self._done, self._total, self._unit, self._figures(), elapsed_s, eta,
        )  # fmt: skip
