"""One output and the drivers that work on it, one after the other: what a fault is put into, and what came of it.

In: a command that is a driver. Out: a `Trial`, which starts, watches and ends drivers by the log of `events`; for each
fault an `Outcome`, and a Markdown `table` of them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

from tests.chaos import events
from tests.chaos.run import ROOT, ChaosError

PATIENCE_S = 600.0  # assumed: a driver that neither does a task nor says anything for so long is taken to hang
_LOOKED_S = 1.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one fault did. `recovery_s` is from the fault, or from the next start, until work went on."""

    fault: str
    expected: str
    happened: str
    attempts: int
    seconds: float
    recovery_s: float | None


@dataclass
class Trial:
    """One output, and the drivers that work on it."""

    command: list[str]
    folder: Path  # of logs and events
    variables: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None
    attempts: int = 0

    @property
    def log(self) -> str:
        """What the newest driver said."""
        return (self.folder / f"driver-{self.attempts}.log").read_text()

    def start(self) -> None:
        """Start a driver."""
        self.attempts += 1
        self.folder.mkdir(parents=True, exist_ok=True)
        environment = os.environ | self.variables | {events.FILE_VARIABLE: str(self.folder / "events")}
        with (self.folder / f"driver-{self.attempts}.log").open("wb") as log:
            self.process = subprocess.Popen(self.command, cwd=ROOT, env=environment, stdout=log, stderr=log)

    def kill(self) -> None:
        """End the driver, if it has not ended."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def wait(self) -> bool:
        """Wait for the driver; whether it came to its end.

        Raises:
            ChaosError: when it hangs.
        """
        assert self.process is not None
        written, since_s = -1, time.monotonic()
        while True:
            try:
                return self.process.wait(_LOOKED_S) == 0
            except subprocess.TimeoutExpired as error:
                if (now := self._written_bytes()) != written:
                    written, since_s = now, time.monotonic()
                elif time.monotonic() - since_s > PATIENCE_S:
                    self.kill()
                    raise ChaosError(f"the driver hung: {self.log[-3_000:]}") from error

    def _written_bytes(self) -> int:
        """How much its drivers have said and done: it grows while they go on, however slow the machine."""
        return sum(
            path.stat().st_size for path in (self.folder / "events", *self.folder.glob("driver-*.log")) if path.exists()
        )

    def wait_for_task(self, stage: str, count: int = 1) -> None:
        """Until `count` tasks of `stage` have ended.

        Raises:
            ChaosError: when the driver ends before.
        """
        while sum(not event.begins and event.task.startswith(stage) for event in self.events()) < count:
            self.must_run(f"before {stage}")
            time.sleep(0.02)

    def must_run(self, when: str) -> None:
        """Raise `ChaosError` when the driver has ended."""
        if self.process is None or self.process.poll() is not None:
            raise ChaosError(f"the driver ended {when}: {self.log[-3_000:]}")

    def events(self) -> list[events.Event]:
        """What was done so far, checks of finished work apart."""
        return [one for one in events.read(self.folder / "events") if not one.task.endswith(events.CHECK)]

    def goes_on_after(self, moment_s: float) -> float | None:
        """Seconds from `moment_s` (of the machine's clock) until a task ended."""
        later = [event.at_s for event in self.events() if not event.begins and event.at_s > moment_s]
        return min(later) - moment_s if later else None

    def until_finished(self, most: int) -> list[str]:
        """Drivers one after the other until one comes to its end; the last line of each that did not.

        Raises:
            ChaosError: when `most` were not enough.
        """
        problems: list[str] = []
        while True:
            self.start()
            if self.wait():
                return problems
            problems.append(self.log.strip().splitlines()[-1])
            if self.attempts >= most:
                raise ChaosError(f"{most} drivers did not come to an end: {self.log[-3_000:]}")


def table(outcomes: list[Outcome]) -> str:
    """The faults as Markdown."""
    lines = [
        "| fault | expected | what happened | drivers | all, s | work went on after, s |",
        "|---|---|---|---|---|---|",
    ]
    for one in outcomes:
        recovery = "" if one.recovery_s is None else f"{one.recovery_s:.1f}"
        lines.append(
            f"| {one.fault} | {one.expected} | {one.happened} | {one.attempts} | {one.seconds:.0f} | {recovery} |"
        )
    return "\n".join(lines) + "\n"


def asked(description: str | None, names: Iterable[str]) -> tuple[Path, list[str]]:
    """By the command line: a new folder for what comes of it, and which of `names` to do."""
    known = list(names)
    parser = argparse.ArgumentParser(description=description.splitlines()[0] if description else None)
    parser.add_argument("--output", type=Path, required=True, help="a folder that is made anew")
    parser.add_argument("--only", action="append", choices=sorted(known), help="repeatable; default: all")
    given = parser.parse_args()
    output: Path = given.output.absolute()
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    return output, given.only or known


def carry_out(names: Iterable[str], one: Callable[[str], Outcome], report: Path) -> None:
    """Do `one` after the other, and end the program; one that is not as expected leaves the others' rows."""
    outcomes: list[Outcome] = []
    failed: list[str] = []
    for name in names:
        try:
            outcomes.append(one(name))
            print(json.dumps(asdict(outcomes[-1])), flush=True)
        except (ChaosError, psutil.Error) as error:
            failed.append(name)
            print(f"{name}: {error}", flush=True)
    report.write_text(table(outcomes))
    print(table(outcomes))
    sys.exit(f"not as expected: {', '.join(failed)}" if failed else 0)
