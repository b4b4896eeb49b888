"""Progress of long work: a live view at a terminal, a plain log line every few seconds elsewhere.

In: the number of steps, and each step as it is done, with its rows and bytes and why it dropped rows. Out: one view on
stderr (rich), or lines through `logging`: rows/s, MB/s, share kept, drops by reason, time left. Rates and the time left
count only steps done now: taking over what an earlier run finished takes no time and would flatter them. Nothing here
knows what a stage does.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

import rich.console
import rich.live
import rich.progress
import rich.text

logger = logging.getLogger(__name__)

_LINE_EVERY_S = 5.0  # assumed: often enough to see life, rare enough for a log
_REASONS_SHOWN = 6  # the others are added up


class Progress:
    """Counts steps of `total`, and what they did. Use it as a context manager."""

    def __init__(
        self,
        name: str,
        total: int,
        unit: str,
        console: rich.console.Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name, self._total, self._unit = name, total, unit
        self._console = console or rich.console.Console(stderr=True)
        self._clock = clock
        self._steps = self._reused = 0
        self._rows: Counter[str] = Counter()  # read, kept; now and bytes_now: of steps not reused
        self._dropped: Counter[str] = Counter()
        self._started_s = self._last_line_s = clock()
        self._live: rich.live.Live | None = None
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TextColumn(unit),
        )
        self._task = self._bar.add_task(name, total=total)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live = rich.live.Live(
                console=self._console, get_renderable=self._view, refresh_per_second=4, transient=True
            )
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
        if kind is None:
            self._line()

    def advance(
        self,
        rows: int = 0,
        kept: int = 0,
        size_bytes: int = 0,
        dropped: Mapping[str, int] | None = None,
        reused: bool = False,
    ) -> None:
        """Count one more step.

        Args:
            size_bytes: of the text that the step kept, or of what it moved if it has no rows; 0 if it has neither.
            reused: the step was done by an earlier run.
        """
        self._steps += 1
        self._reused += reused
        self._rows.update(read=rows, kept=kept)
        self._rows.update(now=0 if reused else rows, bytes_now=0 if reused else size_bytes)
        self._dropped.update(dropped or {})
        if self._live is None and self._clock() - self._last_line_s >= _LINE_EVERY_S:
            self._line()

    def figures(self) -> dict[str, str]:
        """The figures to show, in a fixed order."""
        elapsed_s = max(self._clock() - self._started_s, 1e-9)
        read, kept = self._rows["read"], self._rows["kept"]
        done_now, left = self._steps - self._reused, self._total - self._steps
        figures = {} if self._rows["bytes_now"] and not read else {"rows": f"{read:,}"}
        if self._rows["now"]:
            figures["rows/s"] = f"{self._rows['now'] / elapsed_s:,.0f}"
        if self._rows["bytes_now"]:
            figures["kept_MB/s" if read else "MB/s"] = f"{self._rows['bytes_now'] / elapsed_s / 1e6:.1f}"
        if read:
            figures["kept"] = f"{kept / read:.1%}"
        if self._reused:
            figures["reused"] = f"{self._reused:,}"
        figures["elapsed_s"] = f"{elapsed_s:.1f}"
        if done_now and left:
            figures["eta_s"] = f"{elapsed_s / done_now * left:.0f}"
        return figures

    def drops(self) -> dict[str, int]:
        """Rows dropped by reason, most first; the rarest ones are added up."""
        ordered = sorted(self._dropped.items(), key=lambda item: (-item[1], item[0]))
        shown = dict(ordered[:_REASONS_SHOWN])
        if more := sum(count for _, count in ordered[_REASONS_SHOWN:]):
            shown["others"] = more
        return shown

    def _view(self) -> rich.console.RenderableType:
        self._bar.update(self._task, completed=self._steps)
        figures = "  ".join(f"[bold]{value}[/] {name}" for name, value in self.figures().items())
        lines: list[rich.console.RenderableType] = [self._bar, rich.text.Text.from_markup(f"  {figures}")]
        if drops := self.drops():
            shown = "  ".join(f"{reason} {count:,}" for reason, count in drops.items())
            lines.append(rich.text.Text(f"  dropped: {shown}", style="dim"))
        return rich.console.Group(*lines)

    def _line(self) -> None:
        self._last_line_s = self._clock()
        figures = " ".join(f"{name}={value}" for name, value in self.figures().items())
        drops = ",".join(f"{reason}:{count}" for reason, count in self.drops().items())
        logger.info(
            "%s: %d/%d %s %s%s",
            self._name, self._steps, self._total, self._unit, figures, f" dropped={drops}" if drops else "",
        )  # fmt: skip
