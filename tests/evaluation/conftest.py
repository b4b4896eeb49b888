"""Shared by the tests of evaluation: whether this machine can contain a program."""

from __future__ import annotations

import os

import pytest

from cert_ray.evaluation.sandbox import missing_protection, why_no_sandbox


@pytest.fixture(scope="session")
def contained() -> None:
    """A program ran in the sandbox; CI has all that this takes, a user may not, nor may a container of his."""
    missing = missing_protection()
    problem = f"{' and '.join(missing)} not installed" if missing else why_no_sandbox()
    if problem is not None:
        if os.environ.get("CI") == "true":
            pytest.fail(f"no sandbox: {problem}, and CI=true")
        pytest.skip(f"needs the sandbox: {problem}")
