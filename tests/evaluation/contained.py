"""By hand: does the sandbox hold where it was not tested, as below gVisor?

In: nothing, or `outside` to have `unshare` make the network namespace whatever bubblewrap could do itself. Out: a line
for each program (some must pass, most must fail), in namespaces of their own where they nest and in a sandbox of their
own each; exit status 1 if one did not hold.
Wants only what the sandbox imports, so it runs below a runsc without a test runner.

Example: runsc --network=none --platform=systrap do setpriv --reuid 1000 --regid 1000 --clear-groups \
             env PYTHONPATH=$PWD:SITE-PACKAGES python3 -m tests.evaluation.contained
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

from cert_ray.errors import SandboxError
from cert_ray.evaluation import sandbox as sandbox_module
from cert_ray.evaluation.environments import current_environment
from cert_ray.evaluation.namespaces import NOBODY, ways
from cert_ray.evaluation.sandbox import Limits, Outcome, Sandbox, find_bubblewrap

# Passes or not: what counts is whether a process outside, of the user that programs are outside, lives on.
KILL = "import os, signal, time\ntry: os.kill(-1, signal.SIGKILL)\nexcept OSError: pass\ntime.sleep(0.2)"
LIMITS = Limits(cpu_time_s=3, memory_bytes=512 << 20, processes=12, file_bytes=4 << 20, output_bytes=1 << 20)
REFUSED = (
    "import ctypes, errno\nlibc = ctypes.CDLL(None, use_errno=True)\n"
    "assert libc.{} == -1 and ctypes.get_errno() == errno.EPERM"
)
MUST_PASS = {
    "nothing": "pass",
    "memfd_create is refused": REFUSED.format("memfd_create(b'x', 0)"),
    "unshare is refused": REFUSED.format("unshare(0x10000000)"),
    "netlink is refused": REFUSED.format("socket(16, 3, 0)"),
    "nobody, not root": f"import os\nassert os.getresuid() == os.getresgid() == ({NOBODY},) * 3",
    "no capability to be had": "import ctypes\nread = ctypes.CDLL(None).prctl\n"
    "assert all(read(23, n, 0, 0, 0) != 1 for n in range(64))",  # 23: PR_CAPBSET_READ
    "few processes are seen": "import os\nassert len([p for p in os.listdir('/proc') if p.isdigit()]) <= 4",
}
# Where a sandbox is one program's, /proc is there to look at.
MUST_PASS_ALONE = {
    "loopback is the only device": "lines = open('/proc/net/dev').readlines()[2:]\n"
    "assert [line.split(':')[0].strip() for line in lines] == ['lo']",
    "no capability": "assert 'CapEff:\\t0000000000000000' in open('/proc/self/status').read()",
    "a filter": "assert 'Seccomp:\\t2' in open('/proc/self/status').read()",
}
MUST_FAIL = {
    "the internet": "import socket; socket.create_connection(('1.1.1.1', 80), 2)",
    "a mount": "import ctypes; assert ctypes.CDLL(None).mount(b'x', b'/box', b'tmpfs', 0, None) == 0",
    "writing outside": "open('/etc/written', 'w')",
    "passwords": "open('/etc/shadow').read()",
    "forks": "import os, time\nfor n in range(40):\n    if os.fork() == 0: time.sleep(60)",
    "memory": "x = bytearray(2 << 30)",
    "files": "for n in range(64): open(f'x{n}', 'wb').write(b'x' * (1 << 20))",
    "endless work": "while True: pass",
}


def main() -> None:
    if sys.argv[1:] == ["outside"]:
        mock.patch.object(sandbox_module, "find_way", return_value=ways()[1]).start()
    sys.stdout.write(f"uid {os.getuid()}, {sandbox_module.find_way(find_bubblewrap() or 'bwrap', 180)}\n")
    broken = 0
    with (
        tempfile.NamedTemporaryFile() as secret,
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.socket(socket.AF_UNIX) as abstract,
    ):
        abstract.bind("\0cert-ray-contained")
        abstract.listen()
        reach = {
            "a service of this machine": f"import socket; socket.create_connection({server.getsockname()!r}, 2)",
            "an abstract socket": "import socket; socket.socket(socket.AF_UNIX).connect('\\0cert-ray-contained')",
            "a file of this user": f"open({secret.name!r}).read()",
        }
        own = Path("/proc/self/ns/net").readlink()
        apart = {"a network of its own": f"import os; assert os.readlink('/proc/self/ns/net') != {str(own)!r}"}
        for nested in (None, False):
            with Sandbox(current_environment(), LIMITS) as sandbox:
                sandbox._nested = nested
                passing = MUST_PASS | (MUST_PASS_ALONE | apart if nested is False else {})
                broken += sum(not _holds(sandbox, name, program, True) for name, program in passing.items())
                broken += sum(
                    not _holds(sandbox, name, program, False) for name, program in (reach | MUST_FAIL).items()
                )
                broken += not _spares_others(sandbox)
                sys.stdout.write(f"namespaces {'nest' if sandbox._nested else 'do not nest, or were not asked to'}\n")
    sys.stdout.write(f"{broken} did not hold\n")
    raise SystemExit(bool(broken))


def _spares_others(sandbox: Sandbox) -> bool:
    user = NOBODY if os.geteuid() == 0 else None
    with subprocess.Popen(["sleep", "infinity"], user=user) as outside:
        try:
            found = sandbox.run(KILL)
            held = outside.poll() is None
        except SandboxError as error:
            sys.stdout.write(f"ERROR killing everybody: {error}\n")
            return False
        finally:
            outside.kill()
    sys.stdout.write(f"{'ok   ' if held else 'WRONG'} killing everybody: {found.outcome} {found.detail}\n")
    return held


def _holds(sandbox: Sandbox, name: str, program: str, passes: bool) -> bool:
    try:
        found = sandbox.run(program)
    except SandboxError as error:
        sys.stdout.write(f"ERROR {name}: {error}\n")
        return False
    held = (found.outcome is Outcome.PASSED) is passes
    sys.stdout.write(f"{'ok   ' if held else 'WRONG'} {name}: {found.outcome} {found.detail}\n")
    sys.stdout.flush()
    return held


if __name__ == "__main__":
    main()
