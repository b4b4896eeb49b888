"""How bubblewrap gets its namespaces on this machine, a network of its own among them.

Usually it makes all of them. Where that fails, util-linux' `unshare` makes the network namespace (and, for whoever is
not root, the user namespace that it takes), and starts bubblewrap inside, which makes the others. That is so below
gVisor: it gives a new loopback device its address, and bubblewrap, which would give it the same one, ends ("loopback:
Failed RTM_NEWADDR", gVisor's issue 13438). A way is taken only after it has been seen to start, in another network
namespace than this process'. Where no way does, the first one is used, and ends with bubblewrap's own words.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

NOBODY = 65534
_PATIENCE_S = 10  # assumed: a bubblewrap that works starts within it
_NETWORK = "/proc/self/ns/net"
_OTHERS = ("--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try", "--cap-drop", "ALL")


@dataclass(frozen=True, slots=True)
class Way:
    """A command line around bubblewrap: what starts it, and its options about namespaces and capabilities."""

    before: tuple[str, ...]
    options: tuple[str, ...]

    def command(self, bubblewrap: str) -> list[str]:
        """Up to the options about files."""
        return [*self.before, bubblewrap, "--die-with-parent", "--new-session", *self.options]


def ways() -> tuple[Way, Way]:
    """Bubblewrap alone, and inside of another's network namespace.

    As root without a user namespace, since the child then becomes a user without any rights; else with one.
    """
    if os.geteuid() == 0:
        options = (*_OTHERS, "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID")
        return Way((), ("--unshare-net", *options)), Way(("unshare", "--net", "--"), options)
    alone = ("--unshare-all", "--uid", str(NOBODY), "--gid", str(NOBODY))
    return Way((), alone), Way(("unshare", "--user", "--map-root-user", "--net", "--"), _OTHERS)


@cache
def find_way(bubblewrap: str) -> Way:
    """The first way that starts here and has a network of its own; where none does, the first."""
    return next((way for way in ways() if _starts(bubblewrap, way)), ways()[0])


def _starts(bubblewrap: str, way: Way) -> bool:
    asked = [sys.executable, "-I", "-S", "-c", f"import os; print(os.readlink({_NETWORK!r}))"]
    command = [*way.command(bubblewrap), "--ro-bind", "/", "/", "--proc", "/proc", "--dev", "/dev", "--", *asked]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_PATIENCE_S, check=False
        )
        return done.returncode == 0 and done.stdout.strip() not in ("", str(Path(_NETWORK).readlink()))
    except (OSError, subprocess.TimeoutExpired):  # also where /proc does not tell
        return False
