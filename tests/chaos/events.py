"""What every process of a chaos run is doing: a log of starts and ends, appended to by workers and drivers.

`install` wraps the functions that do a stage's work, in the process that calls it: Ray calls it in each worker (a
`worker_process_setup_hook`), the driver by itself. A line is written by one `write` to a file opened for appending, so
lines of many processes do not mix, and a process that is stopped or killed has written what it was doing.
"""

from __future__ import annotations

import functools
import importlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from tests.chaos import faulty_storage

FILE_VARIABLE = "CHAOS_EVENTS"  # Ray's hook takes no arguments
CHECK = " (check)"  # ends the name of a task that looks whether work was done before
HOOK = f"{__name__}.install"
EVALUATION_HOOK = f"{__name__}.install_evaluation"

Watched = Sequence[tuple[str, str, Callable[..., str]]]  # module, function, and what is said of a call's arguments

_PREPROCESSING: Watched = [
    ("cert_ray.shards.units", "perform", lambda unit, work, run: f"{run.stage} {unit.name}"),
    (
        "cert_ray.shards.units",
        "finished_report",
        lambda unit, folder, *rest: f"{Path(folder).name} {unit.name}{CHECK}",
    ),
    ("cert_ray.dedup.survivors", "band_edges", lambda folder, shards, band, *rest: f"dedup band {band}"),
    ("cert_ray.dedup.survivors", "exact_firsts", lambda *given: "dedup exact duplicates"),
    ("cert_ray.dedup.survivors", "cluster_documents", lambda *given: "dedup components"),
    ("cert_ray.dedup.survivors", "write_clusters", lambda *given: "dedup clusters"),
    ("cert_ray.dedup.on_ray", "measure_quality", lambda *given: "dedup quality"),
    ("cert_ray.dataset.on_ray", "write_card", lambda *given: "dataset card"),
    ("cert_ray.manifests", "write_manifest", lambda folder, manifest: f"{manifest.stage} manifest"),
]
_EVALUATION: Watched = [  # apart, since these modules take a second to load
    ("cert_ray.evaluation.run", "_draw", lambda batch, *rest: f"sampling {batch[0].task_id}"),
    ("cert_ray.evaluation.on_ray", "_run_chunk", lambda programs, *rest: f"programs {_named(programs)}"),
]


def _named(programs: Sequence[Any]) -> str:
    """The same in every process: programs are named by their texts."""
    return str(xxhash.xxh3_64_hexdigest("".join(getattr(one, "text", one) for one in programs).encode()))


@dataclass(frozen=True)
class Event:
    """A process began a task, or came to its end (by an error, too)."""

    at_s: float  # the machine's clock
    pid: int
    begins: bool
    task: str


def install(watched: Watched = _PREPROCESSING) -> None:
    """Log the watched functions' calls in this process, which also learns the URLs of faulty storage."""
    faulty_storage.register()
    file = os.open(os.environ[FILE_VARIABLE], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for module, name, describe in watched:
        owner = importlib.import_module(module)
        setattr(owner, name, _logged(getattr(owner, name), describe, file))


def install_evaluation() -> None:
    """The same for an evaluation's functions: Ray's hook takes no arguments."""
    install(_EVALUATION)


def _logged(function: Callable[..., Any], describe: Callable[..., str], file: int) -> Callable[..., Any]:
    def write(kind: str, task: str) -> None:
        os.write(file, f"{time.time():.3f} {os.getpid()} {kind} {task}\n".encode())

    @functools.wraps(function)
    def logged(*given: Any, **named: Any) -> Any:
        task = describe(*given)
        write("begin", task)
        try:
            return function(*given, **named)
        finally:
            write("end", task)

    return logged


def read(path: Path) -> list[Event]:
    """Every event so far, in the order written."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    fields = (line.strip().split(" ", 3) for line in lines if line.endswith("\n"))
    return [Event(float(at_s), int(pid), kind == "begin", task) for at_s, pid, kind, task in fields]


def running(events: list[Event]) -> dict[int, list[str]]:
    """What each process has begun and not ended, outermost first."""
    tasks: dict[int, list[str]] = {}
    for event in events:
        begun = tasks.setdefault(event.pid, [])
        if event.begins:
            begun.append(event.task)
        else:
            begun.remove(event.task)
    return {pid: begun for pid, begun in tasks.items() if begun}
