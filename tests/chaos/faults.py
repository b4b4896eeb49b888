"""Preprocessing while something else than a process fails: storage, disk, object store, the head's GCS.

    python -m tests.chaos.faults --output DIR [--only NAME]

Each fault has its expectation beside it; a first run is left alone, and its files are what every other run must end in.
Out: `faults.md`, a row for each fault with what happened and how long it took until work went on; the exit status is 0
when every expectation held. Wants redis-server, root (for a small disk of its own), moto and s3fs (the extra `chaos`).
Everything that is started here ends here; nothing else is touched.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from tests.chaos import events, faulty_storage
from tests.chaos.corpus import write_corpus
from tests.chaos.run import ChaosError, Nodes, compare, short_folder, started_cluster, tree
from tests.chaos.trials import Outcome, Trial, asked, carry_out

FILES, UNIT_BYTES = 240, 100_000
# As cluster/Dockerfile sets it: with Ray's own five minutes, a partition is noticed when it is over.
KEEPALIVE = {"RAY_grpc_client_keepalive_time_ms": "10000", "RAY_grpc_client_keepalive_timeout_ms": "10000"}
_FULL_DISK_BYTES = 340 << 20  # storage keeps 256 MiB free
_HELD_BYTES = 300 << 20  # in an object store of 200 MiB and two of 100


def preprocessing(nodes: Nodes, corpus: Path, output: str) -> list[str]:
    """The command of a driver on `nodes`."""
    command = [sys.executable, "-m", "tests.chaos.driver", "--address", nodes.cluster.address]
    return [*command, "--corpus", str(corpus), "--output", output, "--unit-bytes", str(UNIT_BYTES)]


@dataclass(frozen=True, slots=True)
class Place:
    """What every fault is given: the cluster, the corpus, a folder, and what all must end in."""

    nodes: Nodes
    corpus: Path
    folder: Path
    expected: Mapping[str, str]
    trials: list[Trial] = field(default_factory=list)

    def trial(self, output: str | None = None, **variables: str) -> Trial:
        """A trial into `output`, a folder of this place where none is given."""
        command = preprocessing(self.nodes, self.corpus, output or str(self.folder / "run"))
        trial = Trial(command, self.folder, variables)
        self.trials.append(trial)
        return trial

    def check(self, found: dict[str, str]) -> None:
        """Raise `ChaosError` unless `found` is what was expected."""
        found.pop("done")
        compare(0, dict(self.expected), found)


def slow_storage(place: Place) -> tuple[Trial, str, float | None]:
    """the run takes longer, and ends in the same bytes"""
    trial = place.trial(f"faulty://{place.folder}/run", **{faulty_storage.VARIABLE: json.dumps({"delay_s": 0.02})})
    assert trial.until_finished(most=1) == []
    place.check(tree(place.folder / "run"))
    return trial, "20 ms before every call: finished at once", None


def failing_storage(place: Place) -> tuple[Trial, str, float | None]:
    """tasks and driver try again by themselves, and the run does not notice; same bytes"""
    marks = place.folder / "marks"
    marks.mkdir(parents=True)
    settings = json.dumps({"fail_every": 40, "marks": str(marks)})
    trial = place.trial(f"faulty://{place.folder}/run", **{faulty_storage.VARIABLE: settings})
    assert trial.until_finished(most=1) == []
    place.check(tree(place.folder / "run"))
    failed = len(list(marks.iterdir()))
    return trial, f"{failed} calls failed, and no driver ended", None


def s3_slows_down(place: Place) -> tuple[Trial, str, float | None]:
    """S3's client tries again by itself; the run does not notice; the objects are the local run's files"""
    from tests.chaos.s3 import BUCKET, started_s3

    with started_s3() as s3:
        s3.refuse_every = 50
        trial = place.trial(f"s3://{BUCKET}/run", **s3.variables)
        assert trial.until_finished(most=1) == []
        s3.refuse_every = None
        found = {key.removeprefix("run/"): xxhash.xxh3_128_hexdigest(body) for key, body in s3.objects().items()}
    place.check({name: digest for name, digest in found.items() if "card/" not in name})
    return trial, f"{s3.refused} requests refused with 503 (every fiftieth): finished at once", None


def s3_goes_away(place: Place) -> tuple[Trial, str, float | None]:
    """the run ends with an error; run again when S3 is back, it goes on from the finished units"""
    from tests.chaos.s3 import BUCKET, started_s3

    with started_s3() as s3:
        trial = place.trial(f"s3://{BUCKET}/run", **s3.variables)
        trial.start()
        trial.wait_for_task("documents", 3)
        s3.down = True
        if trial.wait():
            raise ChaosError("finished without its storage")
        said = re.findall(r"^(\w[\w.]*(?:Error|Exception)): ", trial.log, re.MULTILINE)
        done = len(trial.events())
        s3.down = False
        back_s = time.time()
        trial.until_finished(most=2)
        found = {key.removeprefix("run/"): xxhash.xxh3_128_hexdigest(body) for key, body in s3.objects().items()}
    place.check({name: digest for name, digest in found.items() if "card/" not in name})
    assert done
    return (
        trial,
        f"{s3.refused} requests refused, ended with {said[0]}; run again: finished",
        trial.goes_on_after(back_s),
    )


@contextmanager
def small_disk(folder: Path, size_bytes: int) -> Iterator[Path]:
    """A disk of its own, in memory, below `folder`."""
    disk = folder / "disk"
    disk.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", disk], check=True, timeout=30)
    try:
        yield disk
    finally:
        subprocess.run(["umount", disk], check=True, timeout=30)


def disk_full(place: Place) -> tuple[Trial, str, float | None]:
    """the run ends and says which disk, what was wanted and what is free; no half file; with room, it goes on"""
    with small_disk(place.folder, _FULL_DISK_BYTES) as disk:
        ballast = disk / "ballast"
        free = shutil.disk_usage(disk).free
        ballast.write_bytes(bytes(free - (256 << 20) - (2 << 20)))  # two MiB may still be written
        trial = place.trial(str(disk / "run"))
        trial.start()
        if trial.wait():
            raise ChaosError("finished on a full disk")
        problem = trial.log.strip().splitlines()[-1]
        if "StorageFullError" not in problem:
            raise ChaosError(f"another error: {problem}")
        if list(disk.rglob("*.partial")):
            raise ChaosError("half a file was left")
        ballast.unlink()
        room_s = time.time()
        trial.until_finished(most=2)
        place.check(tree(disk / "run"))
        said = problem.split("Error: ", 1)[-1].replace(str(disk), "DISK")
        return trial, f"`{said}`; run again: finished", trial.goes_on_after(room_s)


def object_store_full(place: Place) -> tuple[Trial, str, float | None]:
    """Ray writes objects to disk; the run is slower at most; same bytes"""
    import numpy as np
    import ray

    ray.init(address=place.nodes.cluster.address, namespace="holds-the-store", log_to_driver=False)
    try:
        held = [ray.put(np.full(10 << 20, number, np.uint8)) for number in range(_HELD_BYTES // (10 << 20))]
        trial = place.trial()
        assert trial.until_finished(most=1) == []
        assert all(int(ray.get(one)[0]) == number for number, one in enumerate(held)), "an object was lost"
    finally:
        ray.shutdown()
    place.check(tree(place.folder / "run"))
    return trial, f"{_HELD_BYTES >> 20} MiB of others' objects held meanwhile: finished at once", None


def gcs_restarts(place: Place) -> tuple[Trial, str, float | None]:
    """with Redis, nodes wait for the GCS and the run goes on; same bytes"""
    trial = place.trial()
    trial.start()
    trial.wait_for_task("documents", 3)
    head = place.nodes.cluster.head_node
    head.kill_gcs_server()
    killed_s = time.time()
    time.sleep(5.0)  # how long the head is away: what is tested
    head.start_gcs_server()
    finished = trial.wait()
    recovery_s = trial.goes_on_after(killed_s + 5.0)
    if not finished:
        raise ChaosError(f"the run did not survive: {trial.log[-3_000:]}")
    place.check(tree(place.folder / "run"))
    return trial, "the GCS was killed, and started again after 5 s: the same driver finished", recovery_s


def short_partition(place: Place) -> tuple[Trial, str, float | None]:
    """a node out of reach for less than Ray's patience stays, and the run goes on; same bytes"""
    return _partition(place, down_s=2.0)


