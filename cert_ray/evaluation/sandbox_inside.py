"""The program inside the sandbox: loads libraries once, then forks one supervised child per candidate program.

In: settings as JSON in argv[1], then framed jobs on descriptor 0. Out: framed answers on descriptor 1. `sandbox` is the
other end. It runs under the environment's own interpreter, so it needs only the standard library of Python 3.8.

    zygote (waits for jobs; never runs candidate code; supervises: deadline, memory of all, output limit, the answer)
    `-- candidate (limits, no descriptors but its own, no capabilities, filtered system calls; runs the program)

With `nested`, the candidate is cloned as the first process of its own user, PID, mount and IPC namespaces: it cannot
see or signal the zygote, its files vanish with it, and when it ends the kernel kills what it left behind. Without, a
supervisor stands between the two, adopts and kills what is left, and a whole sandbox serves only one job (`sandbox`
sees to that). One fork less is worth it: every page of pandas that is touched after a fork costs a fault.

While generated code runs, its process has neither the descriptor for the verdict nor the token that makes it count: it
asks the supervisor for both once, after the tests. `sandbox_guard` checks before and after the tests whether the code
changed what judges it. Code can still do more: it runs in the process that judges it (`sandbox.KNOWN_LIMITS`).
"""

from __future__ import annotations

import base64
import ctypes
import gc
import importlib
import json
import math
import os
import resource
import shutil
import signal
import socket
import struct
import sys
import tempfile
import types
import warnings
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from cert_ray.evaluation.sandbox_guard import Guard, loaded_names, refuse_tricks
    from cert_ray.evaluation.sandbox_watch import ASK, NOT_SET_UP, SET_UP, TOKEN_BYTES, Watch, judge
else:  # in the sandbox there is no cert_ray: both files lie beside this one
    from sandbox_guard import Guard, loaded_names, refuse_tricks
    from sandbox_watch import ASK, NOT_SET_UP, SET_UP, TOKEN_BYTES, Watch, judge

_CLONE_NEWUSER = 0x10000000
_CLONE_FLAGS = _CLONE_NEWUSER | 0x00020000 | 0x20000000 | 0x08000000  # NEWNS, NEWPID, NEWIPC
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 1, 2, 4, 4096, 16384, 1 << 18
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 1, 4, 36, 38
_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, _PR_CAPBSET_DROP = 22, 2, 24
_CAPABILITY_VERSION_3, _CAPABILITIES = 0x20080522, 64  # bits of a set; Linux 6 knows 41
_KEPT_DETAIL_CHARS = 2000
_KEPT_TESTS = 512  # compiled, enough for a benchmark; programs come problem by problem, so fewer would do
_FILES = 1 << 14  # in each of its file systems: no other limit covers what a name costs the kernel
_BELL = 3  # the candidate's socket to its supervisor

_libc = ctypes.CDLL(None, use_errno=True)
_python_libc = ctypes.PyDLL(None, use_errno=True)  # keeps the interpreter's lock, for the call that forks it
_CLONE_CALL = {"x86_64": 56, "aarch64": 220}  # the kernel's number of clone, by machine; other machines cannot nest


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
    """Load the libraries, report ready, then answer jobs until their pipe is closed."""
    settings = json.loads(sys.argv[1])
    jobs, answers = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(2, 1)
    os.close(null)
    if settings["user"] is not None:  # the limit on processes does not apply to root
        _become(settings["user"], settings["renamed"])
    settings["numbers"] = os.getuid(), os.getgid()  # in a new user namespace both read as nobody
    # Nested, /proc/self/uid_map has to be ours; otherwise no process of the same user may look into this one.
    _call("prctl", _PR_SET_DUMPABLE, 1 if settings["nested"] else 0, 0, 0, 0)
    del sys.path[0]  # this file's folder
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in settings["preload"]:
            importlib.import_module(name)
        guard = Guard(settings["preload"])
    tests = _Tests()
    gc.freeze()
    send(answers, {"ready": True})
    while True:
        job = _receive(jobs)
        if job is None:
            return
        job["test"] = tests.compiled(job["test"])
        if settings["nested"]:
            send(answers, _answer(job, settings, guard))
            continue
        pid = os.fork()
        if pid == 0:
            os.close(jobs)
            _supervise(job, settings, guard, answers)
        if os.waitpid(pid, 0)[1] != 0:
            send(answers, {"ended": "the supervisor was killed"})


