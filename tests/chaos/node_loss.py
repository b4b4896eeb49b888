"""A node goes away in the middle of each stage: cleaning, dedup, dataset, packing, training, sampling, scoring.

    python -m tests.chaos.node_loss --output DIR [--only STAGE]

On a head and two nodes of one CPU, one stage after the other runs as its job does. Once a process of a node is in the
middle of a task of the stage, the node is killed with all it runs, and another one joins. The same driver must come to
its end, in the same bytes as a run that is left alone. Out: `node-loss.md`, a row for each stage, where "work went on
after" is how long it took until what was interrupted had been done by somebody else; the exit status is 0 when every
expectation held. Everything that is started here ends here; nothing else is touched.
"""

from __future__ import annotations

import itertools
import json
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import psutil
import yaml

from tests.chaos import events
from tests.chaos.corpus import write_corpus
from tests.chaos.faults import preprocessing
from tests.chaos.run import ChaosError, Nodes, command, compare, send, short_folder, started_cluster, tree
from tests.chaos.trials import Outcome, Trial, asked, carry_out

FILES = 120  # 19 units
PROBLEMS, SAMPLES = 96, 4  # six batches of sampling, fifteen chunks of programs
_STEPS, _INTERVAL, _LOST_AFTER = 24, 5, 12  # of training


@dataclass(frozen=True)
class Place:
    """What every stage is given: the cluster, and a folder for all of them."""

    nodes: Nodes = field(compare=False)
    output: Path

    @property
    def run(self) -> Path:
        """The run that jobs go on with."""
        return self.output / "run"

    @property
    def corpus(self) -> Path:
        return self.output / "corpus"

    def entry(self, what: str, *arguments: str, evaluation: bool = False) -> list[str]:
        """The command of a job or verb on the cluster."""
        start = [sys.executable, "-m", "tests.chaos.entry", "--address", self.nodes.cluster.address]
        return [*start, *(["--evaluation"] if evaluation else []), what, *arguments]


@cache
def preprocessed(place: Place) -> dict[str, str]:
    """The files of preprocessing that was left alone; its dataset also stands below `run`."""
    write_corpus(place.corpus, FILES, seed=1)
    folder = place.output / "undisturbed"
    _left_alone(Trial(preprocessing(place.nodes, place.corpus, str(folder / "run")), folder))
    (folder / "run" / "done").unlink()  # the driver's own sign that it came to the end
    shutil.copytree(folder / "run" / "dataset", place.run / "dataset")
    return tree(folder / "run")


@cache
def written_recipe(place: Place) -> Path:
    """Of the jobs, with the benchmark and a random model that it names."""
    from tests.evaluation.builders import write_problems
    from tests.serving.builders import save_model

    place.run.mkdir(exist_ok=True)
    save_model(place.run / "models" / "base")
    recipe = {
        "run": str(place.run),
        "libraries": ["numpy"],
        "preprocess": {"sources": {"inputs": [str(place.corpus)]}},
        "tokenizer": {"vocab_size": 1000},
        "context_tokens": 64,
        "models": {"base": {"start": "tiny", "view": "base", "train": {"steps": 4, "warmup_steps": 1}}},
        "evaluation": {
            "problems": [write_problems(place.run / "problems.jsonl", PROBLEMS)],
            "model": "base",
            "n": SAMPLES,
            "max_tokens": 16,
            "requirements": [],
        },
    }
    path = place.output / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@dataclass(frozen=True, slots=True)
class Loss:
    """A node went away at `at_s` (of the machine's clock), in the middle of `interrupted`."""

    at_s: float
    interrupted: frozenset[str]
    pids: frozenset[int]


def lose_node(trial: Trial, nodes: Nodes, task: str) -> Loss:
    """Kill the first node that is in the middle of a `task` (by how its name begins), and let another one join.

    Raises:
        ChaosError: when the driver ends before there is one.
    """
    while True:
        trial.must_run(f"before a node was in the middle of {task}")
        running = events.running(trial.events())
        for node in nodes.workers:
            pids = {process.pid for process in nodes.processes(node)}
            if not any(tasks[-1].startswith(task) for pid, tasks in running.items() if pid in pids):
                continue
            for pid in pids:
                send(pid, signal.SIGSTOP)
            time.sleep(0.01)  # a signal is delivered when the process is next scheduled
            still = {tasks[-1] for pid, tasks in events.running(trial.events()).items() if pid in pids}
            if any(one.startswith(task) for one in still):
                everything = frozenset(one for pid in pids for one in _descendants(pid))
                lost = Loss(time.time(), frozenset(still), everything | pids)
                nodes.remove(node)
                nodes.add(cpus=1)
                return lost
            for pid in pids:
                send(pid, signal.SIGCONT)
        time.sleep(0.005)


def _descendants(pid: int) -> list[int]:
    with suppress(psutil.NoSuchProcess):
        return [one.pid for one in psutil.Process(pid).children(recursive=True)]
    return []


