"""Spread over Ray, programs come to the same end as in this process."""

from __future__ import annotations

from pathlib import Path

import pytest

from cert_ray.errors import SandboxError
from cert_ray.evaluation import on_ray
from cert_ray.evaluation.execution import ExecutionConfig, execute_in_threads
from cert_ray.evaluation.on_ray import execute_on_ray
from cert_ray.evaluation.sandbox import Execution, Outcome
from tests.evaluation.builders import die_before
from tests.evaluation.test_execution import PROGRAMS

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("contained")]


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("workers", [1, 3, None])
def test_ray_gives_what_threads_give(workers: int | None) -> None:
    here = execute_in_threads(PROGRAMS, ExecutionConfig(workers=2))
    assert execute_on_ray(PROGRAMS, ExecutionConfig(workers=workers)) == here


@pytest.mark.usefixtures("ray_cluster")
def test_a_chunk_that_loses_its_worker_four_times_runs_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passed = Execution(Outcome.PASSED, "", "")

    def run_chunk(programs: list[str], config: ExecutionConfig) -> list[tuple[str, Execution]]:
        die_before(tmp_path, attempts=5)
        return [(program, passed) for program in programs]

    monkeypatch.setattr(on_ray, "_run_chunk", run_chunk)
    assert execute_on_ray(["pass"], ExecutionConfig()) == [passed]


@pytest.mark.usefixtures("ray_cluster")
def test_unsafe_programs_that_end_every_worker_end_the_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_chunk(programs: list[str], config: ExecutionConfig) -> list[tuple[str, Execution]]:
        die_before(tmp_path, attempts=99)
        return []

    monkeypatch.setattr(on_ray, "_run_chunk", run_chunk)
    with pytest.raises(SandboxError, match=r"lost 4 times.*without --unsafe"):
        execute_on_ray(["pass"], ExecutionConfig(unsafe=True))
    assert len((tmp_path / "calls").read_text()) == 4


@pytest.mark.usefixtures("ray_cluster")
def test_our_failures_arrive_as_themselves(tmp_path: Path) -> None:
    requirements = ("no-such-package-of-cert-ray==0.0.1",)
    config = ExecutionConfig(requirements=requirements, environment_cache=str(tmp_path))
    with pytest.raises(SandboxError, match="no-such-package"):
        execute_on_ray(["pass"], config)
