"""How a plain Ray task ends without a result: with an error of its own, or because its worker or node was lost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ray.exceptions import NodeDiedError, OutOfMemoryError, RayTaskError, WorkerCrashedError

from cert_ray.errors import CertRayError

# What Ray raises when a task's worker or node was lost and the task may not be run again.
LOST = (WorkerCrashedError, NodeDiedError, OutOfMemoryError)


@contextmanager
def own_errors() -> Iterator[None]:
    """Unwrap errors of tasks: a `CertRayError` that the block gets from Ray is raised without Ray's wrapping.

    Raises:
        CertRayError: as in the task.
        RayTaskError: with the traceback of any other error.
    """
    try:
        yield
    except RayTaskError as error:
        raise (error.cause if isinstance(error.cause, CertRayError) else error) from None
