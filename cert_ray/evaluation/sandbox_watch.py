"""What the supervisor sees of a candidate: its process and pipes in, an answer for `sandbox` out.

Runs inside the sandbox, beside `sandbox_inside`: the standard library of Python 3.8 only. Limits that the kernel does
not enforce are enforced here: output, time without work, memory of all processes of a program together.

Time: CPU time is the kernel's limit. `wall_time_s` bounds how long a program may neither work nor wait for a core, so
that a busy machine does not turn a slow answer into a wrong one; if the kernel does not report this, it bounds the time
since the start.
"""

from __future__ import annotations

import array
import os
import select
import signal
import socket
import time
from typing import Any

SET_UP, NOT_SET_UP, ASK = b"\x01", b"\x00", b"?"  # what a candidate may say: one of the first two, then ASK once
TOKEN_BYTES = 16
_KEPT_OUTPUT_BYTES = 8192
_VERDICT_BYTES = 1 << 16
_TICK_S = 0.02  # how late a candidate's end may be noticed if descendants hold its pipes
_SLOWEST = 10.0  # times wall_time_s: then even a program that only waits for a core is ended
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class Watch:
    """One candidate, from its start to its end. `proc` is /proc, opened before the candidate covers it."""

    def __init__(self, pid: int, bell: socket.socket, output: int, proc: int, limits: dict[str, Any]) -> None:
        self._pid, self._bell, self._output, self._limits = pid, bell, output, limits
        self._proc, self._processes = proc, Processes(proc)
        self._started = time.monotonic()
        self._looked_s = 0.0  # when memory was last looked at, since the start
        self._token = os.urandom(TOKEN_BYTES)
        self._verdict: int | None = None  # the reading end, once the candidate has asked
        self._bell_number = bell.fileno()
        self._opened = {self._bell_number, output}
        self._texts = {output: _Text(limits["output_bytes"])}
        self._setup: bytes | None = None
        self._strange = False

    def until_ended(self) -> dict[str, Any]:
        """Read what the candidate says until it ends, or kill it at a limit."""
        reason = None
        while True:
            ended, status, usage = os.wait4(self._pid, os.WNOHANG)
            if ended:
                break
            if reason is not None:
                os.kill(self._pid, signal.SIGKILL)
            self._read_ready(_TICK_S if self._opened else 0.001)
            reason = reason or self._exceeded()
        while self._read_ready(0.0):  # what was written before the end; descendants may still hold the pipes
            if self._too_much():
                reason = reason or "too_much_output"
                break
        return {
            "setup": self._setup or b"",
            "verdict": bytes(self._texts[self._verdict].head) if self._verdict is not None else b"",
            "token": self._token,
            "strange": self._strange,
            "output": bytes(self._texts[self._output].head),
            "status": status,
            "reason": reason,
            "cpu_s": usage.ru_utime + usage.ru_stime,
        }

    def close(self) -> None:
        """Close every descriptor that was given to it or made by it."""
        self._bell.close()
        for descriptor in (*self._texts, self._proc):
            os.close(descriptor)

    def _too_much(self) -> bool:
        return any(text.overflows for text in self._texts.values())

    def _exceeded(self) -> str | None:
        elapsed_s = time.monotonic() - self._started
        wall_s = self._limits["wall_time_s"]
        if elapsed_s > wall_s and (
            elapsed_s > wall_s * _SLOWEST or self._processes.idle_s(self._pid, elapsed_s) > wall_s
        ):
            return "timed_out"
        if self._too_much():
            return "too_much_output"
        if elapsed_s - self._looked_s >= _TICK_S:  # by time, so that a program that never stops talking is checked too
            self._looked_s = elapsed_s
            if self._processes.memory_bytes(os.getpid()) > self._limits["memory_bytes"]:
                return "out_of_memory"
        return None

    def _read_ready(self, wait_s: float) -> bool:
        """Read once from everything that is ready within `wait_s`; returns whether anything came."""
        came = False
        for descriptor in select.select(list(self._opened), [], [], wait_s)[0]:
            part = os.read(descriptor, 1 << 16)
            came = came or bool(part)
            if not part:
                self._opened.discard(descriptor)
            elif descriptor == self._bell_number:
                self._hear(part)
            else:
                self._texts[descriptor].add(part)
        return came

    def _hear(self, message: bytes) -> None:
        if self._setup is None:
            self._setup = message
        elif message == ASK and self._verdict is None:
            self._give_verdict_pipe()
        else:
            self._strange = True

    def _give_verdict_pipe(self) -> None:
        self._verdict, write = os.pipe()
        rights = array.array("i", [write])
        try:
            self._bell.sendmsg([self._token], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        except OSError:  # it ended meanwhile
            self._strange = True
        os.close(write)
        self._opened.add(self._verdict)
        self._texts[self._verdict] = _Text(_VERDICT_BYTES)


class _Text:
    """The beginning of what came through a pipe, and whether more came than is allowed."""

    def __init__(self, limit_bytes: int) -> None:
        self.head, self.size, self.limit_bytes = bytearray(), 0, limit_bytes

    def add(self, part: bytes) -> None:
        self.size += len(part)
        self.head += part[: _VERDICT_BYTES - len(self.head)]

    @property
    def overflows(self) -> bool:
        return self.size > self.limit_bytes


class Processes:
    """What /proc says about the processes of a program."""

    def __init__(self, proc: int) -> None:
        self._proc = proc

    def idle_s(self, pid: int, elapsed_s: float) -> float:
        """How long the first thread of `pid` neither ran nor waited for a core; `elapsed_s` if that is not known."""
        try:
            ran_ns, waited_ns = (int(word) for word in self._read(f"{pid}/schedstat").split()[:2])
        except (OSError, ValueError):
            return elapsed_s
        return elapsed_s - (ran_ns + waited_ns) / 1e9

    def memory_bytes(self, root: int) -> int:
        """Memory of all descendants of `root` together. Shared pages count once, if the kernel reports them so.

        0 for a single one: the kernel limits what that may take.
        """
        found, waiting = [], self._children(root)
        while waiting:
            pid = waiting.pop()
            found.append(pid)
            waiting += self._children(pid)
        return sum(map(self._bytes_of, found)) if len(found) > 1 else 0

    def _children(self, pid: int) -> list[int]:
        try:
            return [int(word) for word in self._read(f"{pid}/task/{pid}/children").split()]
        except OSError:  # it ended meanwhile
            return []

    def _bytes_of(self, pid: int) -> int:
        try:
            lines = self._read(f"{pid}/smaps_rollup").splitlines()
            return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
        except (OSError, StopIteration):
            pass
        try:
            return int(self._read(f"{pid}/statm").split()[1]) * _PAGE_BYTES
        except OSError:
            return 0

    def _read(self, name: str) -> str:
        descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._proc)
        with open(descriptor) as stream:  # noqa: PTH123
            return stream.read()


