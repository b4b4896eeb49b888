"""Interpreters for candidate programs: requirements in, an isolated and verified virtual environment out.

A benchmark is written for certain library versions, which are rarely those of this process. `build_environment` makes
a virtual environment with exactly these, once per (requirements, interpreter), in a cache folder. From then on it
returns the finished one, also offline. `current_environment` is the one that this process runs in.

Not handled: system libraries, and packages without a wheel (nothing is compiled, so no set-up code runs).
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import xxhash

from cert_ray import storage
from cert_ray.errors import ConfigError, SandboxError

_RECIPE = 1  # part of the cache key: raise it when the way of building changes
_COMPLETE = "complete.json"
_PIP_TIMEOUT_S = 1200.0  # assumed: a slow network, a large wheel
_PROBE_TIMEOUT_S = 60.0
# The Python that a pinned library needs, if not this one: NumPy 1.23 has wheels for 3.8 to 3.11 (PyPI).
_PYTHON_OF = {"numpy==1.23": "3.11", "numpy==1.22": "3.10", "numpy==1.21": "3.9", "pandas==1.5": "3.11"}
_REQUIREMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(\[[A-Za-z0-9,._ -]+\])?\s*([<>=!~]=?[^;\s@]+|===?[^;\s@]+)?")

# Runs in the new environment: imports what each requirement provides, and prints versions and import names.
_VERIFY = """
import importlib, importlib.metadata as metadata, json, sys, warnings
warnings.simplefilter("ignore")
packages, imports = {}, []
for name in sys.argv[1:]:
    distribution = metadata.distribution(name)
    packages[name] = distribution.version
    listed = (distribution.read_text("top_level.txt") or "").split()
    tops = {path.parts[0] for path in distribution.files or () if path.suffix == ".py" and len(path.parts) > 1}
    names = listed or sorted(tops)
    for top in names:
        if top.isidentifier() and not top.startswith("_"):
            importlib.import_module(top)
            imports.append(top)
