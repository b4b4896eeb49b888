"""What every benchmark shares: repeated runs, a process tree's time and memory, the machine, tables and results.

In: callables or commands. Out: `Spread`s (median, lowest, highest), `Usage` of a process and all its descendants,
Markdown and JSON. Memory is the proportional set size: pages shared by several processes count once in all.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

_VERSIONS = ("ray", "pyarrow", "numpy", "scipy", "xxhash")
_SAMPLE_S = 1.0  # between two looks at the process tree, of 1 ms a process; what comes and goes meanwhile is not seen


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of several runs, and the lowest and highest of them."""

    median: float
    low: float
    high: float
    runs: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of one figure per run."""
        return cls(statistics.median(values), min(values), max(values), len(values))

    def __str__(self) -> str:
        return f"{_short(self.median)} ({_short(self.low)} to {_short(self.high)})"


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


@dataclass(slots=True)
class Usage:
    """What a process tree used: wall and CPU seconds, peak bytes in all, of the root, and of the largest other one."""

    wall_s: float = 0.0
    cpu_s: float = 0.0
    peak_bytes: int = 0
    root_peak_bytes: int = 0
    worker_peak_bytes: int = 0
    root_growth_bytes: int = 0  # its peak above what it held at the start
    worker_growth_bytes: int = 0  # the most that one of the others grew above its start, or first look
    read_bytes: int = 0  # by read calls, whether from disk or from the page cache
    output: str = field(default="", repr=False)


def process_tree(root: psutil.Process) -> list[psutil.Process]:
    """A process, then its running descendants; any of them may have ended by the time it is looked at.

    Raises:
        psutil.NoSuchProcess: `root` itself has ended.
    """
    return [root, *root.children(recursive=True)]


def cpu_by_kind(root: int) -> Counter[str]:
    """CPU seconds so far of a process and its running descendants, by what they are: driver, workers, Ray's own."""
    used: Counter[str] = Counter()
    for process in process_tree(psutil.Process(root)):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied), process.oneshot():
            times = process.cpu_times()
            kind = "driver" if process.pid == root else _kind(process.cmdline())
            used[kind] += times.user + times.system
    return used


def _kind(command: Sequence[str]) -> str:
    title = next((word for word in command if word.startswith("ray::")), "")
    if title.startswith("ray::_") or title.endswith("Agent"):
        return title.split("(")[0].strip()
    if title or any("multiprocessing" in word for word in command):
        return "workers"
    script = next((word for word in command[1:] if word.endswith(".py")), command[0] if command else "?")
    return Path(script).name


class TreeWatch:
    """Samples a process and its descendants in a thread; `usage()` is what was seen since the start or `restart`."""

    def __init__(self, root: int) -> None:
        self._root = psutil.Process(root)
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._cpu_s: dict[int, float] = {}
        self._read: dict[int, int] = {}
        self._sizes: dict[int, int] = {}
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.restart()

    def __enter__(self) -> TreeWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def restart(self) -> None:
        """Count from now on."""
        self._look()
        with self._lock:
            self._before = (sum(self._cpu_s.values()), sum(self._read.values()))
            self._usage = Usage()
            self._levels = dict(self._sizes)
            self._started = time.perf_counter()

    def usage(self) -> Usage:
        """What was used since the last `restart`."""
        self._look()
        with self._lock:
            cpu_s, read = sum(self._cpu_s.values()), sum(self._read.values())
            self._usage.wall_s = time.perf_counter() - self._started
            self._usage.cpu_s = cpu_s - self._before[0]
            self._usage.read_bytes = read - self._before[1]
            return self._usage

    def _watch(self) -> None:
        while not self._stop.wait(_SAMPLE_S):
            self._look()

    def _look(self) -> None:
        sizes: dict[int, int] = {}
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in process_tree(self._root):
                with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied), process.oneshot():
                    times = process.cpu_times()
                    self._cpu_s[process.pid] = times.user + times.system
                    self._read[process.pid] = process.io_counters().read_chars
                    sizes[process.pid] = process.memory_full_info().pss
        with self._lock:
            self._sizes = dict(sizes)
            usage = getattr(self, "_usage", None)
            if usage is None or not sizes:
                return
            growth = {pid: size - self._levels.setdefault(pid, size) for pid, size in sizes.items()}
            usage.root_growth_bytes = max(usage.root_growth_bytes, growth.pop(self._root.pid, 0))
            usage.worker_growth_bytes = max([usage.worker_growth_bytes, *growth.values()])
            root = sizes.pop(self._root.pid, 0)
            usage.peak_bytes = max(usage.peak_bytes, root + sum(sizes.values()))
            usage.root_peak_bytes = max(usage.root_peak_bytes, root)
            usage.worker_peak_bytes = max([usage.worker_peak_bytes, *sizes.values()])


def run_watched(command: Sequence[str], environment: dict[str, str] | None = None, cores: int | None = None) -> Usage:
    """Run a command on at most `cores` cores; what it and its descendants used, and what it printed.

    Raises:
        RuntimeError: with the end of its output, when it fails.
    """
    started = time.perf_counter()
    process = psutil.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Ray starts its workers at niceness 15: on a machine that does anything else, that would be what is measured.
        env={**os.environ, "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0", **(environment or {})},
    )
    if cores is not None:
        process.cpu_affinity(process.cpu_affinity()[:cores])
    with TreeWatch(process.pid) as watch:
        output, errors = process.communicate()
        wall_s = time.perf_counter() - started
        usage = watch.usage()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{errors[-3000:]}")
    usage.wall_s, usage.output = wall_s, output
    return usage


def timed(work: Callable[[], Any], least_s: float = 1.0) -> float:
    """CPU seconds of one call of `work`, by calling it until `least_s` have gone by."""
    calls, started = 0, time.process_time()
    while calls == 0 or time.process_time() - started < least_s:
        work()
        calls += 1
    return (time.process_time() - started) / calls


def repeated(runs: int, work: Callable[[], float]) -> Spread:
    """The spread of `runs` calls of `work`, each of which gives one figure."""
    return Spread.of([work() for _ in range(runs)])


def machine() -> dict[str, Any]:
    """Where and when: processor, cores, memory, load before the run, versions, date."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in _VERSIONS},
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def markdown(headers: Sequence[str], rows: Iterator[Sequence[object]] | Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(headers) + " |", "|" + "---|" * len(headers)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def peers_python(text: str) -> Path:
    """For argparse: the Python of the peers' environment, also by the environment's folder; looked for at once."""
    given = Path(text)
    python = given / "bin" / "python" if given.is_dir() else given
    if not os.access(python, os.X_OK):
        raise argparse.ArgumentTypeError(f"{python} is no Python that can be run; `make bench-env` makes one")
    return python


def publish(output: Path, name: str, command: str, tables: Sequence[str], figures: dict[str, Any]) -> None:
    """Print the tables with the machine below them, and write `output`/NAME.md and NAME.json."""
    where = machine()
    text = "\n\n".join(tables) + "\n\n" + "; ".join(f"{key} {value}" for key, value in where.items())
    print(f"{text}\n{command}")
    output.mkdir(parents=True, exist_ok=True)
    (output / f"{name}.md").write_text(f"{text}\n\n    {command}\n")
    record = {"command": command, "machine": where, "figures": figures}
    (output / f"{name}.json").write_text(json.dumps(record, indent=1, default=_as_json) + "\n")


def _as_json(value: object) -> Any:
    if isinstance(value, Usage):
        return {name: figure for name, figure in asdict(value).items() if name != "output"}
    return asdict(value) if isinstance(value, Spread) else str(value)