def _become(user: int, renamed: bool) -> None:
    """From root to `user`, without capabilities. `renamed`: this is root of a user namespace that knows no other user.

    In that case it first enters a further user namespace, in which the same user has the number `user`.
    """
    if renamed:
        own = os.getuid(), os.getgid()
        _call("unshare", _CLONE_NEWUSER)
        _name_user(user, user, *own)
    _empty_bounding_set()
    if not renamed:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    _drop_capabilities()


class _Tests:
    """The benchmark's tests as code, and the names they read, compiled once for all samples of a problem."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[types.CodeType | None, list[str], str]] = {}

    def compiled(self, source: str) -> tuple[types.CodeType | None, list[str], str]:
        """Code (None without tests, or if they do not compile), names, and what is wrong with the source."""
        if source not in self._known:
            if len(self._known) >= _KEPT_TESTS:
                self._known.clear()
            try:
                code = compile(source, "<tests>", "exec", dont_inherit=True) if source else None
                self._known[source] = code, loaded_names(source), ""
            except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
                self._known[source] = None, [], f"the tests do not compile: {_describe(error)}"
        return self._known[source]


def _supervise(job: dict[str, Any], settings: dict[str, Any], guard: Guard, answers: int) -> NoReturn:
    """Run one job in a child of this process, answer, and exit."""
    os.setsid()
    send(answers, _answer(job, settings, guard))
    os._exit(0)


def _answer(job: dict[str, Any], settings: dict[str, Any], guard: Guard) -> dict[str, Any]:
    try:
        return _run_supervised(job, settings, guard)
    except BaseException as error:  # noqa: BLE001 - a process boundary: the other side raises SandboxError from it
        return {"broken": f"{type(error).__name__}: {error}"}


def _run_supervised(job: dict[str, Any], settings: dict[str, Any], guard: Guard) -> dict[str, Any]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    output_read, output_write = os.pipe()
    proc = os.open("/proc", os.O_RDONLY)
    folder = None
    if settings["nested"]:
        pid = _clone_into_namespaces()
    else:
        _call("prctl", _PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        folder = tempfile.mkdtemp(dir=settings["box"])
        pid = os.fork()
    if pid == 0:
        try:
            _become_candidate(job, settings, guard, theirs.fileno(), output_write, folder)
        finally:
            os._exit(1)  # whatever happens, this process never goes on as the zygote's double
    theirs.close()
    os.close(output_write)
    watch = Watch(pid, ours, output_read, proc, settings["limits"])
    try:
        watched = watch.until_ended()
    finally:
        watch.close()
        if not settings["nested"]:
            _kill_adopted()
            shutil.rmtree(str(folder), ignore_errors=True)
    return judge(watched, settings["limits"])


def _clone_into_namespaces() -> int:
    """Like `os.fork`, but the child is the first process of namespaces of its own.

    `os.fork` has no such flags, and `unshare` does not move the caller into its new PID namespace. Python is told
    before and after, as in its own fork; this process has one thread.
    """
    number = _CLONE_CALL[os.uname().machine]
    python = ctypes.pythonapi
    python.PyOS_BeforeFork()
    pid = _python_libc.syscall(number, _CLONE_FLAGS | signal.SIGCHLD, 0, 0, 0, 0)
    if pid == 0:
        python.PyOS_AfterFork_Child()
        return 0
    failure = ctypes.get_errno()
    python.PyOS_AfterFork_Parent()
    if pid < 0:
        raise OSError(failure, f"clone: {os.strerror(failure)}")
    return int(pid)


def _name_user(user: int, group: int, outer_user: int, outer_group: int) -> None:
    """Give this user a number in its new user namespace, where it has none yet."""
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{user} {outer_user} 1"),
        ("gid_map", f"{group} {outer_group} 1"),
    ):
        try:
            opened = os.open(f"/proc/self/{name}", os.O_WRONLY)
        except FileNotFoundError:
            if name == "setgroups":  # gVisor has no such file, and needs none
                continue
            raise
        try:
            os.write(opened, text.encode())  # in one piece, or the kernel refuses it
        finally:
            os.close(opened)


def _become_candidate(
    job: dict[str, Any], settings: dict[str, Any], guard: Guard, bell: int, output: int, folder: str | None
) -> NoReturn:
    """In the child: shut every door, then run the program. Never returns."""
    try:
        _call("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        os.setsid()  # a signal to its process group reaches nothing else, in whatever namespace
        _move_descriptors(bell, output)
        if settings["nested"]:
            _name_user(*settings["numbers"], *settings["numbers"])
            _mount_private(settings)
        os.chdir(settings["box"] if folder is None else folder)
        _empty_bounding_set()
        _drop_capabilities()
        _set_limits(settings["limits"], settings["nested"])
        if settings["filter"] is not None:
            _filter_system_calls(base64.b64decode(settings["filter"]))
    except BaseException as error:  # noqa: BLE001 - a process boundary: reported by the supervisor as broken
        os.write(_BELL, NOT_SET_UP + f"{type(error).__name__}: {error}".encode())
        os._exit(1)
    os.write(_BELL, SET_UP)
    _run(job, guard)


def _move_descriptors(bell: int, output: int) -> None:
    """0 is empty, 1 and 2 are the output pipe, 3 the supervisor's socket; everything else is closed."""
    moved, shown = os.dup(bell), os.dup(output)
    while moved <= 3:  # keep both clear of the numbers to be filled
        moved = os.dup(moved)
    while shown <= 3:
        shown = os.dup(shown)
    os.dup2(moved, _BELL, inheritable=False)
    os.dup2(shown, 1)
    os.dup2(shown, 2)
    os.closerange(4, 1024)


