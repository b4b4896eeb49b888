"""Shared by every test: the one Ray of the suite, and the data that stands outside the project."""

from __future__ import annotations

import faulthandler
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"

# Before torch, numpy or Ray's workers start: two cores, several processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# The same examples in every run: a change that passes here passes there. Search further by hand, with
# `pytest --hypothesis-profile=search`.
hypothesis.settings.register_profile("same", derandomize=True, deadline=None)
hypothesis.settings.register_profile("search", max_examples=2_000, deadline=None)
hypothesis.settings.load_profile("same")


def pytest_configure() -> None:
    # Of a crash in native code, the thread that it happened in: pytest's own plugin shows all, the newest first, and
    # what is kept of a long log ends before the one that matters. A copy, since pytest puts files in stderr's place.
    faulthandler.enable(os.dup(2), all_threads=False)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Benchmarks and cases that are not part of the project; CI has them, a user does not."""
    if not SHARED.is_dir():
        if os.environ.get("CI") == "true":
            pytest.fail(f"{SHARED} is missing, and CI=true")
        pytest.skip(f"needs the benchmark data beside the checkout, at {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def contained() -> None:
    """A program ran in the sandbox; CI has all that this takes, a user may not, nor may a container of his."""
    from cert_ray.evaluation.sandbox import missing_protection, why_no_sandbox

    missing = missing_protection()
    problem = f"{' and '.join(missing)} not installed" if missing else why_no_sandbox()
    if problem is not None:
        if os.environ.get("CI") == "true":
            pytest.fail(f"no sandbox: {problem}, and CI=true")
        pytest.skip(f"needs the sandbox: {problem}")


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local Ray for the whole suite: four logical CPUs, whatever the machine has."""
    import ray

    with tempfile.TemporaryDirectory(prefix="cr") as folder:  # short: Ray puts sockets below it
        ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            object_store_memory=512 << 20,
            _temp_dir=folder,
            log_to_driver=False,
            configure_logging=False,
        )
        yield
        ray.shutdown()
