"""`cert-ray doctor`: is this machine fit for what it is asked to do, and if not, what to do about it.

In: nothing but this process's machine. Out: `Finding`s. Starts nothing but a harmless program in the sandbox, changes
nothing, and talks to no other machine.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import psutil


class Level(StrEnum):
    """How much a finding matters."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """One check: what was looked at, what was found, and what to do about it (empty when all is well)."""

    name: str
    level: Level
    found: str
    advice: str = ""


_PACKAGES = ("ray", "torch", "transformers", "tokenizers", "deepspeed", "pyarrow", "xxhash")
_GIB = 1 << 30
# Assumed: room for two training workers (about 1 GiB resident each in the demo), Ray itself, and the system.
_MEMORY_WANTED_BYTES = 6 * _GIB
_SHARED_MEMORY_WANTED_BYTES = 2 * _GIB
_DISK_WANTED_BYTES = 5 * _GIB


def examine(folder: str = ".") -> list[Finding]:
    """Every finding, in a fixed order; the disk checked is that of `folder`."""
    checks: list[Callable[[], Finding]] = [
        _python,
        *(lambda name=name: _package(name) for name in _PACKAGES),
        _accelerator,
        _cpu,
        _memory,
        _shared_memory,
        lambda: _disk(folder),
        _ray_authentication,
        _sandbox,
    ]
    return [check() for check in checks]


def _python() -> Finding:
    found = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < (3, 11):  # noqa: UP036 - a report must not depend on what installed it
        return Finding("python", Level.FAIL, found, "Install Python 3.11 or newer.")  # type: ignore[unreachable]
    return Finding("python", Level.OK, found)


def _package(name: str) -> Finding:
    try:
        return Finding(name, Level.OK, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, Level.FAIL, "not installed", "pip install -c constraints.txt -e .")


def _accelerator() -> Finding:
    if importlib.util.find_spec("torch") is None:
        return Finding("accelerator", Level.FAIL, "torch is missing", "pip install -c constraints.txt -e .")
    import torch

    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())}
        return Finding("accelerator", Level.OK, f"{torch.cuda.device_count()} x {', '.join(sorted(names))}")
    return Finding(
        "accelerator", Level.WARN, "no GPU that CUDA sees",
        "Fine for `demo` and preprocessing. To train a 110M model, use a GPU and `use_gpu: true`.",
    )  # fmt: skip


def _cpu() -> Finding:
    """How fast one thread multiplies. A slow machine is not a fault, so this is never a warning."""
    if importlib.util.find_spec("torch") is None:
        return Finding("cpu", Level.OK, "not measured without torch")
    from cert_ray.training import cpu_speed

    measured = cpu_speed.measure()
    speeds = ", ".join(f"{name} {flops / 1e9:.0f}" for name, flops in measured.items())
    faster = max(measured, key=measured.__getitem__)
    return Finding("cpu", Level.OK, f"{speeds} GFLOP/s a thread: {faster} trains faster")


def _memory() -> Finding:
    available = psutil.virtual_memory().available
    return _amount("memory", available, _MEMORY_WANTED_BYTES, "Close other programs, or lower `workers`.")


def _shared_memory() -> Finding:
    if not Path("/dev/shm").is_dir():
        return Finding("shared memory", Level.WARN, "no /dev/shm", "Ray will put its object store on disk and be slow.")
    free = shutil.disk_usage("/dev/shm").free
    return _amount("shared memory", free, _SHARED_MEMORY_WANTED_BYTES, "In a container, give it `--shm-size=4g`.")


def _disk(folder: str) -> Finding:
    return _amount("disk", shutil.disk_usage(folder).free, _DISK_WANTED_BYTES, f"Free some space below {folder!r}.")


def _amount(name: str, free_bytes: int, wanted_bytes: int, advice: str) -> Finding:
    found = f"{free_bytes / _GIB:.1f} GiB free"
    if free_bytes >= wanted_bytes:
        return Finding(name, Level.OK, found)
    return Finding(name, Level.WARN, found, f"Less than {wanted_bytes / _GIB:.0f} GiB. {advice}")


def _ray_authentication() -> Finding:
    mode = os.environ.get("RAY_AUTH_MODE", "")
    token = (
        bool(os.environ.get("RAY_AUTH_TOKEN"))
        or Path(os.environ.get("RAY_AUTH_TOKEN_PATH", Path.home() / ".ray" / "auth_token")).expanduser().is_file()
    )
    if mode == "token" and token:
        return Finding("ray authentication", Level.OK, "token")
    if token:
        return Finding(
            "ray authentication", Level.WARN, "a token exists, but RAY_AUTH_MODE is not set",
            "export RAY_AUTH_MODE=token before `ray start`; a Ray that cert-ray starts uses the token anyway.",
        )  # fmt: skip
    return Finding(
        "ray authentication", Level.WARN, "no token",
        "Ray would accept anyone: first `ray get-auth-token --generate` and `export RAY_AUTH_MODE=token`.",
    )  # fmt: skip


def _sandbox() -> Finding:
    from cert_ray.evaluation.sandbox import find_bubblewrap, missing_protection, why_no_sandbox

    if missing := missing_protection():
        return Finding("sandbox", Level.WARN, f"without {' and '.join(missing)}", advise_protection(missing))
    if (problem := why_no_sandbox()) is not None:
        return Finding("sandbox", Level.WARN, f"does not start: {problem}", START_SANDBOX)
    return Finding("sandbox", Level.OK, f"{find_bubblewrap()} and a filter of system calls: a program ran in it")


# What to do when all packages are there but the sandbox does not start.
START_SANDBOX = (
    "In docker: --security-opt seccomp=unconfined --security-opt systempaths=unconfined; in a pod: docs/operating.md. "
    "Otherwise `evaluate` needs --unsafe: use that only in a container or pod of its own."
)


def advise_protection(missing: Sequence[str]) -> str:
    """What to do when generated code cannot be contained, because these packages are missing."""
    options = {"bubblewrap": "--unsafe", "libseccomp2": "--unfiltered", "pyseccomp": "--unfiltered"}
    told = " ".join(options[package] for package in missing)
    return f"{_installed(missing)}: otherwise `evaluate` runs generated code only with {told}."


def advise_filter(missing: Sequence[str]) -> str:
    """What to do when an evaluation was told to run generated code without a filter of system calls."""
    return f"{_installed(missing)}, and leave --unfiltered out."


def _installed(packages: Sequence[str]) -> str:
    ways = [f"{'pip' if package == 'pyseccomp' else 'apt-get'} install {package}" for package in packages]
    return " and ".join(ways)
