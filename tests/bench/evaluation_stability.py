"""The same samples with one process a core and with eight: whether a busy machine changes the score.

    python -m tests.bench.evaluation_stability --benchmarks FOLDER

Samples: the authors' published ones, the benchmark's answers, and programs that compute for 1 or 3 seconds before
passing or never end, at every 25th problem. Ours (CPU-time limits) beside the released evaluator's way with its three
seconds of wall time; the peer gets the published samples and answers only. By hand; a table on standard output.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from cert_ray.evaluation.benchmarks import Problem, Sample, read_problems, read_samples
from cert_ray.evaluation.environments import build_environment
from cert_ray.evaluation.execution import ExecutionConfig
from cert_ray.evaluation.scoring import evaluate
from tests.bench.bench_evaluation import run_peer
from tests.bench.measuring import markdown

_SPIN = "\nimport time as _t\nwhile _t.process_time() < {seconds}: pass\n"
_NEVER = 1e9


def samples_of(problems: Sequence[Problem], published: str, slow: bool) -> list[Sample]:
    """Published samples and answers, then slow ones where wanted."""
    found = [*read_samples(published, problems)]
    found += [Sample(problem.task_id, problem.canonical_solutions[0]) for problem in problems]
    if slow:
        for problem in problems[::25]:
            for seconds in (1.0, 3.0, _NEVER):
                found.append(Sample(problem.task_id, problem.canonical_solutions[0] + _SPIN.format(seconds=seconds)))
    return found


def peer_score(problems: Sequence[Problem], samples: Sequence[Sample], python: str, workers: int) -> float:
    """The share that passes the released way."""
    known = {problem.task_id: problem for problem in problems}
    with tempfile.TemporaryDirectory() as scratch:
        rows = Path(scratch) / "rows.jsonl"
        lines = [
            {"prompt": one.prompt, "completion": sample.completion, "test": one.test, "argument": one.entry_point or ""}
            for sample in samples
            for one in (known[sample.task_id],)
        ]
        rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
        result = run_peer("released", python, rows, workers, Path(scratch), timeout_s=3.0)
    return result["verdicts"].count("1") / result["samples"]


def main() -> None:
    """Run both loads on both sides."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--benchmarks", required=True, help="folder with PandasEval.jsonl.gz and the published samples")
    parser.add_argument("--times", type=int, default=8, help="processes a core, in the busy run")
    options = parser.parse_args()
    problems = read_problems(f"{options.benchmarks}/PandasEval.jsonl.gz")
    published = f"{options.benchmarks}/Example_Pandas_PYCODEGPT_samples.jsonl"
    python = build_environment(problems[0].requirements).python
    cores = len(os.sched_getaffinity(0))
    rows = []
    for workers in (cores, cores * options.times):
        config = ExecutionConfig(requirements=problems[0].requirements, workers=workers)
        ours = evaluate(problems, samples_of(problems, published, slow=True), config, k=(1,))
        peer = peer_score(problems, samples_of(problems, published, slow=False), python, workers)
        rows.append((workers, f"{100 * ours.pass_at_k[1]:.3f}", ours.outcomes, f"{100 * peer:.3f}"))
        print(rows[-1], flush=True)
    headers = [f"processes on {cores} cores", "pass@1, CPU-time limits", "outcomes", "passed, 3 s of wall time"]
    print(markdown(headers, rows))


if __name__ == "__main__":
    main()