def _mount_private(settings: dict[str, Any]) -> None:
    """Mount an empty, bounded file system to write to, and hide what /proc shows of other processes."""
    _call("mount", None, b"/", None, _MS_REC | _MS_PRIVATE, None)
    size = f"size={settings['limits']['file_bytes']},nr_inodes={_FILES},mode=0700".encode()
    box = os.fsencode(settings["box"])
    _call("mount", b"tmpfs", box, b"tmpfs", _MS_NOSUID | _MS_NODEV, size)
    _call("mount", b"tmpfs", b"/dev/shm", b"tmpfs", _MS_NOSUID | _MS_NODEV, size)
    _call("mount", b"tmpfs", b"/proc", b"tmpfs", _MS_NOSUID | _MS_NODEV | _MS_RDONLY, b"size=4096,mode=0555")
    if settings["cover_tmp"]:
        _call("mount", box, b"/tmp", None, _MS_BIND, None)


def _empty_bounding_set() -> None:
    """Keep programs that this process starts from having capabilities, whatever their files say.

    Only as far as this process may: it needs CAP_SETPCAP, which `unsafe` lacks; where else it is missing, bubblewrap
    has done this.
    """
    for capability in range(_CAPABILITIES):
        if _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) != 0:  # EINVAL: the kernel knows no further ones
            return


def _drop_capabilities() -> None:
    _call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    header = struct.pack("<Ii", _CAPABILITY_VERSION_3, 0)
    _call("capset", header, struct.pack("<6I", 0, 0, 0, 0, 0, 0))


