"""Joining or starting Ray, for the verbs that need it."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import ray

logger = logging.getLogger(__name__)

# One thread per process: Ray runs as many processes as there are cores.
_WORKER_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


@contextmanager
def ray_session(address: str | None = None) -> Iterator[None]:
    """Ray for the length of a block: the cluster of `address` or of a submitted job, else a private one, stopped after.

    A private Ray listens on loopback and makes its own token. `ray.init()` alone would join any cluster that happens to
    run on this machine, so "local" is asked for by name.
    """
    if ray.is_initialized():
        yield
        return
    target = address or os.environ.get("RAY_ADDRESS")
    if target:
        ray.init(address=target)
        logger.info("ray: joined %s", target)
        try:
            yield
        finally:
            ray.shutdown()
        return
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    with tempfile.TemporaryDirectory(prefix="cr", ignore_cleanup_errors=True) as folder:  # short: sockets lie below it
        ray.init(
            address="local",
            include_dashboard=True,  # on loopback; Ray Train asks its state API every second, and warns without it
            log_to_driver=True,  # a training worker tells its steps on its own stderr
            _temp_dir=folder,
            runtime_env={"env_vars": _WORKER_ENVIRONMENT},
        )
        resources = ray.cluster_resources()
        logger.info("ray: private, cpus=%d memory_gb=%.1f", resources["CPU"], resources["memory"] / 1e9)
        try:
            yield
        finally:
            ray.shutdown()
