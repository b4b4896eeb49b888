"""Attacks on the sandbox, as data: programs that pass only if the attack succeeds. A regression list, not a proof.

`{port}`, `{abstract}` and `{secret}` stand for a listening port, an abstract socket and a file that a test has outside,
`{home}` for the home folder of who runs it.
"""

from __future__ import annotations

from dataclasses import dataclass

from cert_ray.evaluation.programs import Program

_C = "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
_X86_64_CALLS = {
    "ptrace": "101, 16, 1, 0, 0",  # PTRACE_ATTACH to the first process
    "process_vm_readv": "310, 1, 0, 0, 0, 0, 0",
    "pidfd_open": "434, 1, 0",
    "bpf": "321, 0, 0, 0",
    "perf_event_open": "298, 0, 0, -1, -1, 0",
    "userfaultfd": "323, 1",
    "io_uring_setup": "425, 1, 0",
    "keyctl": "250, 0, -3, 1",
    "add_key": "248, b'user', b'x', b'y', 1, -2",
    "unshare": "272, 0x10000000",
    "setns": "308, 0, 0",
    "mount": "165, b'x', b'/box', b'tmpfs', 0, 0",
    "umount2": "166, b'/box', 2",
    "pivot_root": "155, b'/box', b'/box'",
    "chroot": "161, b'/box'",
    "memfd_create": "319, b'x', 0",
    "shmget": "29, 0, 1 << 30, 0o1666",
    "open_by_handle_at": "304, -100, 0, 0",
    "init_module": "175, 0, 0, b''",
    "kexec_load": "246, 0, 0, 0, 0",
    "reboot": "169, 0xfee1dead, 672274793, 0x1234567, 0",
    "settimeofday": "164, 0, 0",
    "sethostname": "170, b'x', 1",
    "personality": "135, 0x0040000",
    "clone with a new user namespace": "56, 0x10000011, 0, 0, 0, 0",
    "clone3": "435, 0, 0",
}


@dataclass(frozen=True, slots=True)
class Attack:
    """`said` is a regular expression that the detail of the failure must hold: it failed for the right reason."""

    name: str
    program: Program
    said: str
    outcome: str = "failed"


def _wall(name: str, code: str, said: str = "Error", outcome: str = "failed") -> Attack:
    return Attack(name, Program(code), said, outcome)


def _written(place: str) -> Attack:
    return _wall(f"write {place}", f"open({place!r}, 'w').write('x')")


