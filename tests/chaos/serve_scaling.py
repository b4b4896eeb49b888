"""Serve grows under load, and shrinks again: engines between one and three, as many as the requests want.

    python -m tests.chaos.serve_scaling --output DIR

Engines have no model (`tests.serving.paced`), so what a request takes is known. Out: `serve_scaling.md`, when how many
engines were there; the exit status is 0 when they became three under load and one after it, and every answer was right.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.chaos import serving
from tests.chaos.run import ROOT, Nodes, short_folder
from tests.ray_heads import free_port

CLIENTS, TOKEN_S = 24, 0.05  # half a second for ten tokens
SCALING = {"min_replicas": 1, "max_replicas": 3, "target_ongoing_requests": 4, "upscale_delay_s": 2}
DOWNSCALE_DELAY_S = 5


def engines(nodes: Nodes) -> int:
    """Engines that are processes now."""
    return len(serving.processes(nodes, "engine"))


class Watch:
    """Seconds since the load began, and how many engines there were."""

    def __init__(self, nodes: Nodes) -> None:
        self._nodes, self._began_s = nodes, time.monotonic()
        self.seen: list[tuple[float, int, str]] = []

    def look(self, about: str) -> int:
        """Look, and remember what changed."""
        there = engines(self._nodes)
        if not self.seen or self.seen[-1][1] != there:
            self.seen.append((time.monotonic() - self._began_s, there, about))
            print(f"{self.seen[-1][0]:6.1f} s {about}: {there} engines", flush=True)
        return there

    def until(self, wanted: int, about: str) -> Callable[[], bool]:
        """Whether there are as many engines as `wanted`."""
        return lambda: self.look(about) == wanted


def measure(nodes: Nodes, folder: Path) -> tuple[Watch, list[str], int]:
    """Deploy, load, stop the load; what was seen, errors of clients, and how many requests there were."""
    scaling = {**SCALING, "downscale_delay_s": DOWNSCALE_DELAY_S}
    serving.deploy(serving.options(folder, TOKEN_S, replicas=1, autoscaling=scaling, max_queued_requests=256))
    serving.wait_until(lambda: engines(nodes) == 1, "the first engine")
    load = [sys.executable, "-m", "tests.chaos.serving_load", f"http://{serving.HOST}:{serving.PORT}"]
    pipe = subprocess.PIPE
    with subprocess.Popen([*load, f"--clients={CLIENTS}"], cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as clients:
        watch = Watch(nodes)
        serving.wait_until(watch.until(SCALING["max_replicas"], "under load"), "more engines")
        time.sleep(serving.QUIET_S)
        output, _ = clients.communicate()
    serving.wait_until(watch.until(SCALING["min_replicas"], "after it"), "fewer engines")
    outcomes = [json.loads(line) for line in output.splitlines()]
    return watch, [outcome["error"] for outcome in outcomes if outcome["error"]], len(outcomes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, required=True, help="folder of the table")
    output = parser.parse_args().output.absolute()
    output.mkdir(parents=True, exist_ok=True)
    serving.PORT = free_port()
    with short_folder() as short, serving.connected(short) as nodes:
        watch, errors, requests = measure(nodes, short)
    lines = [
        f"{CLIENTS} clients, {requests} requests, {len(errors)} errors. Aimed at: {SCALING['target_ongoing_requests']}",
        f"requests for each engine; fewer engines after {DOWNSCALE_DELAY_S} s.",
        "",
        "| after, s | when | engines |",
        "|---|---|---|",
        *(f"| {at_s:.1f} | {about} | {there} |" for at_s, there, about in watch.seen),
    ]
    (output / "serve_scaling.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    sys.exit(f"wrong answers or errors: {errors[:5]}" if errors else 0)


if __name__ == "__main__":
    main()
