"""The program inside the sandbox: loads libraries once, then forks one supervised child per candidate program.

In: settings as JSON in argv[1], then framed jobs on descriptor 0. Out: framed answers on descriptor 1. `sandbox` is the
other end. It runs under the environment's own interpreter, so it needs only the standard library of Python 3.8.

    zygote (waits for jobs; never runs candidate code)
    `-- supervisor, one per job (namespaces, deadline, output limit; gives the answer)
        `-- candidate (limits, no descriptors but its own, no capabilities; runs the program, then writes the verdict)

With `nested`, the candidate is the first process of its own user, PID, mount and IPC namespaces: it cannot see or
signal the supervisor, its files vanish with it, and when it ends the kernel kills what it left behind. Without, the
supervisor adopts and kills what is left, and a whole sandbox serves one job only (`sandbox` sees to that).

The verdict counts only with a random token that the candidate's process writes after the program's last line. What
the program does to itself stays possible: it runs in the process that judges it (`sandbox.KNOWN_LIMITS`).
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import math
import os
import resource
import select
import shutil
import signal
import struct
import sys
import tempfile
import time
import types
import warnings
from typing import Any, NoReturn

_CLONE_FLAGS = 0x10000000 | 0x00020000 | 0x20000000 | 0x08000000  # NEWUSER, NEWNS, NEWPID, NEWIPC
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 1, 2, 4, 4096, 16384, 1 << 18
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 1, 4, 36, 38
_CAPABILITY_VERSION_3 = 0x20080522
_KEPT_OUTPUT_BYTES = 8192
_KEPT_DETAIL_CHARS = 2000
_VERDICT_BYTES = 1 << 16
_TICK_S = 0.02  # how late the end of a candidate whose descendants hold its pipes may be seen
_SET_UP, _NOT_SET_UP = b"\x01", b"\x00"

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: Any) -> None:
    if getattr(_libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def send(descriptor: int, message: dict[str, Any]) -> None:
    """Write one frame: four bytes of length, then JSON."""
    payload = json.dumps(message).encode()
    view = memoryview(struct.pack("<I", len(payload)) + payload)
    while view:
        view = view[os.write(descriptor, view) :]


def _receive(descriptor: int) -> dict[str, Any] | None:
    header = _read_exactly(descriptor, 4)
    if header is None:
        return None
    payload = _read_exactly(descriptor, struct.unpack("<I", header)[0])
    return None if payload is None else json.loads(payload)


def _read_exactly(descriptor: int, size: int) -> bytes | None:
    parts = b""
    while len(parts) < size:
        part = os.read(descriptor, size - len(parts))
        if not part:
            return None
        parts += part
    return parts


def main() -> None:
    """Load the libraries, say so, then answer jobs until their pipe is closed."""
    settings = json.loads(sys.argv[1])
    jobs, answers = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(2, 1)
    os.close(null)
    if settings["user"] is not None:  # root outside: the limit on processes does not hold for root
        os.setgroups([])
        os.setresgid(settings["user"], settings["user"], settings["user"])
        os.setresuid(settings["user"], settings["user"], settings["user"])
    # Nested, /proc/self/uid_map has to be ours; else nobody of the same user may look into this process.
    _call("prctl", _PR_SET_DUMPABLE, 1 if settings["nested"] else 0, 0, 0, 0)
    del sys.path[0]  # this file's folder
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in settings["preload"]:
            importlib.import_module(name)
    gc.freeze()
    send(answers, {"ready": True})
    while True:
        job = _receive(jobs)
        if job is None:
            return
        pid = os.fork()
        if pid == 0:
            os.close(jobs)
            _supervise(job, settings, answers)
        if os.waitpid(pid, 0)[1] != 0:
            send(answers, {"ended": "the supervisor was killed"})


def _supervise(job: dict[str, Any], settings: dict[str, Any], answers: int) -> NoReturn:
    """Run one job in a child of this process, answer, and exit."""
    try:
        answer = _run_supervised(job, settings)
    except BaseException as error:  # noqa: BLE001 - a process boundary: the other side raises SandboxError from it
        answer = {"broken": f"{type(error).__name__}: {error}"}
    send(answers, answer)
    os._exit(0)


def _run_supervised(job: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    os.setsid()
    token = os.urandom(16)
    verdict_read, verdict_write = os.pipe()
    output_read, output_write = os.pipe()
    folder = None
    if settings["nested"]:
        _enter_namespaces()
    else:
        _call("prctl", _PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        folder = tempfile.mkdtemp(dir=settings["box"])
    pid = os.fork()
    if pid == 0:
        _become_candidate(job["program"], settings, token, verdict_write, output_write, folder)
    os.close(verdict_write)
    os.close(output_write)
    try:
        watched = _watch(pid, verdict_read, output_read, settings["limits"])
    finally:
        if not settings["nested"]:
            _kill_adopted()
            shutil.rmtree(str(folder), ignore_errors=True)
    return _answer(watched, token, settings["limits"])


def _enter_namespaces() -> None:
    """Own user, mount, PID (for the next fork) and IPC namespaces, with the same user number inside."""
    user, group = os.getuid(), os.getgid()
    _call("unshare", _CLONE_FLAGS)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with open(f"/proc/self/{name}", "w") as stream:  # noqa: PTH123 - one write, no newline handling wanted
            stream.write(text)


def _become_candidate(
    program: str, settings: dict[str, Any], token: bytes, verdict: int, output: int, folder: str | None
) -> NoReturn:
    """In the child: shut every door, then run `program`. Never returns."""
    try:
        _call("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        os.setsid()  # a signal to its process group reaches nobody else, in whatever namespace
        _move_descriptors(verdict, output)
        if settings["nested"]:
            _mount_private(settings)
        os.chdir(settings["box"] if folder is None else folder)
        _drop_capabilities()
        _set_limits(settings["limits"], settings["nested"])
    except BaseException as error:  # noqa: BLE001 - a process boundary: reported by the supervisor as broken
        os.write(3, _NOT_SET_UP + f"{type(error).__name__}: {error}".encode())
        os._exit(1)
    os.write(3, _SET_UP)
    _run(program, token)


def _move_descriptors(verdict: int, output: int) -> None:
    """0 is empty, 1 and 2 are the output pipe, 3 the verdict's; everything else is closed."""
    moved, shown = os.dup(verdict), os.dup(output)
    while moved <= 3:  # keep it clear of the places to be filled
        moved = os.dup(moved)
    while shown <= 3:
        shown = os.dup(shown)
    os.dup2(moved, 3, inheritable=False)
    os.dup2(shown, 1)
    os.dup2(shown, 2)
    os.closerange(4, 1024)


