"""What happened to a run, in order: the lines that its jobs kept in RUN/logs (`telemetry.logs`).

In: a run's folder. Out: its `Line`s by time, and its `Attempt`s, one per job; also where the last job ran and how it
stands, without reading the jobs before it. Nothing is changed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from cert_ray import storage
from cert_ray.telemetry import logs

_ENDINGS: Final = ("finished", "failed", "stopped")  # events of a job's last line


@dataclass(frozen=True, slots=True)
class Line:
    """One log line, and the folder in RUN/logs that holds it."""

    time: str
    level: str
    verb: str
    stage: str
    shard: str
    message: str
    log: str
    fields: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Attempt:
    """One job: `outcome` is finished, failed, stopped (by a signal), or open (killed, or still at work)."""

    verb: str
    began: str
    host: str
    outcome: str
    seconds: float | None
    message: str
    log: str
    versions: dict[str, str]


def read_story(run: str) -> list[Line]:
    """Every line of every job of `run`, by time; empty if nothing was kept."""
    return _read(_files(run))


def _files(run: str) -> list[str]:
    folder = storage.join(run, logs.FOLDER)
    if not storage.exists(folder):
        return []
    return [entry.url for entry in storage.list_files(folder) if entry.url.endswith(".jsonl")]


def _read(files: Sequence[str]) -> list[Line]:
    return sorted((line for url in files for line in _lines(url)), key=lambda line: line.time)


def _log_of(url: str) -> str:
    return storage.name_of(url.rsplit("/", 1)[0])


def _lines(url: str) -> Iterator[Line]:
    for text in storage.read_text(url).splitlines():
        try:
            fields = json.loads(text)
        except ValueError:
            continue  # cut short
        if not isinstance(fields, dict):
            continue  # written by something else
        about = {name: str(fields.get(name, "")) for name in ("time", "level", "verb", "stage", "shard", "message")}
        yield Line(**about, log=_log_of(url), fields=fields)


def attempts(lines: Sequence[Line]) -> list[Attempt]:
    """The jobs that wrote `lines`, in the order in which they began."""
    of_log: dict[str, list[Line]] = {}
    for line in lines:
        of_log.setdefault(line.log, []).append(line)
    return [_attempt(told) for told in of_log.values()]


def _attempt(lines: list[Line]) -> Attempt:
    first, last = lines[0], lines[-1]
    ended = next((line for line in reversed(lines) if line.fields.get("event") in _ENDINGS), None)
    return Attempt(
        verb=first.verb,
        began=first.time,
        host=str(first.fields.get("host", "")),
        outcome="open" if ended is None else ended.fields["event"],
        seconds=None if ended is None else ended.fields["seconds"],
        message=last.message,
        log=first.log,
        versions=first.fields.get("versions", {}),
    )


def last_job(run: str) -> str | None:
    """A line about the job that began last: where, when, which versions, and how it ended or what it said last.

    None if nothing was kept. Workers of a job keep logs of their own, but what they said counts as the job's.
    """
    files = _files(run)
    jobs = [log for log in map(_log_of, files) if re.fullmatch(r"[^-]+-[^-]+-\d+", log)]  # workers' names are longer
    if not jobs:
        return None
    newest = max(jobs)
    lines = _read([url for url in files if _log_of(url) >= newest])
    told = [attempt for attempt in attempts(lines) if attempt.log == newest]
    if not told:
        return None  # its only line was cut short
    (job,) = told
    versions = "".join(f", {name} {version}" for name, version in job.versions.items())
    began = f"{job.verb} on {job.host}{versions}, began {job.began[:10]} {job.began[11:19]} UTC"
    if job.seconds is None:
        return f"{began}, still running or killed, last line at {lines[-1].time[11:19]}: {lines[-1].message}"
    ending = "" if job.outcome == "finished" else f": {job.message.removeprefix(f'{job.verb} {job.outcome}: ')}"
    return f"{began}, {job.outcome} after {job.seconds:,.1f} s{ending}"


def render_line(line: Line) -> str:
    """`line` for a terminal: the time to a tenth of a second, what it is about, and what it says."""
    about = " ".join(part for part in (line.verb, line.stage, line.shard) if part)
    return f"{line.time[:10]} {line.time[11:21]} {line.level[:1]} [{about}] {line.message}"
