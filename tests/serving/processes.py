"""The processes of Serve's replicas below this one, as the operating system knows them."""

from __future__ import annotations

from collections.abc import Callable

import psutil
import ray


def replicas(name: str) -> set[int]:
    """Of the deployment `name`, on this test's Ray."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        try:
            title = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if f"ServeReplica:cert-ray:{name}" in title:
            found.add(process.pid)
    return found


def wait_until(condition: Callable[[], bool]) -> None:
    """Until `condition`, watched by the test's own time-out."""
    while not condition():
        ray.wait([ray.put(0)], timeout=0.1)
