"""Training under kills, and with nodes that come and go, on a cluster of several nodes on this machine.

    python -m tests.chaos.training kills --kills 12 --seed 1 --output chaos
    python -m tests.chaos.training elastic --output chaos
    python -m tests.chaos.training preempted --steps 60 --output chaos

`kills`: at seeded random steps a worker or the driver is killed with SIGKILL, again and again in one run of two
workers; its losses and its model must equal an undisturbed run's to the bit, and no kill may cost more than one
checkpoint's interval. `elastic`: a run of one or two workers starts on one node, a second joins, and one goes away with
everything it runs; the losses must equal those of an undisturbed run within rounding. `preempted`: one of two nodes is
announced to leave, as clouds do with spot machines, and is killed later; the run, which has no other checkpoint and
may not fail, must have written one, go on without a step done again on a third node, or with `--alone` on the one that
is left, and end as an undisturbed one. Out: `summary-*.md` and logs below `--output`; exit status 0 when all of that
held. Strikes come from the workers themselves, after a step: but for that node's leave, nothing is timed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from tests.chaos.run import HEALTH_CHECK, ROOT, ChaosError, Nodes, started_cluster
from tests.ray_heads import RAY

TOLERANCE_NATS = 2e-5
PACE_S = 1.0
SIZES = {"micro_batch": 2, "gradient_accumulation": 2, "workers": 2, "zero_stage": 2, "learning_rate": 3e-3}


@dataclass(frozen=True)
class Step:
    """A worker came to the end of a step."""

    at_s: float
    step: int
    rank: int
    world_size: int


class Strikes:
    """Called after each step on every worker: notes it, kills where that is due, and waits where nodes must change."""

    def __init__(
        self, folder: Path, kills: dict[int, str], changes: dict[int, tuple[str, int]], driver: int, pace_s: float = 0.0
    ) -> None:
        self._folder, self._kills, self._changes, self._driver = folder, kills, changes, driver
        self._pace_s = pace_s

    def __call__(self, step: int, rank: int) -> None:
        """Steps are written in one piece: several processes append to the file."""
        from torch.distributed import get_world_size

        line = json.dumps([time.time(), step, rank, get_world_size()]) + "\n"
        file = os.open(self._folder / "steps", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.write(file, line.encode())
        os.close(file)
        time.sleep(self._pace_s)
        mark = self._folder / f"struck-{step}"
        kind = self._kills.get(step)
        if kind is not None and rank == (1 if kind == "worker" else 0) and not mark.exists():
            mark.touch()
            os.kill(os.getpid() if kind == "worker" else self._driver, signal.SIGKILL)
            if kind == "driver":
                signal.pause()  # until Ray ends the workers of a driver that is gone
        wanted = self._changes.get(step)
        if wanted is not None:
            change, workers = wanted
            (self._folder / change).touch()  # the program that owns the nodes is waiting for it
            if workers not in (0, get_world_size()):  # 0: nobody waits
                signal.pause()  # until Ray starts the workers again, in another number


def read_steps(folder: Path) -> list[Step]:
    """Every step that ended so far, in the order written."""
    if not (folder / "steps").exists():
        return []
    return [Step(*json.loads(line)) for line in (folder / "steps").read_text().splitlines()]


def drive(given: argparse.Namespace) -> None:
    """One attempt, as a process of its own that joins the cluster."""
    import ray

    from cert_ray.training.config import TrainConfig
    from cert_ray.training.on_ray import train

    plan = json.loads((given.output / "plan.json").read_text())
    kills = {int(step): kind for step, kind in plan["kills"].items()}
    changes = {int(step): tuple(change) for step, change in plan["changes"].items()}
    # What frees a dead driver's places looks for its cluster by itself; with two on a machine it may ask the other.
    environment = {"env_vars": {"RAY_ADDRESS": given.address}}
    ray.init(address=given.address, namespace=f"chaos-{os.getpid()}", log_to_driver=True, runtime_env=environment)
    strikes = Strikes(given.output, kills, changes, os.getpid(), plan["pace_s"])
    train(TrainConfig.model_validate(plan["config"]), after_step=strikes)
    ray.shutdown()


class Run:
    """One run of `train` into a folder: its plan, and the drivers that carry it out."""

    def __init__(
        self, nodes: Nodes, folder: Path, config: dict[str, Any], pace_s: float = 0.0, **plan: dict[int, Any]
    ) -> None:
        folder.mkdir(parents=True)
        self.folder, self._nodes = folder, nodes
        self.model = folder / "model"
        config = {**config, "output": str(self.model)}
        whole = {"kills": {}, "changes": {}, "pace_s": pace_s, **plan, "config": config}
        (folder / "plan.json").write_text(json.dumps(whole))

    def start(self) -> subprocess.Popen[bytes]:
        """A driver."""
        command = [sys.executable, "-m", "tests.chaos.training", "drive", "--output", str(self.folder)]
        with (self.folder / "log").open("ab") as log:
            return subprocess.Popen(
                [*command, "--address", self._nodes.cluster.address], cwd=ROOT, stdout=log, stderr=log
            )

    def finish(self, meanwhile: Callable[[], None] = lambda: None) -> int:
        """Start drivers until one ends well; returns how many were killed."""
        killed = 0
        while True:
            driver = self.start()
            try:
                while driver.poll() is None:
                    meanwhile()
                    time.sleep(0.2)
            finally:
                driver.kill()
                driver.wait()
            if driver.returncode == 0:
                return killed
            if driver.returncode != -signal.SIGKILL:
                raise ChaosError(
                    f"driver ended with {driver.returncode}:\n{(self.folder / 'log').read_text()[-6_000:]}"
                )
            killed += 1

    def losses(self) -> list[float]:
        """By step."""
        return [json.loads(line)["loss"] for line in (self.model / "loss.jsonl").read_text().splitlines()]


def make_inputs(folder: Path) -> dict[str, str]:
    """The small pack of the training tests, with its tokenizer."""
    from tests.training.conftest import write_pack, write_tokenizer

    write_pack(folder / "pack", write_tokenizer(folder / "tokenizer"))
    return {"base": "tiny", "tokens": str(folder / "pack"), "tokenizer": str(folder / "tokenizer")}


def kills(given: argparse.Namespace, nodes: Nodes) -> str:
    """The run under kills; a Markdown summary."""
    chosen = random.Random(given.seed)
    steps = sorted(chosen.sample(range(2, given.steps), given.kills))
    kinds = ["driver" if place % 2 else "worker" for place in range(given.kills)]
    chosen.shuffle(kinds)
    config = make_inputs(given.output) | SIZES
    config |= {"steps": given.steps, "warmup_steps": 2, "checkpoint_every_steps": given.interval}
    undisturbed = Run(nodes, given.output / "undisturbed", config)
    undisturbed.finish()
    plan = dict(zip(steps, kinds, strict=True))
    disturbed = Run(nodes, given.output / "disturbed", config | {"max_failures": given.kills}, kills=plan)
    disturbed.finish()
    if disturbed.losses() != undisturbed.losses():
        raise ChaosError("the losses differ from the undisturbed run's")
    if (disturbed.model / "model.safetensors").read_bytes() != (undisturbed.model / "model.safetensors").read_bytes():
        raise ChaosError("the model differs from the undisturbed run's")
    lines = ["| step | killed | steps done again | back after, s |", "|---|---|---|---|"]
    lost = []
    done = read_steps(disturbed.folder)
    for step in steps:
        before, after = _interruption(done, step)
        lost.append(before.step - after.step + 1)
        lines.append(f"| {step} | {plan[step]} | {lost[-1]} | {after.at_s - before.at_s:.1f} |")
    if max(lost) > given.interval:
        raise ChaosError(f"a kill cost {max(lost)} steps, checkpoints are {given.interval} apart")
    return f"{given.kills} kills in one run of {given.steps} steps: losses and model equal to the bit.\n\n" + "\n".join(
        lines
    )


def _interruption(steps: list[Step], killed_at: int) -> tuple[Step, Step]:
    """The step after which a kill came, when it was done first, and the one that came next, as rank 0 saw them."""
    of_rank_0 = [step for step in steps if step.rank == 0]
    return next((before, after) for before, after in pairwise(of_rank_0) if before.step == killed_at)


def elastic(given: argparse.Namespace, nodes: Nodes) -> str:
    """A run on one node, then two, then one; a Markdown summary."""
    config = make_inputs(given.output) | SIZES
    config |= {"steps": given.steps, "warmup_steps": 2, "checkpoint_every_steps": given.interval}
    undisturbed = Run(nodes, given.output / "undisturbed", config)
    undisturbed.finish()
    nodes.remove(nodes.workers[0])
    third = given.steps // 3
    changes = {third: ("add", 0), 2 * third: ("remove", 1)}
    config |= {"min_workers": 1, "resize_check_s": 2.0, "max_failures": 9}
    # Steps last longer than they take, so that some are left when the node is there.
    run = Run(nodes, given.output / "elastic", config, PACE_S, changes=changes)
    done: list[tuple[str, float]] = []

    def change_nodes() -> None:
        for name, change in (("add", lambda: nodes.add(cpus=1)), ("remove", lambda: nodes.remove(nodes.workers[0]))):
            if (run.folder / name).exists() and name not in [made for made, _ in done]:
                done.append((name, time.time()))
                change()

    run.finish(change_nodes)
    apart = max(abs(mine - other) for mine, other in zip(run.losses(), undisturbed.losses(), strict=True))
    if apart > TOLERANCE_NATS:
        raise ChaosError(f"losses are up to {apart} nats apart")
    lines = [
        "| node | told after step | workers | last step before | next step | s between |",
        "|---|---|---|---|---|---|",
    ]
    for (name, _), step, (before, after) in zip(done, changes, _changes(read_steps(run.folder)), strict=True):
        if name == "add" and after.step != before.step + 1:
            raise ChaosError(f"a node that joined cost steps: after step {before.step} came {after.step}")
        what = f"{before.world_size} -> {after.world_size}"
        lines.append(f"| {name} | {step} | {what} | {before.step} | {after.step} | {after.at_s - before.at_s:.1f} |")
    return f"{given.steps} steps; losses at most {apart:.1e} nats from two workers' all along.\n\n" + "\n".join(lines)


def preempted(given: argparse.Namespace, nodes: Nodes) -> str:
    """A run of two nodes, one of which is announced to leave, and does, perhaps before it said; a Markdown summary."""
    config = make_inputs(given.output) | SIZES
    config |= {"steps": given.steps, "warmup_steps": 2, "max_failures": 0}
    undisturbed = Run(nodes, given.output / "undisturbed", config)
    undisturbed.finish()
    third = given.steps // 3
    if given.alone:
        config |= {"min_workers": 1}
    # Steps last longer than they take, so that some are left when the node goes.
    run = Run(nodes, given.output / "preempted", config, PACE_S, changes={third: ("leave", 0)})
    leaving = nodes.workers[0]
    announced: list[float] = []

    def announce_and_kill() -> None:
        if not announced and (run.folder / "leave").exists():
            announced.append(time.time())
            command = [RAY, "drain-node", "--address", nodes.cluster.address]
            command += ["--node-id", leaving.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
            command += ["--reason-message", "chaos", "--deadline-remaining-seconds", str(given.notice_s)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            if not given.alone:
                nodes.add(cpus=1)  # as an autoscaler does for workers that wait
        if announced and leaving in nodes.workers and time.time() > announced[0] + given.leaves_after_s:
            nodes.remove(leaving)

    run.finish(announce_and_kill)
    apart = max(abs(mine - other) for mine, other in zip(run.losses(), undisturbed.losses(), strict=True))
    if apart > (TOLERANCE_NATS if given.alone else 0.0):
        raise ChaosError(f"losses are up to {apart} nats from the undisturbed run's")
    seen = [step for step in read_steps(run.folder) if step.rank == 0]
    again = len(seen) - given.steps
    before, after = max(pairwise(seen), key=lambda pair: pair[1].at_s - pair[0].at_s)
    if again > 0 or after.step <= third:
        raise ChaosError(f"{again} steps were done again, from step {after.step} on")
    told = f"{given.steps} steps of {PACE_S} s, only the last checkpoint asked for, no failure allowed; losses at most "
    told += f"{apart:.1e} nats from the undisturbed run's."
    cells = {
        "announced after step": third,
        "for, s": given.notice_s,
        "left after, s": given.leaves_after_s,
        "checkpoint after step": before.step,
        "steps done again": again,
        "workers": f"{before.world_size} -> {after.world_size}",
        "next step after, s": f"{after.at_s - before.at_s:.1f}",
    }
    lines = [f"| {' | '.join(cells)} |", "|" + "---|" * len(cells), f"| {' | '.join(map(str, cells.values()))} |"]
    return told + "\n\n" + "\n".join(lines)


def _changes(steps: list[Step]) -> list[tuple[Step, Step]]:
    """The last step of one number of workers and the first one of the next."""
    seen = [step for step in steps if step.rank == 0]
    return [(before, after) for before, after in pairwise(seen) if before.world_size != after.world_size]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["kills", "elastic", "preempted", "drive"])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=12)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--interval", type=int, default=5, help="steps between checkpoints")
    parser.add_argument("--notice-s", type=int, default=30, help="preempted: how long a node says that it stays")
    parser.add_argument("--leaves-after-s", type=int, default=30, help="preempted: how long it stays")
    parser.add_argument("--alone", action="store_true", help="preempted: no third node comes")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--patience-s", type=int, default=15, help="for a node that does not answer")
    parser.add_argument("--address", help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.output = given.output.resolve()
    if given.what == "drive":
        drive(given)
        return
    given.output.mkdir(parents=True)
    HEALTH_CHECK["health_check_failure_threshold"] = given.patience_s  # a look a second
    os.environ.setdefault("RAY_raylet_start_wait_time_s", str(6 * given.patience_s))
    with tempfile.TemporaryDirectory(prefix="cr", dir="/tmp") as folder, started_cluster(Path(folder)) as nodes:
        summary = {"kills": kills, "elastic": elastic, "preempted": preempted}[given.what](given, nodes)
    (given.output / f"summary-{given.what}.md").write_text(summary + "\n")
    print(summary)


if __name__ == "__main__":
    main()
