"""Preprocessing on a cluster that grows and shrinks by itself: Ray's autoscaler, with nodes simulated on this machine.

    python -m tests.chaos.autoscaling --output DIR

A head without CPUs runs the autoscaler (v2) over Ray's fake multi-node provider, whose nodes are raylets of this
machine; the wheel lacks that provider's defaults, so the config is written here. Preprocessing is submitted with
many more units than there will ever be CPUs. Out: `autoscaling.md`, when nodes came and went; the exit status is 0 when
they did both, and every file equals that of a run on one fixed node.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import ray.autoscaler
import yaml
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FakeMultiNodeProvider

from tests.chaos.corpus import write_corpus
from tests.chaos.run import compare, tree
from tests.ray_heads import ROOT, Head, free_port, started_head, submit

FILES, UNIT_BYTES = 4_000, 120_000
MOST_NODES, CPUS_OF_A_NODE = 3, 1
IDLE_MINUTES = 0.15  # after so long a node goes
GONE_S = 180  # assumed: within this time after the job all nodes are gone


@dataclass
class Watch:
    """Who was there when: seconds since the start, and the number of living nodes besides the head."""

    head: Head
    began_s: float = field(default_factory=time.monotonic)
    seen: list[tuple[float, int]] = field(default_factory=list)
    _ended: threading.Event = field(default_factory=threading.Event)

    def nodes(self) -> int:
        """Living nodes besides the head, now."""
        token = Path(self.head.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
        answer = httpx.get(
            f"{self.head.dashboard}/api/v0/nodes", headers={"Authorization": f"Bearer {token}"}, timeout=30
        ).json()
        listed = answer["data"]["result"]["result"]
        return sum(one["state"] == "ALIVE" and not one["is_head_node"] for one in listed)

    def look(self) -> int:
        """Look, and remember what changed."""
        there = self.nodes()
        if not self.seen or self.seen[-1][1] != there:
            self.seen.append((time.monotonic() - self.began_s, there))
            print(f"{self.seen[-1][0]:6.1f} s: {there} nodes", flush=True)
        return there

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Look once a second while the block runs."""

        def watch() -> None:
            while not self._ended.wait(1.0):
                self.look()

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join()


def autoscaler_config(gcs: str) -> dict[str, Any]:
    """What `ray start --autoscaling-config` wants of the fake provider."""
    defaults = Path(ray.autoscaler.__file__).parent / "local" / "defaults.yaml"
    return {
        **yaml.safe_load(defaults.read_text()),
        "cluster_name": "simulated",
        "max_workers": MOST_NODES,
        "idle_timeout_minutes": IDLE_MINUTES,
        "upscaling_speed": 1.0,
        "provider": {
            # By its class: asked for by its own name, it wants defaults that the wheel lacks.
            "type": "external",
            "module": f"{FakeMultiNodeProvider.__module__}.{FakeMultiNodeProvider.__name__}",
            "gcs_address": gcs,
            "head_node_id": FAKE_HEAD_NODE_ID,
            "launch_multiple": True,
            "disable_node_updaters": True,  # nothing is run on a node: the provider starts its raylet
            "disable_launch_config_check": True,
        },
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "cpu": {
                "resources": {"CPU": CPUS_OF_A_NODE, "object_store_memory": 100 << 20},
                "node_config": {},
                "min_workers": 0,
                "max_workers": MOST_NODES,
            },
        },
        "head_node_type": "ray.head.default",
        **{f"{name}_start_ray_commands": [] for name in ("head", "worker")},  # the defaults' would stop every Ray
    }


def autoscaled(folder: Path, recipe: Path) -> tuple[Watch, float]:
    """Submit `recipe`'s preprocessing to a head without CPUs; who was there, and when the job was done."""
    port = free_port()
    config = folder / "autoscaler.json"
    config.write_text(json.dumps(autoscaler_config(f"127.0.0.1:{port}")))
    variables = {
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
    }
    with started_head(0, [f"--autoscaling-config={config}"], variables, port) as head:
        watch = Watch(head)
        watch.look()
        with watch.watching():
            run_job(head, recipe, folder / "autoscaled.log")
            done_s = time.monotonic() - watch.began_s
            print(f"{done_s:6.1f} s: the job is done", flush=True)
            ends_s = time.monotonic() + GONE_S
            while watch.nodes() and time.monotonic() < ends_s:
                time.sleep(1.0)
        watch.look()
        monitor = next(iter((head.folder / "session_latest" / "logs").glob("monitor.log")), None)
        if monitor:
            shutil.copy(monitor, folder / "monitor.log")
    return watch, done_s


def run_job(head: Head, recipe: Path, log: Path) -> subprocess.CompletedProcess[str]:
    """Preprocessing as a job.

    Raises:
        SystemExit: with its log, when it fails.
    """
    done = submit(head, str(ROOT / "jobs" / "preprocess.py"), str(recipe), timeout_s=1_200)
    log.write_text(done.stdout + done.stderr)
    if done.returncode:
        raise SystemExit(log.read_text()[-6_000:])
    return done


def write_recipe(output: Path, name: str) -> Path:
    """The recipe of one run over the shared corpus."""
    sources = {"inputs": [str(output / "corpus")], "unit_bytes": UNIT_BYTES}
    options = {"run": str(output / name), "libraries": ["numpy"], "preprocess": {"sources": sources}}
    path = output / f"{name}.yaml"
    path.write_text(yaml.safe_dump(options))
    return path


def files_of(run: Path) -> dict[str, str]:
    """Checksums of a run's files; its log has a clock."""
    return {name: digest for name, digest in tree(run).items() if not name.startswith("logs/")}


def summary(watch: Watch, done_s: float, files: int, units: int) -> str:
    """When nodes came and went, as Markdown."""
    lines = [
        f"{units} units, at most {MOST_NODES} nodes of {CPUS_OF_A_NODE} CPU, idle at most {60 * IDLE_MINUTES:.0f} s.",
        f"The job was done after {done_s:.0f} s; all {files} files equal those of one fixed node.",
        "",
        "| after, s | nodes besides the head |",
        "|---|---|",
        *(f"| {at_s:.1f} | {nodes} |" for at_s, nodes in watch.seen),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, required=True, help="a folder that is made anew")
    output = parser.parse_args().output.absolute()
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    write_corpus(output / "corpus", FILES, seed=1)
    watch, done_s = autoscaled(output, write_recipe(output, "autoscaled"))
    with started_head(2) as head:
        run_job(head, write_recipe(output, "fixed"), output / "fixed.log")
    expected, found = files_of(output / "fixed"), files_of(output / "autoscaled")
    compare(0, expected, found)
    units = sum(name.startswith("documents/reports/") for name in expected)
    text = summary(watch, done_s, len(expected), units)
    (output / "autoscaling.md").write_text(text)
    print(text)
    most = max(nodes for _, nodes in watch.seen)
    sys.exit(0 if most > 1 and watch.seen[-1][1] == 0 else "nodes did not come, or did not go")


if __name__ == "__main__":
    main()