NETWORK = [
    _wall("TCP to this machine", "import socket; socket.create_connection(('127.0.0.1', {port}), 2)"),
    _wall("TCP outside", "import socket; socket.create_connection(('1.1.1.1', 53), 2)"),
    _wall("TCP over IPv6", "import socket; socket.create_connection(('2606:4700:4700::1111', 53), 2)"),
    _wall("UDP outside", "import socket; socket.socket(2, 2).sendto(b'x', ('8.8.8.8', 53))"),
    _wall("name lookup", "import socket; socket.gethostbyname('example.org')", "gaierror"),
    _wall("HTTP", "import urllib.request; urllib.request.urlopen('http://1.1.1.1/', timeout=2)"),
    _wall("a cloud's metadata", "import socket; socket.create_connection(('169.254.169.254', 80), 2)"),
    _wall("abstract socket of this machine", "import socket; socket.socket(1).connect('\\0{abstract}')"),
    _wall("netlink socket", "import socket; socket.socket(16, 3, 0)", "PermissionError"),
    _wall("packet socket", "import socket; socket.socket(17, 3, 0)", "PermissionError"),
    _wall("virtual machine socket", "import socket; socket.socket(40, 1, 0)", "PermissionError"),
    _wall("kernel cryptography socket", "import socket; socket.socket(38, 5, 0)", "PermissionError"),
    _wall("raw IP socket", "import socket; socket.socket(2, 3, 1)", "PermissionError"),
]
READING = [
    _wall("environment variable", "import os; os.environ['A_TOKEN']", "KeyError"),
    _wall(
        "others' environment", "import glob; assert any('hush' in open(p).read() for p in glob.glob('/proc/*/environ'))"
    ),
    _wall("a file of this machine", "open('{secret}').read()", "FileNotFoundError"),
    _wall("through a symbolic link", "import os; os.symlink('{secret}', 'l'); open('l').read()", "FileNotFoundError"),
    _wall("through a link in /tmp", "import os; os.symlink('{secret}', '/tmp/l'); open('/tmp/l').read()"),
    _wall("/etc/shadow", "open('/etc/shadow').read()", "FileNotFoundError"),
    _wall("users", "open('/etc/passwd').read()", "FileNotFoundError"),
    _wall("the home folder", "open('{home}/.bashrc').read()"),
    _wall("running services", "import os; os.listdir('/run')", "FileNotFoundError"),
    _wall("this project", "import cert_ray.cli", "ModuleNotFoundError"),
    _wall("the first process's memory", "open('/proc/1/mem', 'rb').read(1)", "FileNotFoundError"),
    _wall("processes", "import os; assert os.listdir('/proc')", "AssertionError"),
    _wall("kernel memory", "open('/proc/kcore', 'rb').read(1)", "FileNotFoundError"),
    _wall("block devices", "import os; assert any(n.startswith(('sd', 'vd', 'nvme')) for n in os.listdir('/dev'))"),
    _wall("own descriptors by name", "import os; os.listdir('/proc/self/fd')", "FileNotFoundError"),
    _wall("standard input", "assert input()", "EOFError"),
]
WRITING = [
    *map(_written, ["/etc/written", "/usr/bin/written", "/dev/written", "/written", "/cert-ray/sandbox_inside.py"]),
    _wall("a start-up file", "import sys; open(sys.prefix + '/lib/evil.pth', 'w')"),
    _wall("the interpreter", "import sys, os; os.unlink(os.path.realpath(sys.executable))"),
    _wall("through a link", "import os; os.symlink('/usr/bin/env', 'l'); open('l', 'w')"),
    _wall("hard link to a system file", "import os; os.link('/usr/bin/env', '/usr/bin/env2')"),
    _wall("set-user-id file", "import os; open('s', 'w'); os.chmod('s', 0o6777); os.chown('s', 0, 0)"),
    _wall("block device", "import os; os.mknod('d', 0o60666, os.makedev(8, 0))", "PermissionError"),
    _wall("kernel settings", "open('/proc/sys/kernel/core_pattern', 'w')"),
    _wall("control groups", "import os; os.mkdir('/sys/fs/cgroup/x')"),
    _wall("become root", "import os; os.setuid(0)"),
    _wall("become root by group", "import os; os.setgroups([0])", "PermissionError"),
    _wall("capabilities", _C + "assert libc.prctl(47, 2, 21, 0, 0) == 0", "AssertionError"),
    _wall("undo no-new-privileges", _C + "assert libc.prctl(38, 0, 0, 0, 0) == 0", "AssertionError"),
    _wall("type into the terminal", "import fcntl; fcntl.ioctl(1, 0x5412, b'x')", "PermissionError"),
    _wall("raise a limit", "import resource as r; r.setrlimit(r.RLIMIT_CPU, (-1, -1))", "Error"),
]
RESOURCES = [
    _wall(
        "processes", "import os, time\nfor n in range(64):\n    if os.fork() == 0: time.sleep(60)", "BlockingIOError"
    ),
    _wall(
        "threads", "import threading, time\nfor n in range(64): threading.Thread(target=time.sleep, args=(60,)).start()"
    ),
    _wall("memory at once", "x = bytearray(4 << 30)", "MemoryError", "out_of_memory"),
    _wall("memory bit by bit", "x = []\nwhile True: x.append(bytearray(1 << 20))", "MemoryError", "out_of_memory"),
    _wall(
        "memory of many processes that never stop talking",
        "import os, time\nx = []\nfor n in range(9):\n    if os.fork() == 0:\n        try:\n"
        "            while True: x.append(bytearray(b'1') * (10 << 20))\n        except MemoryError: time.sleep(60)\n"
        "while True:\n    print('.', flush=True)\n    time.sleep(0.01)",
        "together",
        "out_of_memory",
    ),
    _wall(
        "memory of many processes",
        "import os, time\nx = []\nfor n in range(9):\n    if os.fork() == 0:\n        try:\n"
        "            while True: x.append(bytearray(b'1') * (10 << 20))\n        except MemoryError: time.sleep(60)\n"
        "time.sleep(60)",
        "together",
        "out_of_memory",
    ),
    _wall("one large file", "open('x', 'wb').write(b'x' * (64 << 20))", "OSError"),
    _wall("files together", "for n in range(64): open(f'x{n}', 'wb').write(b'x' * (1 << 20))", "OSError"),
    _wall("shared memory files", "for n in range(64): open(f'/dev/shm/{n}', 'wb').write(b'x' * (1 << 20))", "OSError"),
    _wall("names of files", "for n in range(1 << 20): open(f'x{n}', 'w').close()", "OSError"),
    _wall("descriptors", "import os\nx = [os.pipe() for n in range(4096)]", "OSError"),
    _wall("output", "while True: print('x' * 1000)", "wrote more", "too_much_output"),
    _wall("output past Python", "import os\nwhile True: os.write(2, b'x' * 1000)", "wrote more", "too_much_output"),
    _wall("CPU", "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass", "CPU", "timed_out"),
    _wall("depth", "def f(): f()\nf()", "RecursionError"),
    _wall("native crash", "import ctypes; ctypes.string_at(0)", "signal", "killed"),
]
PROCESSES = [
    _wall("kill the parent", "import os; os.kill(os.getppid(), 9)\nassert False"),
    _wall("kill everyone", "import os; os.kill(-1, 9)\nassert False"),
    _wall("kill its group", "import os, signal; signal.signal(15, signal.SIG_IGN); os.kill(0, 15)\nassert False"),
    _wall("kill the first process", "import os; os.kill(1, 15)\nassert False"),
    _wall(
        "a thread left behind",
        "import threading\nthreading.Thread(target=lambda: [0 for _ in iter(int, 1)]).start()\nassert 0",
    ),
    *(
        _wall(f"call {name}", _C + f"assert libc.syscall({call}) >= 0, ctypes.get_errno()", "AssertionError: (1|38)")
        for name, call in _X86_64_CALLS.items()
    ),
]