def long_partition(place: Place) -> tuple[Trial, str, float | None]:
    """a node out of reach for longer is given up: others do its work, it ends when it is back; same bytes"""
    return _partition(place, down_s=150.0)  # five checks of ten seconds each must fail


def _partition(place: Place, down_s: float) -> tuple[Trial, str, float | None]:
    from tests.chaos.far_node import started_far_node

    trial = place.trial()
    place.folder.mkdir(parents=True)
    with started_far_node(place.nodes.cluster.address, place.folder) as node:
        trial.start()
        while not (begun := _unfinished(trial, node.pids())):
            trial.must_run("before the far node had anything to do")
            time.sleep(0.02)
        node.cut()
        cut_s = time.time()
        far = node.pids()
        time.sleep(down_s)  # how long it is out of reach: what is tested
        node.mend()
        finished = trial.wait()
        gone = node.ends_within(60.0 if down_s > 10 else 0.1)
    if not finished:
        raise ChaosError(f"the run did not survive: {trial.log[-3_000:]}")
    if gone != (down_s > 10):
        raise ChaosError(f"after {down_s} s out of reach the node {'ended' if gone else 'stayed'}")
    place.check(tree(place.folder / "run"))
    later = [one for one in events.read(place.folder / "events") if one.at_s > cut_s and one.pid not in far]
    again = [one.at_s for one in later if one.task.removesuffix(events.CHECK) in begun]
    happened = f"cable pulled for {down_s:g} s in the middle of {', '.join(sorted(begun))}: "
    happened += f"{'taken up by another node' if again else 'done by the node itself'}; "
    happened += f"the node {'ended' if gone else 'stayed'}"
    if gone and (not again or min(again) - cut_s > down_s):
        raise ChaosError(f"{happened}, but only after {min(again, default=0) - cut_s:.0f} s, when the cable was back")
    return trial, happened, min(again) - cut_s if again else trial.goes_on_after(cut_s)