def recovery_s(trial: Trial, lost: Loss) -> float:
    """From the loss until the interrupted tasks had been done by others.

    Raises:
        ChaosError: when one never was.
    """
    later = [event for event in trial.events() if event.at_s > lost.at_s and event.pid not in lost.pids]
    done = {event.task: event.at_s for event in reversed(later) if not event.begins}
    if missing := lost.interrupted - done.keys():
        raise ChaosError(f"nobody did again: {', '.join(sorted(missing))}")
    return max((done[task] for task in lost.interrupted), default=lost.at_s) - lost.at_s


def _left_alone(trial: Trial) -> None:
    if problems := trial.until_finished(most=1):
        raise ChaosError(f"the undisturbed run failed: {problems[0]}")


def _disturbed(place: Place, folder: Path, driver: list[str], task: str) -> tuple[Trial, Loss]:
    """The driver's run, through the loss of a node in the middle of `task`.

    Raises:
        ChaosError: unless the driver came to its end, and nothing of the node was left.
    """
    trial = Trial(driver, folder)
    trial.start()
    try:
        lost = lose_node(trial, place.nodes, task)
        if not trial.wait():
            raise ChaosError(f"the run did not survive: {trial.log[-3_000:]}")
    finally:
        trial.kill()
    if left := [one for one in map(_process, lost.pids) if one is not None]:
        raise ChaosError(f"left of the node: {', '.join(map(command, left))}")
    return trial, lost


def _process(pid: int) -> psutil.Process | None:
    try:
        found = psutil.Process(pid)
        return None if found.status() == psutil.STATUS_ZOMBIE else found
    except psutil.NoSuchProcess:
        return None


def _preprocessing(place: Place, folder: Path, task: str) -> tuple[str, float]:
    expected, output = preprocessed(place), folder / "run"
    trial, lost = _disturbed(place, folder, preprocessing(place.nodes, place.corpus, str(output)), task)
    found = tree(output)
    found.pop("done")
    compare(0, expected, found)
    return f"lost in the middle of {_named(lost)}; all {len(found)} files equal", recovery_s(trial, lost)


def _named(lost: Loss) -> str:
    return ", ".join(sorted(lost.interrupted))


def cleaning(place: Place, folder: Path) -> tuple[str, float]:
    """another node makes the unit; same bytes"""
    return _preprocessing(place, folder, "documents ")


def dedup(place: Place, folder: Path) -> tuple[str, float]:
    """another node finds the bands' edges; same bytes"""
    return _preprocessing(place, folder, "dedup band")


def dataset(place: Place, folder: Path) -> tuple[str, float]:
    """another node makes the unit; same bytes"""
    return _preprocessing(place, folder, "dataset ")


def packing(place: Place, folder: Path) -> tuple[str, float]:
    """another node packs the unit; same bytes"""
    preprocessed(place)  # makes the dataset
    tokens = place.run / "tokens"
    _left_alone(Trial(place.entry("jobs/tokenizer.py", str(written_recipe(place))), folder / "tokenizer"))
    driver = place.entry("jobs/pack.py", str(written_recipe(place)))
    _left_alone(Trial(driver, folder / "undisturbed"))
    expected = tree(tokens)
    shutil.rmtree(tokens)
    trial, lost = _disturbed(place, folder, driver, "tokens ")
    compare(0, expected, tree(tokens))
    return f"lost in the middle of {_named(lost)}; all {len(expected)} files equal", recovery_s(trial, lost)


def training(place: Place, folder: Path) -> tuple[str, float]:
    """the workers start again from the last checkpoint once there is room; losses and model the same to the bit"""
    from tests.chaos.training import SIZES, Run, make_inputs, read_steps

    config = make_inputs(folder) | SIZES
    config |= {"steps": _STEPS, "warmup_steps": 2, "checkpoint_every_steps": _INTERVAL, "max_failures": 3}
    undisturbed = Run(place.nodes, folder / "undisturbed", config)
    undisturbed.finish()
    run = Run(place.nodes, folder / "disturbed", config, changes={_LOST_AFTER: ("lose", 2)})
    lost_s: list[float] = []

    def lose() -> None:
        if (run.folder / "lose").exists() and not lost_s:
            lost_s.append(time.time())
            place.nodes.remove(place.nodes.workers[0])
            place.nodes.add(cpus=1)

    killed = run.finish(lose)
    if killed or not lost_s:
        raise ChaosError(f"{killed} drivers died, {len(lost_s)} nodes were lost")
    if run.losses() != undisturbed.losses():
        raise ChaosError("the losses differ from the undisturbed run's")
    if (run.model / "model.safetensors").read_bytes() != (undisturbed.model / "model.safetensors").read_bytes():
        raise ChaosError("the model differs from the undisturbed run's")
    of_rank_0 = [step for step in read_steps(run.folder) if step.rank == 0]
    # Starting the workers takes by far longer than a step.
    pairs = itertools.pairwise(of_rank_0)
    longest = max(pairs, key=lambda pair: pair[1].at_s - pair[0].at_s, default=None)
    if longest is None:
        raise ChaosError(f"{len(of_rank_0)} steps were told, where there are {_STEPS}")
    before, after = longest
    again = before.step - after.step + 1
    if again > _INTERVAL:
        raise ChaosError(f"{again} steps were done again, checkpoints are {_INTERVAL} apart")
    happened = (
        f"lost after step {before.step}; went on with step {after.step}, {again} done again; losses and model equal"
    )
    return happened, after.at_s - lost_s[0]


