"""Small benchmarks and stand-ins for models and the sandbox."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path

from cert_ray.evaluation.execution import ExecutionConfig
from cert_ray.evaluation.programs import Program
from cert_ray.evaluation.sandbox import Execution, Outcome


def write_problems(path: Path, count: int, name: str = "T") -> str:
    """`count` problems; number i wants x to be i."""
    rows = [
        {
            "task_id": f"{name}/{n}",
            "prompt": f"# {n}\nx =",
            "entry_point": "none",
            "test": f"def check(): assert x == {n}",
            "canonical_solution": [f" {n}"],
        }
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def in_this_process(programs: Sequence[Program | str], config: ExecutionConfig | None = None) -> list[Execution]:
    """A stand-in for the sandbox, for programs that a test wrote itself."""
    return [_run(program if isinstance(program, str) else program.text) for program in programs]


def die_before(folder: Path, attempts: int) -> int:
    """End this process, as a lost one does, in all of `attempts` calls but the last, which gives their number."""
    calls = folder / "calls"
    with calls.open("a") as stream:
        stream.write("x")
    if (made := len(calls.read_text())) < attempts:
        os.kill(os.getpid(), signal.SIGKILL)
    return made


def _run(text: str) -> Execution:
    try:
        exec(text, {})
    except Exception as error:  # noqa: BLE001 - as a sandbox does
        return Execution(Outcome.FAILED, f"{type(error).__name__}: {error}", "")
    return Execution(Outcome.PASSED, "", "")
