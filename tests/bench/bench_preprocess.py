"""The whole job (clean, dedup, score, sketch) beside datatrove, `ast.parse` alone, and itself without Ray.

In: a folder of Parquet tables. Out, in MB of input per second and core, medians of runs that take turns:
- ours on Ray, and with each `--variant NAME:KEY=VALUE` as a row of its own (secrets, decontamination);
- ours on a plain process pool, the same driver code and the same functions: what is missing to it is Ray's share;
- datatrove, local and on Ray: line filters and MinHash, which is where its steps end (no scores, no sketches);
- `ast.parse` and nothing else, on a pool.
Processes are up before the clock starts; the table says what start-up takes beside.

Example: python -m tests.bench.bench_preprocess --tables /tmp/corpus/tables --output results --work /tmp/preprocess \\
    --peers .venv-bench/bin/python --megabytes 300
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.bench.inputs import count_bytes, spread_rows, write_parts
from tests.bench.measuring import Spread, markdown, peers_python, publish, run_watched

PEER = Path(__file__).parent / "peers" / "datatrove_job.py"
PEER_GOAL, PARSE_GOAL, RAY_GOAL = 10, 0.5, 0.10  # the goals
OURS, POOL, PARSE = "cert-ray on Ray", "cert-ray on a process pool", "`ast.parse` alone"
PEERS = {"datatrove, local": "local", "datatrove, on Ray": "ray"}


def main() -> None:
    """Measure every row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder of inputs and runs; runs are removed")
    parser.add_argument(
        "--peers", type=peers_python, help="the Python of the peers' environment; default: no datatrove"
    )
    parser.add_argument("--megabytes", type=float, default=1_000, help="input of ours, about")
    parser.add_argument("--peer-megabytes", type=float, default=50, help="input of datatrove, and of ours beside it")
    parser.add_argument("--variant", action="append", default=[], metavar="NAME:KEY=VALUE", help="a row of its own")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--cores", type=int, default=2)
    given = parser.parse_args()
    ours = [sys.executable, "-m", "tests.bench.ours"]
    rows = {OURS: [*ours, "preprocess"], POOL: [*ours, "preprocess", "--pool"], PARSE: [*ours, "parse"]}
    for variant in given.variant:
        name, _, assignment = variant.partition(":")
        rows[f"{OURS}, {name}"] = [*ours, "preprocess", "--set", assignment]
    large = measure(rows, prepare(given.tables, given.work / "large", given.megabytes * 1e6, given.cores), given)
    tables = [rate_table(large, given.cores), verdicts(large)]
    figures = {"large": large}
    command = "python -m tests.bench.bench_preprocess " + " ".join(sys.argv[1:])
    publish(given.output, "preprocess", command, tables, figures)
    if given.peers:
        beside = {OURS: rows[OURS]}
        for name, executor in PEERS.items():
            beside[name] = [str(given.peers), str(PEER), "minhash", "--clean", "--executor", executor]
        small = prepare(given.tables, given.work / "small", given.peer_megabytes * 1e6, given.cores)
        figures["small"] = measure(beside, small, given)
        tables += [rate_table(figures["small"], given.cores), peer_verdicts(figures["small"])]
        publish(given.output, "preprocess", command, tables, figures)


def prepare(tables: Path, folder: Path, wanted_bytes: float, cores: int) -> tuple[Path, float]:
    """About so many bytes of text, in parts for every core; and the megabytes in them."""
    shutil.rmtree(folder, ignore_errors=True)
    write_parts(spread_rows(tables, min(1.0, wanted_bytes / count_bytes(tables))), folder, 2 * cores)
    return folder, count_bytes(folder) / 1e6


def measure(rows: dict[str, list[str]], prepared: tuple[Path, float], given: argparse.Namespace) -> dict[str, dict]:
    """Every row's runs, taking turns, so that what else the machine does meets all of them.

    A row that fails is said and left out: a peer's executor need not work here.
    """
    folder, megabytes = prepared
    measured: dict[str, dict] = {name: {"rates": [], "usages": [], "figures": []} for name in rows}
    for run in range(given.runs):
        for name, command in rows.items():
            if name not in measured:
                continue
            output = given.work / "run"
            shutil.rmtree(output, ignore_errors=True)
            common = ["--tables", str(folder), "--output", str(output), "--workers", str(given.cores)]
            try:
                usage = run_watched([*command, *common], cores=given.cores)
            except RuntimeError as error:
                print(f"{name}: left out, {error}", file=sys.stderr)
                del measured[name]
                continue
            figures = json.loads(usage.output.splitlines()[-1])
            measured[name]["rates"].append(megabytes / figures["seconds"] / given.cores)
            measured[name]["usages"].append(usage)
            measured[name]["figures"].append(figures)
            measured[name]["megabytes"] = megabytes
            print(f"{name}, run {run + 1}: {measured[name]['rates'][-1]:.2f} MB/s per core", file=sys.stderr)
            shutil.rmtree(output, ignore_errors=True)
    return measured


def rate_table(measured: dict[str, dict], cores: int) -> str:
    """MB per second and core, CPU and memory of each row."""
    rows: list[Sequence[object]] = []
    for name, row in measured.items():
        usages = row["usages"]
        start_up = [usage.wall_s - figures["seconds"] for usage, figures in zip(usages, row["figures"], strict=True)]
        rows.append(
            (
                name,
                Spread.of(row["rates"]),
                Spread.of([row["megabytes"] / usage.cpu_s for usage in usages]),
                Spread.of(start_up),
                Spread.of([usage.peak_bytes / 1e6 for usage in usages]),
            )
        )
    size = next(iter(measured.values()))["megabytes"]
    headers = [
        f"{size:.0f} MB, {cores} cores",
        "MB/s per core",
        "MB per CPU-second, start-up included",
        "start-up, s",
        "peak of all processes, MB",
    ]
    return markdown(headers, rows)


def verdicts(measured: dict[str, dict]) -> str:
    """Beside `ast.parse`, and Ray's share."""
    lines = []
    rates = {name: Spread.of(row["rates"]).median for name, row in measured.items()}
    if {OURS, PARSE} <= rates.keys():
        share = rates[OURS] / rates[PARSE]
        lines.append(f"- {_met(share >= PARSE_GOAL)}: {share:.2f} of what `ast.parse` alone reaches (at least 0.5)")
    if {OURS, POOL} <= rates.keys():
        # Run by run: what else the machine does moves both runs of a turn.
        shares = [1 - ray / pool for ray, pool in zip(measured[OURS]["rates"], measured[POOL]["rates"], strict=True)]
        spread = Spread.of(shares)
        lines.append(
            f"- {_met(spread.median <= RAY_GOAL)}: Ray's share of the time {spread} (at most 0.1, from 1 GB up)"
        )
    return "\n".join(lines)


def peer_verdicts(measured: dict[str, dict]) -> str:
    """Beside datatrove."""
    rates = {name: Spread.of(row["rates"]).median for name, row in measured.items()}
    lines = []
    for name in PEERS:
        if OURS in rates and name in rates:
            times = rates[OURS] / rates[name]
            lines.append(f"- {_met(times >= PEER_GOAL)}: {times:.1f} times {name} (at least 10)")
        else:
            lines.append(f"- not measured: {name}")
    return "\n".join(lines)


def _met(met: bool) -> str:
    return "met" if met else "MISSED"


if __name__ == "__main__":
    main()
