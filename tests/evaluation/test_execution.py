"""Running many programs: order, sharing, and the same result however they are spread."""

from __future__ import annotations

from pathlib import Path

import pytest

from cert_ray.errors import ConfigError
from cert_ray.evaluation.execution import ExecutionConfig, execute_in_threads
from cert_ray.evaluation.sandbox import Outcome

pytestmark = pytest.mark.usefixtures("contained")

PROGRAMS = [f"print({n})\nassert {n} % 3, {n}" for n in range(40)] + ["x =", "import os; os._exit(0)", "print(0)"] * 2


def test_one_and_three_workers_give_the_same_executions_in_order() -> None:
    one = execute_in_threads(PROGRAMS, ExecutionConfig(workers=1))
    assert one == execute_in_threads(PROGRAMS, ExecutionConfig(workers=3))
    assert [run.outcome is Outcome.PASSED for run in one[:40]] == [n % 3 != 0 for n in range(40)]
    assert [run.output for run in one[:40]] == [f"{n}\n" for n in range(40)]


def test_no_programs_start_nothing() -> None:
    assert execute_in_threads([], ExecutionConfig()) == []


def test_equal_programs_share_one_run() -> None:
    program = "import os, time\nprint(time.monotonic_ns(), os.urandom(8))"
    assert len({run.output for run in execute_in_threads([program] * 5, ExecutionConfig(workers=2))}) == 1


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    config = ExecutionConfig(requirements=("numpy",), environment_cache=str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="environment_cache"):
        execute_in_threads(PROGRAMS, config)