_ANSWER = "def check(f):\n    assert f() == 42\ncheck(f)\n"
_FRAME = "def check():\n    assert result.equals(pd.DataFrame({'a': [1]}))\ncheck()\n"
_CLOSE = "def check():\n    assert np.allclose(result, [1.0])\ncheck()\n"
_TYPES = "def check():\n    assert all([result == 1, len([1, 2]) == 2, abs(-1) == 1])\ncheck()\n"
_PROMPT = "import numpy as np\nimport pandas as pd\n"


def _fake(name: str, code: str, test: str, said: str) -> Attack:
    aliases = (("np", "numpy"), ("pd", "pandas"))
    return Attack(name, Program(_PROMPT + code, test, "f" if test is _ANSWER else None, aliases), said)


_WRONG_FRAME = "result = pd.DataFrame({'a': [2]})\n"
_WRONG_ARRAY = "result = np.array([2.0])\n"
_SKIP = (
    "import sys\ndef skip(frame, event, arg):\n    if frame.f_code.co_name == 'check' and event == 'line':\n"
    "        frame.f_lineno = frame.f_lineno + 1\n    return skip\n"
)
FAKE_PASSES = [
    _fake("leave by sys.exit", "import sys; sys.exit(0)", _ANSWER, "SystemExit"),
    _fake("leave by os._exit", "import os; os._exit(0)", _ANSWER, "before check"),
    _fake("leave during the tests", "def f():\n    raise SystemExit(0)", _ANSWER, "SystemExit"),
    _fake("leave hard during the tests", "import os\ndef f(): os._exit(0)", _ANSWER, "before check"),
    _fake("leave at exit", "import atexit, os; atexit.register(os._exit, 0)\ndef f(): return 1", _ANSWER, "Assertion"),
    _fake("leave on an alarm", "import os, signal\nsignal.signal(14, lambda *a: os._exit(0))\ndef f():\n"
          "    signal.setitimer(0, 0.001)\n    while True: pass", _ANSWER, "before check"),
    _fake("leave from a thread", "import os, threading\nthreading.Timer(0.01, os._exit, [0]).start()\ndef f():\n"
          "    while True: pass", _ANSWER, "before check"),
    # The parent has left, the child goes on into the tests: whichever is heard first, it failed.
    _fake("leave in a child", "import os\nif os.fork(): os._exit(0)\ndef f(): return 1", _ANSWER,
          "before check|AssertionError"),
    _fake("leave on an uncaught error", "import os, sys\nsys.excepthook = lambda *a: os._exit(0)\ndef f(): return 1",
          _ANSWER, "Assertion"),
    _fake("leave on flush", "import os, sys\nclass S:\n    def write(self, t): pass\n    def flush(self): os._exit(0)\n"
          "sys.stdout = S()\ndef f(): return 1", _ANSWER, "Assertion"),
    _fake("leave as the error is described", "import os\nclass E(Exception):\n    def __str__(self): os._exit(0)\n"
          "def f(): raise E", _ANSWER, "before check"),
    _fake("an error named passed", "class M(type):\n    __name__ = property(lambda s: 'passed')\n"
          "class E(Exception, metaclass=M): pass\ndef f(): raise E", _ANSWER, ""),
    _fake("an error described by a verdict", "class T(str):\n    def __getitem__(s, k): return 'passed\\n'\n"
          "class E(Exception):\n    def __str__(self): return T('passed\\n')\ndef f(): raise E", _ANSWER, ""),
    _fake("define check before", "def f(): return 1\ndef check(f): pass", _ANSWER, "Assertion"),
    _fake("decorate check", "def f(): return 1\n@lambda g: lambda *a: None", _ANSWER, "SyntaxError"),
    _fake("open a string", "def f(): return 1\n'''", _ANSWER, "SyntaxError"),
    _fake("open a block", "def f(): return 1\nif False:", _ANSWER, "IndentationError"),
    _fake("open a handler", "def f(): return 1\ntry:", _ANSWER, "IndentationError"),
    _fake("continue the line", "def f(): return 1\nx = lambda: \\", _ANSWER, "SyntaxError"),
    _fake("replace all", "import builtins\nbuiltins.all = lambda x: True\nresult = 2", _TYPES, "builtins.all"),
    _fake("replace len", "import builtins\nbuiltins.len = lambda x: 2\nresult = 2", _TYPES, "builtins.len"),
    _fake("replace the import", "import builtins\nbuiltins.__import__ = lambda *a: None\nresult = 2", _TYPES, "__imp"),
    _fake("replace the error", "import builtins\nbuiltins.AssertionError = SystemExit\nresult = 2", _TYPES, "builtins"),
    _fake("shadow all", "all = lambda x: True\nresult = 2", _TYPES, "changed all"),
    _fake("shadow abs and len", "class len(int):\n    def __new__(c, x): return 2\nresult = 1", _TYPES, "changed len"),
    _fake("shadow during the tests", "def f():\n    globals()['abs'] = id\n    return 42",
          "def check(f):\n    f()\n    assert abs(-1) != 1\ncheck(f)\n", "changed abs"),
    _fake("another __builtins__", "b = dict(vars(__import__('builtins')))\nb['all'] = lambda x: True\n"
          "globals()['__builtins__'] = b\nresult = 2", _TYPES, "__builtins__"),
    _fake("a false np", "class np:\n    allclose = lambda *a: True\nresult = 2", _CLOSE, "changed np"),
    _fake("a false np in sys.modules", "import sys, types\nm = types.ModuleType('numpy')\n"
          "m.allclose = lambda *a: True\nsys.modules['numpy'] = m\nresult = 2", f"import numpy\n{_CLOSE}", "sys.mod"),
    _fake("replace DataFrame.equals", f"pd.DataFrame.equals = lambda *a: True\n{_WRONG_FRAME}", _FRAME, "equals"),
    _fake("replace an inherited one", f"pd.DataFrame.__mro__[1].equals = id\n{_WRONG_FRAME}", _FRAME, "equals"),
    _fake("replace DataFrame.__eq__", "pd.DataFrame.__eq__ = lambda *a: True\n" + _WRONG_FRAME,
          "assert (result == pd.DataFrame({'a': [1]})) is True\n", "__eq__"),
    _fake("replace pd.DataFrame", "D = pd.DataFrame\nclass E(D):\n    def equals(self, o): return True\n"
          "pd.DataFrame = E\n" + _WRONG_FRAME, _FRAME, "pandas.DataFrame"),
    _fake("replace assert_frame_equal", "pd.testing.assert_frame_equal = lambda *a: None\n" + _WRONG_FRAME,
          "pd.testing.assert_frame_equal(result, pd.DataFrame({'a': [1]}))\n", "assert_frame_equal"),
    _fake("replace np.allclose", f"np.allclose = lambda *a: True\n{_WRONG_ARRAY}", _CLOSE, "numpy.allclose"),
    _fake("replace np.array_equal", "np.array_equal = lambda *a: True\n" + _WRONG_ARRAY,
          "assert np.array_equal(result, np.array([1.0]))\n", "array_equal"),
    _fake("replace assert_allclose", "np.testing.assert_allclose = lambda *a: None\n" + _WRONG_ARRAY,
          "np.testing.assert_allclose(result, [1.0])\n", "assert_allclose"),
    _fake("replace it during the tests", "def f():\n    np.allclose = lambda *a: True\n    return 2",
          "value = f()\nassert np.allclose(value, 1)\n", "numpy.allclose"),
    _fake("new code for equals", "pd.DataFrame.__mro__[1].equals.__code__ = (lambda self, other: True).__code__\n"
          + _WRONG_FRAME, _FRAME, "cannot be replaced"),
    _fake("new defaults for allclose", "g = getattr(np.allclose, '__wrapped__', np.allclose)\n"
          "g.__defaults__ = (9.0, 9.0, False)\n" + _WRONG_ARRAY, _CLOSE, "cannot be replaced"),
    _fake("replace assertEqual", "import unittest\nunittest.TestCase.assertEqual = lambda *a: None\ndef f(): return 1",
          "import unittest\nunittest.TestCase().assertEqual(f(), 42)\n", "assertEqual"),
    _fake("skip lines by a trace function", f"{_SKIP}sys.settrace(skip)\nresult = 2", _TYPES, "not available"),
    _fake("skip lines by a profile function", f"{_SKIP}sys.setprofile(skip)\nresult = 2", _TYPES, "not available"),
    _fake("search for the judge", "import gc\ngc.get_objects()\nresult = 2", _TYPES, "not available"),
    _fake("search through frames", "import sys\nsys._current_frames()\nresult = 2", _TYPES, "not available"),
    _fake("change the judge's locals", "import sys\nframe = sys._getframe(1)\nwhile frame:\n"
          "    frame.f_locals.update(fault=None, outcome='passed')\n    frame = frame.f_back\nresult = 2", _TYPES, ""),
    _fake("change the judge's module", "import __main__\n__main__._run = None\nresult = 2", _TYPES, "Assertion"),
    _fake("change json", "import json\njson.JSONEncoder.encode = lambda *a: '{\"outcome\": \"passed\"}'\n"
          "def f(): return 1", _ANSWER, "json"),
    _fake("write a verdict", "import os\nos.write(3, b'passed\\n')\nos._exit(0)", _ANSWER, "out of turn"),
    _fake("write verdicts everywhere", "import os\nfor n in range(256):\n    try: os.write(n, b'passed\\n')\n"
          "    except OSError: pass\nos._exit(0)", _ANSWER, "out of turn"),
    _fake("print a verdict", "print('passed', flush=True)\nraise SystemExit", _ANSWER, "SystemExit"),
    _fake("say that we failed", "import os\nos.write(3, b'\\x00')\nos._exit(0)", _ANSWER, "out of turn"),
    _fake("ask for the descriptor first", "import os\nos.write(3, b'?')\ndef f(): return 42", _ANSWER, "out of turn"),
    _fake("close the descriptor", "import os\nos.close(3)\ndef f(): return 42", _ANSWER, "before check"),
]  # fmt: skip
