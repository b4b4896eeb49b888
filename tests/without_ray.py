"""What preprocessing asks of Ray, done by an executor of Python's: a process pool, or this process itself."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from cert_ray.corpus import on_ray as corpus_on_ray
from cert_ray.dataset import on_ray as dataset_on_ray
from cert_ray.dedup import on_ray as dedup_on_ray


@contextmanager
def without_ray(executor: Executor, run_units: Callable[..., Any]) -> Iterator[None]:
    """In the block `run_units` runs the units of every stage, and `executor` the tasks of dedup."""
    with ExitStack() as stack:
        for module in (corpus_on_ray, dedup_on_ray, dataset_on_ray):
            stack.enter_context(mock.patch.object(module, "run_units", run_units))
        stack.enter_context(mock.patch.object(dedup_on_ray, "ray", _ExecutorRay(executor)))
        yield


class Inline(Executor):
    """Runs a task when it is submitted, in the caller."""

    def submit(self, work: Callable[..., Any], /, *args: Any, **options: Any) -> Future[Any]:
        """A future that is done; what `work` raises comes at once."""
        future: Future[Any] = Future()
        future.set_result(work(*args, **options))
        return future


class _ExecutorRay:
    """The calls of Ray that dedup makes."""

    ObjectRef = Future

    def __init__(self, executor: Executor) -> None:
        self._executor = executor

    def remote(self, work: Callable[..., Any]) -> Any:
        submit = functools.partial(self._executor.submit, work)
        task = mock.Mock(spec=["options", "remote"], remote=submit)
        task.options.return_value = task
        return task

    @staticmethod
    def put(value: Any) -> Any:
        return value

    @staticmethod
    def get(pending: Any) -> Any:
        return [future.result() for future in pending] if isinstance(pending, list) else pending.result()
