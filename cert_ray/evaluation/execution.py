"""Running many programs: their sources in, one `Execution` each out, in the same order.

`execute_in_threads` runs them on this machine, one sandbox per thread; `on_ray.execute_on_ray` does the same over a
cluster. Equal programs run once and share the outcome, which changes nothing for deterministic programs.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pydantic

from cert_ray.config import Config
from cert_ray.evaluation.environments import Environment, build_environment
from cert_ray.evaluation.programs import Program
from cert_ray.evaluation.sandbox import Execution, Limits, Sandbox


class ExecutionConfig(Config):
    """Where programs run, and within which limits."""

    requirements: tuple[str, ...] = ()  # pip requirements of the environment; empty: this interpreter's environment
    python: str | None = None  # a version ("3.11") or a path; None: chosen by the requirements
    environment_cache: str | None = None  # None: $XDG_CACHE_HOME/cert-ray/environments
    limits: Limits = Limits()
    workers: int | None = pydantic.Field(default=None, ge=1)  # None: one per core
    unsafe: bool = False  # run without bubblewrap, as this user
    unfiltered: bool = False  # run even where libseccomp is missing, without a filter of system calls

    @pydantic.model_serializer(mode="wrap")
    def _without_unfiltered(self, dump: pydantic.SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Dump `unfiltered` only if it is on: evaluations finished before the field existed must stay finished."""
        options: dict[str, Any] = dump(self)
        if not self.unfiltered:
            options.pop("unfiltered", None)
        return options

    def environment(self) -> Environment:
        """The environment, built on this machine if it is not there yet."""
        return build_environment(self.requirements, self.python, self.environment_cache)


Execute = Callable[[Sequence[Program | str], ExecutionConfig], list[Execution]]


def execute_in_threads(programs: Sequence[Program | str], config: ExecutionConfig) -> list[Execution]:
    """Run `programs` on this machine.

    Raises:
        SandboxError: when one of them could not be run at all; the others are then stopped.
    """
    distinct = list(dict.fromkeys(programs))
    workers = min(config.workers or os.cpu_count() or 1, max(1, len(distinct)))
    environment = config.environment()
    stopped = threading.Event()

    def run_share(first: int) -> list[tuple[Program | str, Execution]]:
        try:
            return run_in_one_sandbox(distinct[first::workers], environment, config, stopped)
        except BaseException:
            stopped.set()
            raise

    with ThreadPoolExecutor(workers, thread_name_prefix="sandbox") as pool:
        shares = [pool.submit(run_share, first) for first in range(workers)]
        try:
            outcomes = dict(pair for share in shares for pair in share.result())
        except BaseException:
            stopped.set()
            raise
    return [outcomes[program] for program in programs]


def run_in_one_sandbox(
    programs: Sequence[Program | str],
    environment: Environment,
    config: ExecutionConfig,
    stopped: threading.Event | None = None,
) -> list[tuple[Program | str, Execution]]:
    """Run `programs` one after the other in one sandbox of their own, until `stopped`."""
    with Sandbox(environment, config.limits, unsafe=config.unsafe, unfiltered=config.unfiltered) as sandbox:
        return [(program, sandbox.run(program)) for program in programs if stopped is None or not stopped.is_set()]
