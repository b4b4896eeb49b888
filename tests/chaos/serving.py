"""Serving under faults: engines, front doors, the controller, proxies and nodes are killed while clients ask.

In: how many rounds of kills, and a seed. Out: `summary.md` and `faults.jsonl` below `--output`; the exit status is 0
when no client that retries as the `openai` client does by default saw an error, and the service was whole again by
itself after every fault. A stream that had begun cannot be asked for again behind its reader's back: those that broke
are counted by themselves. Each round has one of `KINDS`, in seeded order. Engines have no model
(`tests.serving.paced`).

A proxy is where clients connect to. The proxies of all nodes share one port here, and the kernel spreads connections
over those that are alive, as a load balancer does on a cluster. With `--haproxy` HAProxy stands in their place, on
the head alone, since two of them on one machine take each other's ports; it is not killed.

`--overload-s 60` measures ten times the capacity instead, from a client with a process of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from cert_ray.serving.deployment import ServeConfig
from tests.bench.bench_serve_overhead import SIDES
from tests.chaos.run import ROOT, Nodes, command, send, started_cluster

KINDS = ("engine", "front door", "controller", "node", "update", "proxy")
HOST, PORT = "127.0.0.1", 18_431
TITLES = {
    "engine": "ServeReplica:cert-ray:engine",
    "front door": "ServeReplica:cert-ray:front-door",
    "controller": "ServeController",
    "proxy": "ProxyActor",
}
HAPROXY = SIDES["haproxy"]
WHOLE_S = 400  # assumed: several times the slowest start of a replica, on a machine that does other things, too
QUIET_S = 3.0  # of load before and after a fault
ENGINES = 2
NOTICED_S = 1.0


@dataclass(frozen=True)
class Fault:
    """One fault, and what clients saw from its beginning until the service was whole again, and `QUIET_S` more."""

    number: int
    kind: str
    whole_after_s: float
    requests: int
    errors: list[str]
    broken_streams: list[str]
    slowest_s: float


def options(folder: Path, token_s: float, **more: Any) -> ServeConfig:
    """An application of paced engines; four front doors share a CPU with nobody."""
    (folder / str(token_s)).mkdir(exist_ok=True)
    given = {
        "model": str(folder / str(token_s)),
        "replicas": ENGINES,
        "front_doors": 2,
        "num_cpus": 1,
        "surge_percent": 50,
        "health_check_period_s": 1,
        "request_timeout_s": 30,
    }
    return ServeConfig.from_mapping({**given, **more}, "chaos")


def deploy(config: ServeConfig) -> None:
    from ray import serve

    from cert_ray.serving.on_ray import application
    from tests.serving.paced import PacedEngines

    place = "HeadOnly" if _is_haproxy() else "EveryNode"
    serve.start(proxy_location=place, http_options={"host": HOST, "port": PORT})
    serve.run(application(config, PacedEngines), name="cert-ray", route_prefix="/", blocking=False)


def _is_haproxy() -> bool:
    return HAPROXY.items() <= os.environ.items()


@contextmanager
def connected(folder: Path) -> Iterator[Nodes]:
    """A cluster of a head and two nodes, room for two engines and one more, with this process as its driver."""
    with started_cluster(folder) as nodes:  # before Ray is imported, which reads then whether a token is wanted
        import ray

        nodes.add(cpus=1)
        ray.init(address=nodes.cluster.address, log_to_driver=False, configure_logging=False)
        try:
            yield nodes
        finally:
            from ray import serve

            serve.shutdown()
            ray.shutdown()


def processes(nodes: Nodes, kind: str) -> list[psutil.Process]:
    """The processes of one kind, on the head and the nodes that are up."""
    everywhere = [nodes.cluster.head_node, *nodes.workers]
    return [found for node in everywhere for found in nodes.processes(node) if TITLES[kind] in command(found)]


def is_whole(nodes: Nodes) -> bool:
    """Whether Serve says so, every process is there, and the front door answers."""
    import httpx
    from ray import serve
    from ray.exceptions import RayError

    running = {kind: len(processes(nodes, kind)) for kind in TITLES}
    if (running["engine"], running["front door"], running["controller"]) != (ENGINES, 2, 1):
        return False
    try:
        status = serve.status()
        answer = httpx.get(f"http://{HOST}:{PORT}/health", timeout=1)
    except (RayError, httpx.HTTPError):
        return False
    proxies = [proxy for proxy in status.proxies.values() if proxy != "DRAINED"]
    application = status.applications.get("cert-ray")
    return (
        answer.status_code == 200
        and application is not None
        and application.status == "RUNNING"
        and len(proxies) == running["proxy"]
        and all(proxy in ("HEALTHY", "DRAINING") for proxy in proxies)
    )


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Return when `condition` holds."""
    ends = time.monotonic() + WHOLE_S
    while not condition():
        if time.monotonic() > ends:
            raise SystemExit(f"{what}: not within {WHOLE_S} s")
        time.sleep(0.1)


