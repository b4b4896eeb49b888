"""Marks of tests that run Ray Data on the suite's cluster."""

from __future__ import annotations

import pytest

RAY_DATA = [
    pytest.mark.ray,
    pytest.mark.usefixtures("ray_cluster"),
    # Ray Data leaves the closing of its sockets and logs to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
    pytest.mark.filterwarnings("ignore::FutureWarning:ray"),
]
