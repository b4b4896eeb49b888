"""The same as `execution.execute_in_threads`, spread over a Ray cluster: chunks of programs, one sandbox per task.

Each node needs bubblewrap and libseccomp (or `unsafe`, `unfiltered`), and builds the environment for itself at its
first task. A task whose worker or node is lost runs again elsewhere, without limit, as in preprocessing; under `unsafe`
only three times, since there generated code itself can end one worker after the other. An error that a task raises ends
the evaluation at once. Chunks follow the order of the programs, so the result does not depend on the workers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import ray

from cert_ray.errors import SandboxError
from cert_ray.evaluation.execution import ExecutionConfig, run_in_one_sandbox
from cert_ray.evaluation.programs import Program
from cert_ray.evaluation.sandbox import Execution
from cert_ray.on_ray import LOST, own_errors
from cert_ray.telemetry.on_ray import count_programs

_CHUNK_PROGRAMS = 32  # measured on 2 cores: starting a sandbox with pandas costs what 40 programs cost (0.5 s, 12 ms)
_UNSAFE_RETRIES = 3  # assumed: when one chunk is lost more often, its programs are to blame, not the nodes


def execute_on_ray(programs: Sequence[Program | str], config: ExecutionConfig) -> list[Execution]:
    """Run `programs` as Ray tasks of one CPU each; at most `config.workers` at once, if given.

    Raises:
        SandboxError: when one of them could not be run at all or, with `config.unsafe`, its worker was lost four times.
    """
    distinct = list(dict.fromkeys(programs))
    chunks = [distinct[start : start + _CHUNK_PROGRAMS] for start in range(0, len(distinct), _CHUNK_PROGRAMS)]
    retries = _UNSAFE_RETRIES if config.unsafe else -1
    task = ray.remote(_run_chunk).options(num_cpus=1, max_retries=retries)
    outcomes: dict[Program | str, Execution] = {}
    waiting = list(reversed(chunks))
    running: list[ray.ObjectRef] = []
    try:
        while waiting or running:
            while waiting and (config.workers is None or len(running) < config.workers):
                running.append(task.remote(waiting.pop(), config))
            done, running = ray.wait(running, num_returns=1)
            ended = _outcomes(done[0])
            count_programs(Counter(str(execution.outcome) for _, execution in ended))
            outcomes.update(ended)
    finally:
        for reference in running:
            ray.cancel(reference, force=True)
    return [outcomes[program] for program in programs]


def _outcomes(chunk: ray.ObjectRef) -> list[tuple[Program | str, Execution]]:
    try:
        with own_errors():
            found: list[tuple[Program | str, Execution]] = ray.get(chunk)
    except LOST as error:
        raise SandboxError(
            f"--unsafe: a worker that runs up to {_CHUNK_PROGRAMS} programs was lost {_UNSAFE_RETRIES + 1} times. "
            "Without bubblewrap a program can end its worker; run without --unsafe, where it cannot. If nodes were "
            "lost or ran out of memory (Ray's log says so), run it again with fewer CPUs per node."
        ) from error
    return found


def _run_chunk(programs: list[Program | str], config: ExecutionConfig) -> list[tuple[Program | str, Execution]]:
    return run_in_one_sandbox(programs, config.environment(), config)
