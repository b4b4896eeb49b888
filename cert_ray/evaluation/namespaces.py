"""How bubblewrap gets its namespaces on this machine, including a network of its own.

Usually bubblewrap makes all of them. Where it fails over the loopback device, util-linux's `unshare` makes the network
namespace (and, unless run by root, the user namespace this needs) and starts bubblewrap inside, which makes the others.
That is so under gVisor: it gives a new loopback device its address, and bubblewrap fails when it sets the same one
("loopback: Failed RTM_NEWADDR", gVisor's issue 13438). Elsewhere this way would leave loopback down, so no other error,
and no slow start, leads to it.

A way is used only once it was seen to start in a network namespace other than this process's; one that starts in this
process's is refused. If none starts, the first one is used, and fails with bubblewrap's own words.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

from cert_ray.errors import SandboxError

logger = logging.getLogger(__name__)

NOBODY = 65534
SEARCHED = "/usr/bin:/bin"  # PATH in the sandbox, and of what starts it
_LOOPBACK = "loopback:"  # in what bubblewrap says if it cannot have a network of its own
_NETWORK = "/proc/self/ns/net"
# Until the program in the sandbox has become nobody, for good and without any capability:
_TO_BECOME_NOBODY = ("CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP")
_TO_RENAME_ROOT = ("CAP_SETFCAP",)  # to map the outer root into a user namespace: user_namespaces(7), since Linux 5.12
_OTHERS = ("--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try", "--cap-drop", "ALL")

_LOOKING = threading.Lock()  # also over _FOUND
_FOUND: dict[str, Way] = {}  # by the path of bubblewrap


@dataclass(frozen=True, slots=True)
class Way:
    """A command line around bubblewrap: what starts it, and its options for namespaces and capabilities."""

    before: tuple[str, ...]
    options: tuple[str, ...]
    renames_root: bool = False  # what it starts is root of a user namespace that knows no other user

    def command(self, bubblewrap: str) -> list[str]:
        """The command up to the options about files."""
        return [*self.before, bubblewrap, "--die-with-parent", "--new-session", *self.options]


def ways() -> tuple[Way, ...]:
    """Bubblewrap alone and, if `unshare` is installed, bubblewrap inside a network namespace made by that.

    As root without a user namespace, since the child then becomes a user without any rights; otherwise with one.
    """
    unshare = shutil.which("unshare")
    if os.geteuid() == 0:
        options = (*_OTHERS, *_kept(_TO_BECOME_NOBODY))
        alone = Way((), ("--unshare-net", *options))
        return (alone,) if unshare is None else (alone, Way((unshare, "--net", "--"), options))
    alone = Way((), ("--unshare-all", "--uid", str(NOBODY), "--gid", str(NOBODY)))
    if unshare is None:
        return (alone,)
    before = (unshare, "--user", "--map-root-user", "--net", "--")  # bubblewrap takes capabilities only from root
    return alone, Way(before, (*_OTHERS, *_kept(_TO_RENAME_ROOT)), renames_root=True)


def _kept(capabilities: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(word for name in capabilities for word in ("--cap-add", name))


def find_way(bubblewrap: str, patience_s: float) -> Way:
    """The first way that starts here, with a network of its own; if none does, the first. Remembered, except errors.

    One thread looks, and logs what it finds. Others wait for its result, each as long as its patience lasts.

    Raises:
        SandboxError: when a way starts in this machine's own network, or it cannot be told in which.
        OSError: when a way could not be tried, or did not start within `patience_s`: another time it may.
    """
    if not _LOOKING.acquire(timeout=patience_s):
        raise TimeoutError(f"it took more than {patience_s:.0f} s")
    try:
        if bubblewrap not in _FOUND:
            _FOUND[bubblewrap] = _look(bubblewrap, patience_s)
        return _FOUND[bubblewrap]
    finally:
        _LOOKING.release()


def _look(bubblewrap: str, patience_s: float) -> Way:
    first, *others = ways()
    said = _try(bubblewrap, first, patience_s)
    if said is None:
        return first
    for way in others if _LOOPBACK in said else ():
        if _try(bubblewrap, way, patience_s) is None:
            why = said.splitlines()[-1]
            logger.warning("bubblewrap cannot make a network namespace (%s), so %s makes it", why, way.before[0])
            return way
    return first


def _try(bubblewrap: str, way: Way, patience_s: float) -> str | None:
    """None if `way` starts in a network that is not ours; what it said if it ended without starting."""
    asked = [sys.executable, "-I", "-S", "-c", f"import os; print(os.readlink({_NETWORK!r}))"]
    command = [*way.command(bubblewrap), "--ro-bind", "/", "/", "--proc", "/proc", "--dev", "/dev", "--", *asked]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=patience_s,
            check=False,
            env={"PATH": SEARCHED},
        )
    except subprocess.TimeoutExpired as error:
        raise TimeoutError(f"it took more than {patience_s:.0f} s") from error
    if done.returncode != 0:
        return done.stderr
    network, own = done.stdout.strip(), _own_network()
    if "" in (network, own) or network == own:
        raise SandboxError(
            f"{' '.join([*way.before, bubblewrap])} started a program in this machine's own network namespace, or did "
            f"not say in which (it said {network or 'nothing'}; ours is {own or 'not known'}), so generated code could "
            "reach the network. Check that this is bubblewrap itself, and that /proc is mounted here."
        )
    return None


def _own_network() -> str:
    try:
        return str(Path(_NETWORK).readlink())
    except OSError:  # no /proc
        return ""