def _mount_private(settings: dict[str, Any]) -> None:
    """An empty, bounded file system to write to, and nothing to see of other processes."""
    _call("mount", None, b"/", None, _MS_REC | _MS_PRIVATE, None)
    size = f"size={settings['limits']['file_bytes']},mode=0700".encode()
    box = os.fsencode(settings["box"])
    _call("mount", b"tmpfs", box, b"tmpfs", _MS_NOSUID | _MS_NODEV, size)
    _call("mount", b"tmpfs", b"/dev/shm", b"tmpfs", _MS_NOSUID | _MS_NODEV, size)
    _call("mount", b"tmpfs", b"/proc", b"tmpfs", _MS_NOSUID | _MS_NODEV | _MS_RDONLY, b"size=4096,mode=0555")
    if settings["cover_tmp"]:
        _call("mount", box, b"/tmp", None, _MS_BIND, None)


def _drop_capabilities() -> None:
    _call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    header = struct.pack("<Ii", _CAPABILITY_VERSION_3, 0)
    _call("capset", header, struct.pack("<6I", 0, 0, 0, 0, 0, 0))


def _set_limits(limits: dict[str, Any], nested: bool) -> None:
    used = resource.getrusage(resource.RUSAGE_SELF)
    cpu_s = math.ceil(used.ru_utime + used.ru_stime) + limits["cpu_time_s"]
    processes = limits["processes"] if nested else limits["processes"] + _own_threads()
    for name, value in (
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_AS, limits["memory_bytes"]),
        (resource.RLIMIT_FSIZE, limits["file_bytes"]),
        (resource.RLIMIT_NPROC, processes),
        (resource.RLIMIT_NOFILE, 256),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(name)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(name, (value, value))


def _own_threads() -> int:
    """Threads of this user that can be seen: the kernel counts them against the limit on processes."""
    count = 0
    for name in os.listdir("/proc"):  # noqa: PTH208
        try:
            if name.isdigit() and os.stat(f"/proc/{name}").st_uid == os.getuid():  # noqa: PTH116
                count += len(os.listdir(f"/proc/{name}/task"))  # noqa: PTH208
        except OSError:  # it ended meanwhile
            continue
    return count


def _run(program: str, token: bytes) -> NoReturn:
    """Execute `program` as a module of its own; write the verdict; exit without running anything of it again."""
    write, leave, dumps = os.write, os._exit, json.dumps  # before the program can replace them
    module = types.ModuleType("candidate")
    sys.modules["candidate"] = module
    try:
        exec(compile(program, "<program>", "exec", dont_inherit=True), module.__dict__)
        outcome, detail = "passed", ""
    except MemoryError:
        outcome, detail = "out_of_memory", "MemoryError"
    except BaseException as error:  # noqa: BLE001 - whatever generated code raises is a wrong answer
        outcome, detail = "failed", _describe(error)
    with contextlib.suppress(BaseException):  # the program may have closed or replaced it
        sys.stdout.flush()
    write(3, token + dumps({"outcome": outcome, "detail": detail}).encode())
    leave(0)