print(json.dumps({"packages": packages, "imports": imports, "python": sys.version.split()[0]}))
"""


@dataclass(frozen=True, slots=True)
class Environment:
    """An interpreter, and the folders that it must be able to read: all that a sandbox has to show of this disk."""

    python: str
    python_version: str
    readable: tuple[str, ...]
    preload: tuple[str, ...]  # import names of the required packages, loaded once for many programs
    packages: tuple[tuple[str, str], ...]  # name and version of each required package


def current_environment() -> Environment:
    """The environment of this process, with no libraries preloaded."""
    readable = _prefixes(sys.executable, sys.prefix, sys.base_prefix)
    return Environment(sys.executable, platform.python_version(), readable, (), ())


def build_environment(
    requirements: tuple[str, ...], python: str | None = None, cache: str | None = None
) -> Environment:
    """The environment that holds `requirements`, built in `cache` unless it is already there.

    `python` is a version ("3.11") or the path of an interpreter; None chooses by the requirements, else this
    interpreter's version. `cache` defaults to `$XDG_CACHE_HOME/cert-ray/environments`. Without requirements and
    `python`, it is the current environment. Two builders of the same environment wait for each other.

    Raises:
        ConfigError: for a requirement that is not `name` or `name==version`, or a Python that cannot be found.
        SandboxError: when building or importing fails, with the end of pip's output.
    """
    if not requirements and python is None:
        return current_environment()
    wanted = tuple(sorted(_checked(requirement) for requirement in requirements))
    interpreter, version = find_interpreter(python or _python_for(wanted))
    folder = _cache_folder(cache) / _key(wanted, interpreter, version)
    if not (folder / _COMPLETE).is_file():
        with _locked(folder.with_name(f"{folder.name}.lock")):
            if not (folder / _COMPLETE).is_file():
                try:
                    _build(folder, interpreter, wanted)
                except BaseException:
                    shutil.rmtree(folder, ignore_errors=True)
                    raise
    return _load(folder)


def find_interpreter(wanted: str) -> tuple[str, str]:
    """Path and full version of the interpreter `wanted`: a version such as "3.11", or a path.

    Looks at this interpreter, then PATH, then pyenv's and uv's folders.

    Raises:
        ConfigError: when none that starts is found; says how to install one.
    """
    if "/" in wanted:
        version = _version_of(wanted)
        if version is None:
            raise ConfigError(f"python: {wanted} is not a Python interpreter that starts. Give a version, or its path.")
        return wanted, version
    if not re.fullmatch(r"3\.\d+(\.\d+)?", wanted):
        raise ConfigError(f'python: {wanted!r} is neither a version such as "3.11" nor a path with a slash in it.')
    for candidate in _candidates(wanted):
        version = _version_of(candidate)
        if version is not None and (version + ".").startswith(wanted + "."):
            return candidate, version
    raise ConfigError(
        f"python: no Python {wanted} on PATH, in ~/.pyenv/versions or in uv's folder. Install one "
        f"(`apt-get install python{wanted}-venv`, `pyenv install {wanted}` or `uv python install {wanted}`), "
        "or name one with --python PATH."
    )


def _candidates(wanted: str) -> Iterator[str]:
    yield sys.executable
    short = ".".join(wanted.split(".")[:2])
    on_path = shutil.which(f"python{short}")
    if on_path:
        yield on_path
    home = Path.home()
    pyenv = Path(os.environ.get("PYENV_ROOT", home / ".pyenv")) / "versions"
    uv = Path(os.environ.get("XDG_DATA_HOME", home / ".local" / "share")) / "uv" / "python"
    for root, pattern in ((pyenv, f"{wanted}*/bin/python"), (uv, f"cpython-{wanted}*/bin/python{short}")):
        if root.is_dir():
            yield from sorted(map(str, root.glob(pattern)), reverse=True)


def _version_of(interpreter: str) -> str | None:
    code = "import sys; print(sys.version.split()[0])"
    try:
        done = _run([interpreter, "-I", "-c", code], _PROBE_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _python_for(requirements: tuple[str, ...]) -> str:
    for requirement in requirements:
        for pin, version in _PYTHON_OF.items():
            if (requirement + ".").startswith(pin + "."):
                return version
    return ".".join(platform.python_version_tuple()[:2])


def _checked(requirement: str) -> str:
    stripped = requirement.strip()
    if not _REQUIREMENT.fullmatch(stripped):
        raise ConfigError(f"requirements: {requirement!r} is not of the form `name` or `name==version`.")
    return stripped.replace(" ", "")


def _cache_folder(cache: str | None) -> Path:
    if cache is not None:
        return storage.local_path(cache).absolute()
    return storage.cache_folder("environments")


def _key(requirements: tuple[str, ...], interpreter: str, version: str) -> str:
    facts = [_RECIPE, requirements, version, os.path.realpath(interpreter), platform.machine()]
    digest = xxhash.xxh3_64_hexdigest(json.dumps(facts).encode())
    return f"py{'.'.join(version.split('.')[:2])}-{digest}"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`; the kernel frees it when its holder dies."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        raise ConfigError(f"environment_cache: cannot write to {path.parent}: {error}. Name another folder.") from error
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _build(folder: Path, interpreter: str, requirements: tuple[str, ...]) -> None:
    """Make the environment in its final place; it counts only once `_COMPLETE` has been renamed into it."""
    shutil.rmtree(folder, ignore_errors=True)  # what a killed builder left
    _step([interpreter, "-m", "venv", str(folder)], "making a virtual environment")
    python = str(folder / "bin" / "python")
    pip = [python, "-m", "pip", "install", "--no-input", "--disable-pip-version-check", "--only-binary=:all:"]
    if requirements:
        _step([*pip, *requirements], f"installing {' '.join(requirements)}")
    names = [re.split(r"[\[<>=!~ ]", requirement)[0] for requirement in requirements]
    report = _step([python, "-I", "-c", _VERIFY, *names], f"importing {' '.join(names)}")
    prefix = _step([python, "-I", "-c", "import sys; print(sys.base_prefix)"], "starting it").strip()
    facts = {**json.loads(report.splitlines()[-1]), "base_prefix": prefix}
    storage.write_text(str(folder / _COMPLETE), json.dumps(facts, indent=1) + "\n")


def _load(folder: Path) -> Environment:
    facts = json.loads((folder / _COMPLETE).read_text())
    python = str(folder / "bin" / "python")
    readable = _prefixes(python, str(folder), facts["base_prefix"])
    packages = tuple(sorted(facts["packages"].items()))
    return Environment(python, facts["python"], readable, tuple(facts["imports"]), packages)


def _prefixes(python: str, *prefixes: str) -> tuple[str, ...]:
    """`prefixes`, also with links resolved, and the prefix of the interpreter that `python` links to."""
    real = Path(python).resolve().parent.parent
    found = [*prefixes, *(os.path.realpath(prefix) for prefix in prefixes), str(real)]
    return tuple(dict.fromkeys(found))


def _step(command: list[str], doing: str) -> str:
    try:
        done = _run(command, _PIP_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SandboxError(f"{doing} failed: {error}. Check the interpreter and the network.") from error
    if done.returncode != 0:
        words = (done.stderr.strip() or done.stdout.strip())[-1500:]
        raise SandboxError(
            f"{doing} failed (`{' '.join(command[:4])} ...` exited with {done.returncode}):\n{words}\n"
            "Check the network and the versions; older libraries need an older interpreter (--python 3.11)."
        )
    return done.stdout


def _run(command: list[str], timeout_s: float) -> subprocess.CompletedProcess[str]:
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__")
    inherited = {name: value for name, value in os.environ.items() if name not in hidden}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=inherited, check=False)
