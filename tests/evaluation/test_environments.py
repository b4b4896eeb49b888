"""Environments: refusals, the search for an interpreter, and what the cache guarantees."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cert_ray.errors import ConfigError, SandboxError
from cert_ray.evaluation import environments
from cert_ray.evaluation.environments import build_environment, current_environment, find_interpreter

HERE = f"{sys.version_info.major}.{sys.version_info.minor}"


@pytest.mark.parametrize(
    "requirement", ["", "--index-url=http://x", "-r x", "a b", "../x", "git+https://x/y", "a @ http://x", "a; b"]
)
def test_only_names_and_versions_are_requirements(requirement: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="requirements"):
        build_environment((requirement,), cache=str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_without_requirements_it_is_this_environment() -> None:
    assert build_environment(()) == current_environment()
    assert current_environment().python == sys.executable


def test_an_interpreter_is_found_by_version_or_path() -> None:
    path, version = find_interpreter(HERE)
    assert version.startswith(HERE + ".")
    assert find_interpreter(path) == (path, version)


@pytest.mark.parametrize("wanted", ["3.99", "2", "python3", "/bin/sh", "/nowhere/python"])
def test_an_interpreter_that_is_not_there_is_refused_with_a_cure(wanted: str) -> None:
    with pytest.raises(ConfigError, match=r"Install one|Give a version|such as"):
        find_interpreter(wanted)


def test_older_numpy_asks_for_an_older_python() -> None:
    assert environments._python_for(("numpy==1.23.5", "pandas==1.5.3")) == "3.11"
    assert environments._python_for(("requests",)) == HERE


@pytest.mark.slow
def test_two_builders_make_one_environment_and_a_half_built_one_is_made_again(tmp_path: Path) -> None:
    found: list[environments.Environment] = []

    def build() -> None:
        found.append(build_environment((), python=HERE, cache=str(tmp_path)))

    builders = [threading.Thread(target=build) for _ in range(2)]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join()
    assert len(found) == 2
    assert found[0] == found[1]
    folder = Path(found[0].python).parent.parent
    (folder / "complete.json").unlink()  # as if its builder had been killed
    (folder / "bin" / "python").unlink()
    assert build_environment((), python=HERE, cache=str(tmp_path)) == found[0]
    assert subprocess.run([found[0].python, "-c", ""], check=False).returncode == 0


@pytest.mark.slow
def test_what_cannot_be_installed_says_why_and_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # as without a network
    with pytest.raises(SandboxError, match="installing some-package==1"):
        build_environment(("some-package==1",), cache=str(tmp_path))
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]