def _describe(error: BaseException) -> str:
    name = type(error).__name__
    try:
        text = str(error)
    except BaseException:  # noqa: BLE001 - `__str__` may be generated code
        text = ""
    return (f"{name}: {text}" if text else name)[:_KEPT_DETAIL_CHARS]


def _watch(pid: int, verdict: int, output: int, limits: dict[str, Any]) -> dict[str, Any]:
    """Read the child's pipes until it ends, or end it at the deadline or at too much output."""
    pipes = {verdict: _Pipe(_VERDICT_BYTES), output: _Pipe(limits["output_bytes"])}
    opened = set(pipes)
    reason = None
    deadline = time.monotonic() + limits["wall_time_s"]
    while True:
        ended, status, usage = os.wait4(pid, os.WNOHANG)
        if ended:
            break
        if reason is not None:
            os.kill(pid, signal.SIGKILL)
        elif time.monotonic() > deadline:
            reason = "timed_out"
        elif any(pipe.overflows for pipe in pipes.values()):
            reason = "too_much_output"
        _read_ready(pipes, opened, _TICK_S if opened else 0.001)
    while _read_ready(pipes, opened, 0.0):  # what was written before the end; descendants may still hold the pipes
        if any(pipe.overflows for pipe in pipes.values()):
            break
    cpu_s = usage.ru_utime + usage.ru_stime
    seen = {"verdict": bytes(pipes[verdict].head), "output": bytes(pipes[output].head)}
    return {**seen, "status": status, "reason": reason, "cpu_s": cpu_s}


class _Pipe:
    """The beginning of what came through a pipe, and whether more came than is allowed."""

    def __init__(self, limit_bytes: int) -> None:
        self.head, self.size, self.limit_bytes = bytearray(), 0, limit_bytes

    def add(self, part: bytes) -> None:
        self.size += len(part)
        self.head += part[: _VERDICT_BYTES - len(self.head)]

    @property
    def overflows(self) -> bool:
        return self.size > self.limit_bytes


def _read_ready(pipes: dict[int, _Pipe], opened: set[int], wait_s: float) -> bool:
    """Read once from each pipe that has something within `wait_s`; say whether anything came."""
    came = False
    for descriptor in select.select(list(opened), [], [], wait_s)[0]:
        part = os.read(descriptor, 1 << 16)
        pipes[descriptor].add(part)
        came = came or bool(part)
        if not part:
            opened.discard(descriptor)
    return came


def _kill_adopted() -> None:
    """Kill every descendant that the candidate left behind: as their reaper, this process inherits each in turn."""
    own = os.getpid()
    while True:
        try:
            with open(f"/proc/self/task/{own}/children") as stream:  # noqa: PTH123
                children = [int(word) for word in stream.read().split()]
            for child in children:
                os.kill(child, signal.SIGKILL)
            os.wait4(-1, 0)
        except ChildProcessError:
            return
        except ProcessLookupError:
            continue


def _answer(watched: dict[str, Any], token: bytes, limits: dict[str, Any]) -> dict[str, Any]:
    """What became of the candidate, from what it wrote and how it ended."""
    started, verdict = watched["verdict"][:1], watched["verdict"][1:]
    if started != _SET_UP:
        return {"broken": "the candidate's process could not be set up: " + verdict.decode(errors="replace")}
    output = watched["output"][:_KEPT_OUTPUT_BYTES].decode(errors="replace")
    outcome, detail = _judge(watched, verdict, token, limits)
    return {"outcome": outcome, "detail": detail, "output": output, "cpu_s": watched["cpu_s"]}


def _judge(watched: dict[str, Any], verdict: bytes, token: bytes, limits: dict[str, Any]) -> tuple[str, str]:
    if watched["reason"] == "timed_out":
        return "timed_out", f"still running after {limits['wall_time_s']} s"
    if watched["reason"] == "too_much_output":
        return "too_much_output", f"wrote more than {limits['output_bytes']} bytes"
    if verdict.startswith(token):
        try:
            written = json.loads(verdict[len(token) :])
            return str(written["outcome"]), str(written["detail"])
        except (ValueError, KeyError, TypeError):
            return "failed", "the verdict was tampered with"
    if os.WIFSIGNALED(watched["status"]):
        number = os.WTERMSIG(watched["status"])
        if number in (signal.SIGKILL, signal.SIGXCPU) and watched["cpu_s"] >= limits["cpu_time_s"] - 0.5:
            return "timed_out", f"used {limits['cpu_time_s']} s of CPU time"
        return "killed", f"ended by signal {number}"
    return "failed", f"exited with status {os.WEXITSTATUS(watched['status'])} before check() returned"


if __name__ == "__main__":
    main()
