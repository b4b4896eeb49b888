"""Preprocessing under kills: a cluster of several nodes on this machine, whose workers, nodes and drivers are killed.

In: a number of kills and a seed. Out: `summary.md`, `kills.jsonl` and the drivers' logs below `--output`; the exit
status is 0 when every disturbed run ended in the same bytes as the undisturbed one. Kills come at seeded random
moments. The victim is stopped first, so what it was doing is known; one that did nothing goes on, and is not counted.
Attempts differ in the number of nodes and of workers. Only processes that this program started are ever signalled.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import xxhash

from tests.chaos import events
from tests.chaos.corpus import write_corpus

ROOT = Path(__file__).resolve().parents[2]
UNIT_BYTES = 240_000  # tens of milliseconds of work
KINDS = ("worker", "worker", "node", "driver")  # every four kills
# Ray notices a dead node after 15 s; here after 5 s, which a busy machine of two cores still answers in.
HEALTH_CHECK = {"health_check_period_ms": 1_000, "health_check_failure_threshold": 5}
STALLED_S = 600  # without an event: assumed; a driver's start took 100 s on two cores at a load of 50
STARTS = 10  # of one node, assumed
MOMENT_S = 0.3  # a kill comes up to so much later than its place in the run; a few tasks' length
KILLS_PER_RUN = (3, 7)  # then the run is left alone, so that it ends and can be compared


class ChaosError(Exception):
    """A run that failed, hung, or ended in other bytes than the undisturbed one."""


@dataclass
class Kill:
    """One kill that hit something."""

    number: int
    run: int
    kind: str
    victim: str
    interrupted: list[str]
    at_s: float
    nodes: int
    workers: int | None
    recovery_s: float | None = None


@dataclass
class Nodes:
    """A Ray cluster whose head has no CPUs, so tasks run on nodes that may be killed."""

    cluster: Any
    workers: list[Any] = field(default_factory=list)

    def add(self, cpus: int) -> None:
        self.workers.append(started_node(self.cluster, num_cpus=cpus, object_store_memory=100 << 20))

    def remove(self, node: Any) -> None:
        """Take `node` away with everything it runs, without a warning to anybody."""
        for process in [*self.processes(node), psutil.Process(self.raylet(node))]:
            send(process.pid, signal.SIGKILL)
        self.workers.remove(node)
        self.cluster.remove_node(node, allow_graceful=False)

    @staticmethod
    def raylet(node: Any) -> int:
        return int(node.all_processes["raylet"][0].process.pid)

    def processes(self, node: Any) -> list[psutil.Process]:
        """The worker processes of `node`."""
        with suppress(psutil.NoSuchProcess):
            return [
                child
                for child in psutil.Process(self.raylet(node)).children(recursive=True)
                if command(child).startswith("ray::")
            ]
        return []


def command(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def send(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def started_node(cluster: Any, **options: Any) -> Any:
    """A node more. Ray gives up on one that takes 30 s to start, which a busy machine needs; so this tries again.

    Raises:
        ChaosError: when it never started.
    """
    for _ in range(STARTS):
        before = psutil.Process().children()
        try:
            return cluster.add_node(**options)
        except Exception as error:  # noqa: BLE001 - Ray raises nothing narrower
            problem = error
            for process in psutil.Process().children():
                if process not in before:
                    process.kill()  # what there is of the node
    raise ChaosError(f"no node started: {problem}") from problem


@contextmanager
def started_cluster(folder: Path) -> Iterator[Nodes]:
    """A head without CPUs and two nodes, with a token of their own, below the short path `folder`."""
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    os.environ |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_TMPDIR": str(folder),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "RAY_memory_monitor_refresh_ms": "0",  # kills here are ours alone, whatever else fills the machine's memory
    }
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    try:
        started_node(
            cluster, num_cpus=0, object_store_memory=200 << 20, include_dashboard=False, _system_config=HEALTH_CHECK
        )
        nodes = Nodes(cluster)
        for _ in range(2):
            nodes.add(cpus=1)
        yield nodes
    finally:
        cluster.shutdown()


@dataclass
class Attempts:
    """The drivers of one run, one after the other, all into the same output."""

    nodes: Nodes
    corpus: Path
    output: Path
    process: subprocess.Popen[bytes] | None = None
    workers: int | None = None

    @property
    def log(self) -> Path:
        """What the drivers say."""
        return self.output.with_suffix(".log")

    @property
    def events(self) -> Path:
        """What workers and drivers do."""
        return self.output.with_suffix(".events")

    def start(self, workers: int | None) -> None:
        self.workers = workers
        environment = os.environ | {events.FILE_VARIABLE: str(self.events)}
        arguments = [
            "--address",
            self.nodes.cluster.address,
            "--corpus",
            str(self.corpus),
            "--output",
            str(self.output),
        ]
        arguments += ["--unit-bytes", str(UNIT_BYTES), *(["--workers", str(workers)] if workers else [])]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.chaos.driver", *arguments],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=log,
            )

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def ended(self) -> bool:
        """Whether the driver is through.

        Raises:
            ChaosError: when it failed, with the end of its log.
        """
        assert self.process is not None
        status = self.process.poll()
        if status is None:
            return False
        if status != 0:
            raise ChaosError(f"driver ended with {status}:\n{self.log.read_text()[-6_000:]}")
        return True

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


class Run:
    """One output folder, from nothing to a finished dataset, through as many kills as it is given."""

    def __init__(self, number: int, attempts: Attempts, kinds: Iterator[str], random: random.Random) -> None:
        self.number, self.attempts, self.kinds, self.random = number, attempts, kinds, random
        self.nodes = attempts.nodes
        self.kills: list[Kill] = []
        self.misses = 0
        self._quiet_since_s = time.time()
        self._seen = 0

    def to_the_end(self, places: list[int]) -> None:
        """Start a driver, kill once so many tasks as each of `places` says are done, and wait until it is through."""
        places = sorted(places)
        kind = next(self.kinds)
        while True:  # one attempt after the other
            self.attempts.start(self.random.choice([None, 1, 2, 3]))
            started_s, moment_s = time.time(), None
            while not self.attempts.ended():
                time.sleep(0.02)
                log = self._events()
                if not places or not log or log[-1].at_s < started_s or self.tasks_done() < places[0]:
                    continue
                moment_s = moment_s or time.time() + self.random.uniform(0, MOMENT_S)
                if time.time() < moment_s:
                    continue
                moment_s = None
                if not getattr(self, f"_kill_{kind}")():
                    self.misses += 1
                    continue
                places.pop(0)
                killed, kind = kind, next(self.kinds)
                if killed == "driver":
                    self._change_nodes()
                    break
            else:
                break
        (self.attempts.output / "done").unlink()  # the driver's own sign that it came to the end
        self._measure_recovery()

    def _events(self) -> list[events.Event]:
        """This run's events so far.

        Raises:
            ChaosError: when nothing was added for `STALLED_S`.
        """
        log = events.read(self.attempts.events)
        if len(log) != self._seen:
            self._seen, self._quiet_since_s = len(log), time.time()
        if time.time() - self._quiet_since_s > STALLED_S:
            raise ChaosError(f"nothing happened for {STALLED_S} s:\n{self.attempts.log.read_text()[-6_000:]}")
        return log

    def tasks_done(self) -> int:
        """Different tasks done so far, checks of finished work apart."""
        log = events.read(self.attempts.events)
        return len({event.task for event in log if not event.begins and not event.task.endswith(events.CHECK)})

    def _busy(self, processes: list[int]) -> dict[int, list[str]]:
        """Stop `processes`, and say what they are in the middle of."""
        for pid in processes:
            send(pid, signal.SIGSTOP)
        time.sleep(0.01)  # a signal is delivered when the process is next scheduled
        return {
            pid: tasks for pid, tasks in events.running(events.read(self.attempts.events)).items() if pid in processes
        }

    def _kill_worker(self) -> bool:
        candidates = [process.pid for node in self.nodes.workers for process in self.nodes.processes(node)]
        running = events.running(events.read(self.attempts.events))
        candidates = [pid for pid in candidates if pid in running]
        if not candidates:
            return False
        pid = self.random.choice(sorted(candidates))
        busy = self._busy([pid])
        if not busy:
            send(pid, signal.SIGCONT)
            return False
        self._count("worker", f"pid {pid}", busy)
        send(pid, signal.SIGKILL)
        return True

    def _kill_node(self) -> bool:
        node = self.random.choice(self.nodes.workers)
        pids = [process.pid for process in self.nodes.processes(node)]
        busy = self._busy(pids)
        if not busy:
            for pid in pids:
                send(pid, signal.SIGCONT)
            return False
        self._count("node", f"raylet {self.nodes.raylet(node)}", busy)
        self.nodes.remove(node)
        self.nodes.add(cpus=self.random.choice([1, 2]))
        return True

    def _kill_driver(self) -> bool:
        send(self.attempts.pid, signal.SIGSTOP)
        time.sleep(0.01)
        workers = [process.pid for node in self.nodes.workers for process in self.nodes.processes(node)]
        running = events.running(events.read(self.attempts.events))
        busy = {pid: tasks for pid, tasks in running.items() if pid in [self.attempts.pid, *workers]}
        if not busy:
            send(self.attempts.pid, signal.SIGCONT)
            return False
        self._count("driver", f"pid {self.attempts.pid}", busy)
        self.attempts.kill()
        return True

    def _count(self, kind: str, victim: str, busy: dict[int, list[str]]) -> None:
        tasks = sorted(tasks[-1] for tasks in busy.values())
        nodes, workers = len(self.nodes.workers), self.attempts.workers
        self.kills.append(Kill(0, self.number, kind, victim, tasks, time.time(), nodes, workers))

    def _change_nodes(self) -> None:
        """Another number of nodes for the next attempt: one to three."""
        wanted = self.random.choice([number for number in (1, 2, 3) if number != len(self.nodes.workers)])
        while len(self.nodes.workers) > wanted:
            self.nodes.remove(self.random.choice(self.nodes.workers))
        while len(self.nodes.workers) < wanted:
            self.nodes.add(cpus=self.random.choice([1, 2]))

    def _measure_recovery(self) -> None:
        """Until what was interrupted had been done by somebody else; an orphan may have done it alone."""
        log = self._events()
        for kill in self.kills:
            ends = []
            for task in kill.interrupted:
                begun = {event.pid for event in log if event.begins and event.task == task and event.at_s > kill.at_s}
                ends += [
                    event.at_s
                    for event in log
                    if not event.begins and event.task == task and event.at_s > kill.at_s and event.pid in begun
                ][:1]
            later = ends or [event.at_s for event in log if event.begins and event.at_s > kill.at_s][:1]
            kill.recovery_s = max(later) - kill.at_s if later else None


def tree(folder: Path) -> dict[str, str]:
    """xxh3-128 of every file below `folder` by its path; the card's pictures are left out."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and "card" not in path.parts)
    return {str(path.relative_to(folder)): xxhash.xxh3_128_hexdigest(path.read_bytes()) for path in files}