def strike(nodes: Nodes, kind: str, chance: random.Random, folder: Path, number: int) -> None:
    """Do what `kind` says."""
    if kind == "update":
        deploy(options(folder, 0.02, max_queued_requests=64 + number))
    elif kind == "node":
        nodes.remove(chance.choice(nodes.workers))
        nodes.add(cpus=1)
    else:
        send(chance.choice(processes(nodes, kind)).pid, signal.SIGKILL)


def run_faults(nodes: Nodes, kinds: list[str], chance: random.Random, folder: Path) -> Iterator[Fault]:
    """One fault after the other, each under the load of clients in a process of its own."""
    deploy(options(folder, 0.02))
    wait_until(lambda: is_whole(nodes), "start")
    for number, kind in enumerate(kinds, start=1):
        load = [sys.executable, "-m", "tests.chaos.serving_load", f"http://{HOST}:{PORT}"]
        pipe = subprocess.PIPE
        with subprocess.Popen(load, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as clients:
            assert clients.stdout is not None
            # A busy machine takes longer than a fault to start them.
            if clients.stdout.readline() != "begun\n":
                raise SystemExit("the clients did not start")
            time.sleep(QUIET_S)
            old = {found.pid for title in ("engine", "front door") for found in processes(nodes, title)}
            began = time.time()
            strike(nodes, kind, chance, folder, number)
            # A fault that nobody has noticed yet looks like health.
            if kind == "update":
                wait_until(lambda old=old: not old & _serving(nodes), f"{kind} {number}")
            else:
                time.sleep(NOTICED_S)
            wait_until(lambda: is_whole(nodes), f"{kind} {number}")
            whole_s = time.time() - began
            time.sleep(QUIET_S)
            output, _ = clients.communicate()
        outcomes = [json.loads(line) for line in output.splitlines()]
        during = [outcome for outcome in outcomes if outcome["began"] + outcome["seconds"] >= began]
        failed = [outcome for outcome in outcomes if outcome["error"]]
        errors = [outcome["error"] for outcome in failed if not outcome["stream"]]
        broken = [outcome["error"] for outcome in failed if outcome["stream"]]
        slowest_s = max((outcome["seconds"] for outcome in during), default=0.0)
        yield Fault(number, kind, whole_s, len(during), errors, broken, slowest_s)


def _serving(nodes: Nodes) -> set[int]:
    return {found.pid for kind in ("engine", "front door") for found in processes(nodes, kind)}


def summarise(faults: list[Fault]) -> str:
    """A Markdown table by kind."""
    lines = [
        "| fault | times | requests meanwhile | failed | streams broken | slowest request | whole again after |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind in KINDS:
        of_kind = [fault for fault in faults if fault.kind == kind]
        if of_kind:
            whole_s = [fault.whole_after_s for fault in of_kind]
            lines.append(
                f"| {kind} | {len(of_kind)} | {sum(fault.requests for fault in of_kind)} "
                f"| {sum(len(fault.errors) for fault in of_kind)} "
                f"| {sum(len(fault.broken_streams) for fault in of_kind)} "
                f"| {max(fault.slowest_s for fault in of_kind):.1f} s "
                f"| {statistics.median(whole_s):.0f} s (at most {max(whole_s):.0f}) |"
            )
    return "\n".join(lines) + "\n"


async def overload(rate: float, seconds: float) -> list[tuple[int, float, str | None]]:
    """Send `rate` requests a second, whatever comes back: status, seconds, Retry-After of each."""
    import aiohttp

    seen: list[tuple[int, float, str | None]] = []
    body = {"model": "cert", "prompt": "x =", "max_tokens": 20}

    async def ask(session: Any) -> None:
        began = time.perf_counter()
        async with session.post(f"http://{HOST}:{PORT}/v1/completions", json=body) as response:
            await response.read()
            seen.append((response.status, time.perf_counter() - began, response.headers.get("Retry-After")))

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(120)) as session:
        began, asked = time.perf_counter(), []
        while (elapsed := time.perf_counter() - began) < seconds:
            asked += [asyncio.ensure_future(ask(session)) for _ in range(int(elapsed * rate) - len(asked))]
            await asyncio.sleep(0.01)
        await asyncio.gather(*asked)
    return seen


def tabulate_overload(seen: list[tuple[int, float, str | None]], deadline_s: float) -> str:
    """A Markdown table by status."""
    lines = ["| status | requests | median | 99% within | slowest | Retry-After |", "|---|---|---|---|---|---|"]
    for status, count in sorted(Counter(status for status, _, _ in seen).items()):
        times_s = sorted(seconds for code, seconds, _ in seen if code == status)
        waits = {wait for code, _, wait in seen if code == status}
        shown = ", ".join(sorted(wait or "-" for wait in waits))
        lines.append(
            f"| {status} | {count} | {1e3 * statistics.median(times_s):.0f} ms "
            f"| {1e3 * times_s[int(0.99 * (count - 1))]:.0f} ms | {1e3 * times_s[-1]:.0f} ms | {shown} |"
        )
    late = sum(status == 200 and seconds > deadline_s for status, seconds, _ in seen)
    return "\n".join(lines) + f"\n\nAnswers after the deadline of {deadline_s:g} s: {late}.\n"


def run_overload(nodes: Nodes, folder: Path, seconds: float) -> tuple[str, bool]:
    """Ten times the capacity for `seconds`: the table, and whether all went as it should."""
    config = options(folder, 0.01, max_ongoing_requests=1, max_queued_requests=16, request_timeout_s=5)
    deploy(config)
    wait_until(lambda: is_whole(nodes), "start")
    capacity = config.at_once / (20 * 0.01)  # requests of 20 tokens
    client = [sys.executable, "-m", "tests.chaos.serving", "--client", str(10 * capacity), "--overload-s", str(seconds)]
    ended = subprocess.run(client, cwd=ROOT, capture_output=True, text=True, check=True)
    seen = [tuple(outcome) for outcome in json.loads(ended.stdout)]
    table = f"{10 * capacity:.0f} requests a second against a capacity of {capacity:.0f}, {seconds:g} s.\n\n"
    table += tabulate_overload(seen, config.request_timeout_s)  # type: ignore[arg-type]
    good = {status for status, _, _ in seen} <= {200, 429, 503} and is_whole(nodes)
    return table, good and all(wait for status, _, wait in seen if status != 200)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="faults of each kind")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("chaos-serving"))
    parser.add_argument("--overload-s", type=float, default=None)
    parser.add_argument("--haproxy", action="store_true", help="HAProxy instead of Serve's own proxies")
    parser.add_argument("--client", type=float, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.client is not None:
        print(json.dumps(asyncio.run(overload(arguments.client, arguments.overload_s))))
        return
    arguments.output.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "180")  # 30 by default, which a busy machine's start takes
    if arguments.haproxy:
        os.environ |= HAPROXY
        TITLES["proxy"] = "HAProxyManager"
    chance = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory(prefix="cs") as short, connected(Path(short)) as nodes:
        if arguments.overload_s is not None:
            table, good = run_overload(nodes, Path(short), arguments.overload_s)
            (arguments.output / "overload.md").write_text(table)
            print(table)
            sys.exit(0 if good else 1)
        kinds = [kind for kind in KINDS for _ in range(arguments.rounds) if not (arguments.haproxy and kind == "proxy")]
        chance.shuffle(kinds)
        faults = []
        with (arguments.output / "faults.jsonl").open("w") as log:
            for fault in run_faults(nodes, kinds, chance, Path(short)):
                faults.append(fault)
                log.write(json.dumps(asdict(fault)) + "\n")
                log.flush()
                print(f"{fault.number}/{len(kinds)} {fault}", flush=True)
    (arguments.output / "summary.md").write_text(summarise(faults))
    print(summarise(faults))
    sys.exit(1 if any(fault.errors for fault in faults) else 0)


if __name__ == "__main__":
    main()