def sampling(place: Place, folder: Path) -> tuple[str, float]:
    """the task that samples runs again elsewhere, and reuses the batches that it had drawn; same files"""
    evaluation = place.run / "evaluation"
    driver = place.entry("jobs/evaluate.py", str(written_recipe(place)), evaluation=True)
    _left_alone(Trial(driver, folder / "undisturbed"))
    expected = tree(evaluation)
    shutil.rmtree(evaluation)
    trial, lost = _disturbed(place, folder, driver, f"sampling T/{PROBLEMS // 2}")
    compare(0, expected, tree(evaluation))
    drawn = Counter(event.task for event in trial.events() if event.begins and event.task.startswith("sampling"))
    if twice := sorted(task for task, times in drawn.items() if times > 1 and task not in lost.interrupted):
        raise ChaosError(f"drawn again, though it was kept: {', '.join(twice)}")
    happened = f"lost in the middle of {_named(lost)}; the {len(drawn)} batches were drawn once each but for that one"
    _check_no_failure_counts(evaluation)
    return f"{happened}; all {len(expected)} files equal", recovery_s(trial, lost)


def scoring(place: Place, folder: Path) -> tuple[str, float]:
    """the programs of that node run again elsewhere, none counts as wrong; same files"""
    samples, output = place.output / "samples.jsonl", folder / "evaluation"
    _write_samples(samples)
    written_recipe(place)  # and the problems
    problems = str(place.run / "problems.jsonl")
    driver = place.entry(
        "cert-ray", "evaluate", "--problems", problems, "--samples", str(samples), "--output", str(output), "--on-ray",
        evaluation=True,
    )  # fmt: skip
    _left_alone(Trial(driver, folder / "undisturbed"))
    expected = tree(output)
    shutil.rmtree(output)
    trial, lost = _disturbed(place, folder, driver, "programs")
    compare(0, expected, tree(output))
    passed = json.loads((output / "summary.json").read_text())["outcomes"]["passed"]
    if passed != PROBLEMS * SAMPLES // 2:  # as the file was made
        raise ChaosError(f"{passed} samples passed of {PROBLEMS * SAMPLES}, of which half are right")
    _check_no_failure_counts(output)
    run = Counter(event.task for event in trial.events() if event.begins and event.task.startswith("programs"))
    again = sum(times > 1 for times in run.values())
    happened = f"lost with {len(lost.interrupted)} chunk of 32 programs; {again} of {len(run)} chunks ran again"
    return f"{happened}; {passed} of {PROBLEMS * SAMPLES} passed, as made; all files equal", recovery_s(trial, lost)


def _check_no_failure_counts(evaluation: Path) -> None:
    """Raise `ChaosError` where a benchmark's own answer is said to fail: all of them are right."""
    if failed := json.loads((evaluation / "summary.json").read_text())["gold_failed"]:
        raise ChaosError(f"right answers were counted as wrong: {', '.join(failed)}")


def _write_samples(path: Path) -> None:
    """Different samples, every second one right, each with a tenth of a second of work."""
    work = "sum(range(3_000_000))\n"
    rows = [
        {"task_id": f"T/{n}", "completion": f" {n if number % 2 else -1}\n{work}# sample {number}\n"}
        for n in range(PROBLEMS)
        for number in range(SAMPLES)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


STAGES: Mapping[str, Callable[[Place, Path], tuple[str, float]]] = {
    one.__name__: one for one in (cleaning, dedup, dataset, packing, training, sampling, scoring)
}


def lose(stage: str, place: Place) -> Outcome:
    """Lose a node in the middle of `stage`.

    Raises:
        ChaosError: when its expectation did not hold.
    """
    began_s = time.monotonic()
    happened, recovery_s = STAGES[stage](place, place.output / stage)
    expected = (STAGES[stage].__doc__ or "").strip()
    return Outcome(f"node loss: {stage}", expected, happened, 1, time.monotonic() - began_s, recovery_s)


def main() -> None:
    output, names = asked(__doc__, STAGES)
    with short_folder() as short, started_cluster(short) as nodes:
        place = Place(nodes, output)
        carry_out(names, lambda stage: lose(stage, place), output / "node-loss.md")


if __name__ == "__main__":
    main()