def compare(number: int, expected: dict[str, str], found: dict[str, str]) -> None:
    """Raise `ChaosError` unless both trees hold the same files with the same bytes."""
    if found != expected:
        names = expected.keys() | found.keys()
        wrong = sorted(name for name in names if expected.get(name) != found.get(name))
        raise ChaosError(f"run {number}: {len(wrong)} files lost, made up or changed: {', '.join(wrong[:10])}")


@contextmanager
def short_folder() -> Iterator[Path]:
    """A temporary folder with a short name: Ray puts sockets below it."""
    with tempfile.TemporaryDirectory(prefix="ch", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def shuffled_kinds(generator: random.Random) -> Iterator[str]:
    """Kinds without end, each of `KINDS` once in every so many."""
    while True:
        yield from generator.sample(KINDS, len(KINDS))


def chaos(kills: int, seed: int, output: Path, files: int, say: Callable[[str], None]) -> list[Kill]:
    """`kills` counted kills over as many runs as they take; every run must end like the undisturbed one.

    Raises:
        ChaosError: for the first run that does not.
    """
    output.mkdir(parents=True, exist_ok=True)
    corpus = output / "corpus"
    shutil.rmtree(corpus, ignore_errors=True)
    write_corpus(corpus, files, seed)
    generator = random.Random(seed)
    kinds = shuffled_kinds(generator)
    done: list[Kill] = []
    with short_folder() as short, started_cluster(short) as nodes:
        expected: dict[str, str] = {}
        number = tasks = 0
        while len(done) < kills or not expected:
            folder = output / f"run-{number:03d}"
            shutil.rmtree(folder, ignore_errors=True)
            attempts = Attempts(nodes, corpus, folder)
            for path in (attempts.events, attempts.log):
                path.unlink(missing_ok=True)
            run = Run(number, attempts, kinds, generator)
            wanted = min(kills - len(done), generator.randint(*KILLS_PER_RUN)) if expected else 0
            started_s = time.time()
            try:
                run.to_the_end(generator.sample(range(tasks), wanted))
            finally:
                attempts.kill()
            if not expected:
                expected, tasks = tree(folder), run.tasks_done()
                manifest = json.loads((folder / "dataset" / "manifest.json").read_text())
                assert manifest["rows_read"] == len(list(corpus.rglob("*.py"))), "the undisturbed run lost files"
            compare(number, expected, tree(folder))
            for kill in run.kills:
                done.append(kill)
                kill.number = len(done)
            say(
                f"run {number}: {len(run.kills)} kills, {run.misses} that hit nothing, "
                f"{time.time() - started_s:.0f} s, {len(expected)} files equal"
            )
            with (output / "kills.jsonl").open("a" if number else "w") as stream:
                stream.writelines(json.dumps(asdict(kill)) + "\n" for kill in run.kills)
            if number:
                shutil.rmtree(folder)
            number += 1
    (output / "summary.md").write_text(summary(done, number - 1, len(expected), seed))
    return done


def summary(kills: list[Kill], runs: int, files: int, seed: int) -> str:
    """A table of the kills, and their counts by kind."""
    lines = [
        f"{len(kills)} kills in {runs} runs, seed {seed}; each ended in the {files} files of the undisturbed run.",
        "",
        "| kill | run | kind | victim | nodes | workers | interrupted | recovery_s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kill in kills:
        tasks = ", ".join(kill.interrupted)
        recovery = "" if kill.recovery_s is None else f"{kill.recovery_s:.1f}"
        lines.append(
            f"| {kill.number} | {kill.run} | {kill.kind} | {kill.victim} | {kill.nodes} | {kill.workers or 'all'} "
            f"| {tasks} | {recovery} |"
        )
    lines.append("")
    for kind in dict.fromkeys(KINDS):
        times = sorted(kill.recovery_s for kill in kills if kill.kind == kind and kill.recovery_s is not None)
        count = sum(kill.kind == kind for kill in kills)
        median = f"{times[len(times) // 2]:.1f} s, longest {times[-1]:.1f} s" if times else "none"
        lines.append(f"{kind}: {count} kills, median recovery {median}")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=100, help="counted kills, at least 1 (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the corpus, the moments and the victims (%(default)s)")
    parser.add_argument("--files", type=int, default=600, help="in the corpus (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("chaos"), help="log, summary and outputs (%(default)s)")
    given = parser.parse_args()
    try:
        chaos(given.kills, given.seed, given.output.absolute(), given.files, lambda line: print(line, flush=True))
    except ChaosError as error:
        sys.exit(f"chaos: {error}")
    print((given.output / "summary.md").read_text())


if __name__ == "__main__":
    main()