def judge(watched: dict[str, Any], limits: dict[str, Any]) -> dict[str, Any]:
    """The candidate's outcome, from what it wrote and how it ended."""
    if watched["setup"] != SET_UP:
        said = watched["setup"].lstrip(NOT_SET_UP).decode(errors="replace")
        return {"broken": f"the candidate's process could not be set up: {said}"}
    output = watched["output"][:_KEPT_OUTPUT_BYTES].decode(errors="replace")
    outcome, detail = _verdict(watched, limits)
    return {"outcome": outcome, "detail": detail, "output": output, "cpu_s": watched["cpu_s"]}


def _verdict(watched: dict[str, Any], limits: dict[str, Any]) -> tuple[str, str]:
    if watched["reason"] is not None:
        return watched["reason"], {
            "timed_out": f"still running after {limits['wall_time_s']} s",
            "too_much_output": f"wrote more than {limits['output_bytes']} bytes",
            "out_of_memory": f"its processes together took more than {limits['memory_bytes']} bytes",
        }[watched["reason"]]
    if watched["strange"]:
        return "failed", "spoke to the supervisor out of turn"
    if watched["verdict"].startswith(watched["token"]):
        outcome, _, detail = watched["verdict"][TOKEN_BYTES:].decode(errors="replace").partition("\n")
        return outcome, detail
    return _ending(watched, limits)


def _ending(watched: dict[str, Any], limits: dict[str, Any]) -> tuple[str, str]:
    """The outcome of a process that ended without a verdict."""
    if not os.WIFSIGNALED(watched["status"]):
        return "failed", f"exited with status {os.WEXITSTATUS(watched['status'])} before check() returned"
    number = os.WTERMSIG(watched["status"])
    if number in (signal.SIGKILL, signal.SIGXCPU) and watched["cpu_s"] >= limits["cpu_time_s"] - 0.5:
        return "timed_out", f"used {limits['cpu_time_s']} s of CPU time"
    return "killed", f"ended by signal {number}"
