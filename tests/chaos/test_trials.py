"""When a driver of a trial is taken to hang: by what it says and does, not by how long it takes."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.chaos import trials
from tests.chaos.run import ChaosError
from tests.chaos.trials import PATIENCE_S, Trial


class Driver:
    """Takes hours, by the clock that it moves on with every look; `goes_on` is what it does meanwhile."""

    def __init__(self, hours: int, goes_on: Callable[[], object]) -> None:
        self.now_s, self._ends_s, self._goes_on = 0.0, hours * 3600.0, goes_on

    def wait(self, timeout: float | None = None) -> int:
        if timeout is None or self.now_s >= self._ends_s:
            return 0
        self._goes_on()
        self.now_s += PATIENCE_S / 3
        raise subprocess.TimeoutExpired("driver", timeout)

    def poll(self) -> int | None:
        return None

    def kill(self) -> None:
        self.killed = True


def watched(monkeypatch: pytest.MonkeyPatch, folder: Path, goes_on: Callable[[], object]) -> tuple[Trial, Driver]:
    driver = Driver(3, goes_on)
    monkeypatch.setattr(trials.time, "monotonic", lambda: driver.now_s)
    trial = Trial([], folder, attempts=1)
    trial.process = driver  # type: ignore[assignment]
    (folder / "driver-1.log").write_text("begun\n")
    return trial, driver


@pytest.mark.parametrize("file", ["events", "driver-1.log"])
def test_a_driver_that_goes_on_is_waited_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, file: str) -> None:
    def goes_on() -> None:
        with (tmp_path / file).open("a") as stream:
            stream.write("more\n")

    trial, _ = watched(monkeypatch, tmp_path, goes_on)
    assert trial.wait()


def test_a_driver_that_neither_says_nor_does_anything_hangs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trial, driver = watched(monkeypatch, tmp_path, lambda: None)
    with pytest.raises(ChaosError, match="begun"):
        trial.wait()
    assert driver.killed
    assert PATIENCE_S < driver.now_s < 2 * PATIENCE_S
