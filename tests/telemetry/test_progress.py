"""One view at a terminal, lines elsewhere; rates by hand."""

from __future__ import annotations

import io
import logging
import re

import pytest
import rich.console

from cert_ray.telemetry.progress import Progress


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def plain() -> rich.console.Console:
    return rich.console.Console(file=io.StringIO(), force_terminal=False)


def test_figures_by_hand_leave_reused_steps_out_of_rates() -> None:
    clock = Clock()
    progress = Progress("documents", total=10, unit="shards", console=plain(), clock=clock)
    progress.advance(rows=1_000, kept=500, size_bytes=10**9, dropped={"empty": 500}, reused=True)
    clock.now_s += 4
    progress.advance(rows=300, kept=200, size_bytes=6_000_000, dropped={"empty": 60, "binary": 40})
    progress.advance(rows=100, kept=80, size_bytes=2_000_000, dropped={"binary": 20})
    assert progress.figures() == {
        "rows": "1,400",
        "rows/s": "100",
        "kept_MB/s": "2.0",
        "kept": "55.7%",
        "reused": "1",
        "elapsed_s": "4.0",
        "eta_s": "14",  # two shards took 4 s, seven are left
    }
    assert progress.drops() == {"empty": 560, "binary": 60}


def test_nothing_is_claimed_before_something_is_done() -> None:
    assert set(Progress("x", total=3, unit="shards", console=plain()).figures()) == {"rows", "elapsed_s"}


def test_rare_reasons_are_summed() -> None:
    progress = Progress("x", total=1, unit="shards", console=plain())
    progress.advance(rows=45, dropped={f"reason_{number}": number for number in range(1, 10)})
    assert list(progress.drops().items())[-2:] == [("reason_4", 4), ("others", 6)]
    assert sum(progress.drops().values()) == 45


def test_elsewhere_a_line_every_few_seconds_and_one_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    clock, console = Clock(), plain()
    with (
        caplog.at_level(logging.INFO, logger="cert_ray.telemetry.progress"),
        Progress("documents", total=20, unit="shards", console=console, clock=clock) as progress,
    ):
        for _ in range(20):
            clock.now_s += 1
            progress.advance(rows=10, kept=5, size_bytes=10**6, dropped={"empty": 5})
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 5
    assert lines[0] == (
        "documents: 5/20 shards rows=50 rows/s=10 kept_MB/s=1.0 kept=50.0% elapsed_s=5.0 eta_s=15 dropped=empty:25"
    )
    assert lines[-1].startswith("documents: 20/20 shards rows=200")
    assert "eta_s" not in lines[-1]
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue() == ""


def test_at_a_terminal_one_view_shows_everything_and_goes(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    console = rich.console.Console(file=io.StringIO(), force_terminal=True, width=120, color_system="standard")
    with (
        caplog.at_level(logging.INFO, logger="cert_ray.telemetry.progress"),
        Progress("documents", total=4, unit="shards", console=console, clock=clock) as progress,
    ):
        clock.now_s += 10
        progress.advance(rows=400, kept=100, size_bytes=5 * 10**6, dropped={"near_duplicate": 300})
        assert not caplog.records
        assert progress._live is not None
        progress._live.refresh()
    assert isinstance(console.file, io.StringIO)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())
    for part in ("documents", "1/4", "40 rows/s", "0.5 kept_MB/s", "25.0% kept", "30 eta_s", "near_duplicate 300"):
        assert part in shown
    assert "\x1b[2K" in console.file.getvalue()  # the view is wiped at the end
    assert len(caplog.records) == 1


def test_a_failure_is_not_reported_as_an_end(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        with Progress("x", total=2, unit="shards", console=plain()):
            raise OSError("disk")

    with caplog.at_level(logging.INFO, logger="cert_ray.telemetry.progress"), pytest.raises(OSError, match="disk"):
        fail()
    assert caplog.records == []