class _FilterProgram(ctypes.Structure):
    """struct sock_fprog of linux/filter.h."""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def _filter_system_calls(instructions: bytes) -> None:
    """Load a seccomp filter: instructions of eight bytes each. `system_calls` says what it refuses."""
    program = _FilterProgram(len(instructions) // 8, instructions)
    _call("prctl", _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0)


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
    """Visible threads of this user: the kernel counts them against the limit on processes."""
    count = 0
    for name in os.listdir("/proc"):  # noqa: PTH208
        try:
            if name.isdigit() and os.stat(f"/proc/{name}").st_uid == os.getuid():  # noqa: PTH116
                count += len(os.listdir(f"/proc/{name}/task"))  # noqa: PTH208
        except OSError:  # it ended meanwhile
            continue
    return count


def _run(job: dict[str, Any], guard: Guard) -> NoReturn:
    """Execute the program as a module of its own; fetch descriptor and token; write the verdict; exit at once."""
    # Held in local names: the program can replace whatever modules, classes and globals hold.
    bell = socket.socket(fileno=_BELL)
    ask, receive, room, unpack = bell.send, bell.recvmsg, socket.CMSG_SPACE(4), struct.unpack
    write, leave, close, describe, flush = os.write, os._exit, os.closerange, _describe, sys.stdout.flush
    this, anything, question, token_bytes = sys.modules["__main__"], BaseException, ASK, TOKEN_BYTES
    try:
        fault = _judge_program(job, guard)
        outcome, detail = ("failed", f"changed {fault}, on which the tests rely") if fault else ("passed", "")
    except MemoryError:
        outcome, detail = "out_of_memory", "MemoryError"
    except BaseException as error:  # noqa: BLE001 - whatever generated code raises is a wrong answer
        outcome, detail = "failed", describe(error)
    verdict = f"{outcome}\n{detail}".encode("utf-8", "backslashreplace")
    try:  # noqa: SIM105 - the program may have closed or replaced it
        flush()
    except anything:
        pass
    close(_BELL + 1, 1024)  # frees a descriptor for the verdict, whatever the program left open
    ask(question)  # from here on nothing runs that the program could have replaced
    token, ancillary, _, _ = receive(token_bytes, room)
    write(unpack("i", ancillary[0][2][:4])[0], token + verdict)
    leave(0)
    raise AssertionError(this)  # unreachable; keeps this module alive, whose place the program's module takes


def _judge_program(job: dict[str, Any], guard: Guard) -> str | None:
    """Run code and tests. Returns what was tampered with, or None; raises whatever they raise."""
    changed, shadowed, run, loaded = guard.changed, guard.shadowed, exec, sys.modules
    test, names, fault = job["test"]
    job["aliases"] = dict(job["aliases"])
    if fault:
        raise SyntaxError(fault)
    _rename_libraries(job["renamed"], loaded)
    module = types.ModuleType("candidate")
    loaded["candidate"] = loaded["__main__"] = module
    scope = module.__dict__
    scope["__builtins__"] = builtins = vars(loaded["builtins"])
    code = compile(job["code"], "<program>", "exec", dont_inherit=True)
    refuse_tricks()
    for part in (code, test):
        if part is None:
            continue
        run(part, scope)
        found = changed(loaded) or shadowed(names, scope, job)
        if found is not None:
            return found
        if scope.get("__builtins__") is not builtins:
            return "__builtins__"
    return None


def _rename_libraries(renamed: list[list[str]], loaded: dict[str, types.ModuleType]) -> None:
    """Make each library and its loaded submodules importable by another name as well."""
    for name, library in renamed:
        importlib.import_module(library)
        for full, module in list(loaded.items()):
            if full == library or full.startswith(library + "."):
                loaded[name + full[len(library) :]] = module


def _describe(error: BaseException) -> str:
    name = type(error).__name__
    try:
        text = str(error)
    except BaseException:  # noqa: BLE001 - `__str__` may be generated code
        text = ""
    return (f"{name}: {text}" if text else name)[:_KEPT_DETAIL_CHARS]


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


if __name__ == "__main__":
    main()