def _unfinished(trial: Trial, pids: set[int]) -> set[str]:
    """Tasks that processes of `pids` are in the middle of."""
    running = events.running(trial.events())
    return {tasks[-1] for pid, tasks in running.items() if pid in pids}


FAULTS: Mapping[str, Callable[[Place], tuple[Trial, str, float | None]]] = {
    "slow storage": slow_storage,
    "failing storage": failing_storage,
    "S3 slows down": s3_slows_down,
    "S3 goes away": s3_goes_away,
    "disk full": disk_full,
    "object store full": object_store_full,
    "GCS restarts": gcs_restarts,
    "short partition": short_partition,
    "long partition": long_partition,
}


@contextmanager
def started_redis(folder: Path) -> Iterator[str]:
    """A Redis on loopback that keeps nothing and ends with the block; its address. Ray finds it by the environment."""
    from tests.ray_heads import free_port

    port = free_port()
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1"]
    with (folder / "redis.log").open("wb") as log:
        process = subprocess.Popen([*command, "--save", "", "--dir", str(folder)], stdout=log, stderr=log)
    os.environ["RAY_REDIS_ADDRESS"] = f"127.0.0.1:{port}"
    try:
        while not _listens(port):
            if process.poll() is not None:
                raise ChaosError((folder / "redis.log").read_text())
            time.sleep(0.1)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def inject(name: str, place: Place) -> Outcome:
    """One fault, and what came of it.

    Raises:
        ChaosError: when its expectation did not hold.
    """
    began_s = time.monotonic()
    try:
        trial, happened, recovery_s = FAULTS[name](place)
    finally:
        for one in place.trials:
            one.kill()
    expected = (FAULTS[name].__doc__ or "").strip()
    return Outcome(name, expected, happened, trial.attempts, time.monotonic() - began_s, recovery_s)


def main() -> None:
    output, names = asked(__doc__, FAULTS)
    write_corpus(output / "corpus", FILES, seed=1)
    os.environ |= KEEPALIVE
    with short_folder() as short, started_redis(output), started_cluster(short) as nodes:
        command = preprocessing(nodes, output / "corpus", str(output / "undisturbed" / "run"))
        undisturbed = Trial(command, output / "undisturbed")
        began_s = time.monotonic()
        undisturbed.until_finished(most=1)
        expected = tree(output / "undisturbed" / "run")
        expected.pop("done")
        print(f"undisturbed: {time.monotonic() - began_s:.0f} s, {len(expected)} files", flush=True)

        def one(name: str) -> Outcome:
            place = Place(nodes, output / "corpus", output / name.replace(" ", "-"), expected)
            return inject(name, place)

        carry_out(names, one, output / "faults.md")


if __name__ == "__main__":
    main()
