"""The system calls that generated code may not make: a seccomp filter as bytes, made by libseccomp through pyseccomp.

The bytes are a program for the kernel. `sandbox_inside` loads it into each candidate just before generated code runs,
since the sandbox itself still needs calls that candidates do not. It lists what is refused, with EPERM, not what is
allowed: numerical libraries differ too much. Calls from another architecture's table kill the process.

Chosen from the calls that Docker's default profile refuses to containers without capabilities, and those that could
take memory outside the limits (memfd, System V segments and queues).
"""

from __future__ import annotations

import errno
import socket
import tempfile
from functools import cache
from types import ModuleType

from cert_ray.errors import SandboxError

_NAMESPACES_AND_MOUNTS = (
    "unshare setns mount umount umount2 pivot_root chroot move_mount open_tree fsopen fsconfig fsmount fspick "
    "mount_setattr open_by_handle_at name_to_handle_at"
)
_OTHER_PROCESSES = "ptrace process_vm_readv process_vm_writev process_madvise pidfd_open pidfd_getfd kcmp"
_KERNEL = (
    "bpf perf_event_open userfaultfd io_uring_setup io_uring_enter io_uring_register init_module finit_module "
    "delete_module create_module kexec_load kexec_file_load reboot swapon swapoff acct quotactl quotactl_fd iopl "
    "ioperm syslog settimeofday clock_settime clock_adjtime adjtimex sethostname setdomainname lookup_dcookie "
    "nfsservctl vhangup personality modify_ldt keyctl add_key request_key fanotify_init fanotify_mark uselib ustat "
    "sysfs _sysctl"
)
_UNBOUNDED_MEMORY = "memfd_create memfd_secret shmget msgget semget mq_open"
_REFUSED = f"{_NAMESPACES_AND_MOUNTS} {_OTHER_PROCESSES} {_KERNEL} {_UNBOUNDED_MEMORY}".split()
# CLONE_NEWTIME, NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET: clone(2)
_CLONE_NEW = (0x80, 0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000)
_TERMINAL_INJECTION = (0x5412, 0x541C)  # TIOCSTI, TIOCLINUX: ioctl_tty(2)


def find_filter(*, network: bool) -> bytes | None:
    """The filter, or None if pyseccomp or libseccomp is missing. Without `network`, it also refuses internet sockets.

    Raises:
        SandboxError: when libseccomp is too old, or the filter could not be made.
    """
    library = _library()
    if library is None:
        return None
    try:
        return _compiled(library, network)
    except OSError as error:
        raise SandboxError(
            f"the filter of system calls could not be made: {error}. It needs libseccomp 2.5 or later, and room for a "
            "temporary file."
        ) from error


@cache
def _library() -> ModuleType | None:
    try:
        import pyseccomp
    except (ImportError, OSError, RuntimeError):  # RuntimeError: no libseccomp on this machine
        return None
    module: ModuleType = pyseccomp
    return module


@cache
def _compiled(library: ModuleType, network: bool) -> bytes:
    rules = library.SyscallFilter(library.ALLOW)
    refuse = library.ERRNO(errno.EPERM)
    for name in _REFUSED:
        try:
            rules.add_rule(refuse, name)
        except OSError:  # not a call of this architecture, or one that this libseccomp does not know yet
            continue
    for flag in _CLONE_NEW:
        rules.add_rule(refuse, "clone", library.Arg(0, library.MASKED_EQ, flag, flag))
    rules.add_rule(library.ERRNO(errno.ENOSYS), "clone3")  # a filter cannot see its flags: libc then calls clone
    for request in _TERMINAL_INJECTION:
        rules.add_rule(refuse, "ioctl", library.Arg(1, library.MASKED_EQ, 0xFFFFFFFF, request))
    allowed = {socket.AF_UNIX, *((socket.AF_INET, socket.AF_INET6) if network else ())}
    for family in set(range(max(allowed) + 1)) - allowed:
        rules.add_rule(refuse, "socket", library.Arg(0, library.EQ, family))
    rules.add_rule(refuse, "socket", library.Arg(0, library.GT, max(allowed)))
    with tempfile.TemporaryFile() as stream:
        rules.export_bpf(stream)
        stream.seek(0)
        return stream.read()
