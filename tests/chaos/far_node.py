"""A node of a Ray cluster in a network of its own, whose cable can be pulled.

In: the address of a head on this machine. Out: `FarNode`, a raylet in a network namespace that a pair of virtual
interfaces ties to this machine. Wants root and `ip` (iproute2); names and addresses are its own, and all goes when
the block ends.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.ray_heads import RAY, stop

_NEAR, _FAR, _SPACE = "crchaos0", "crchaos1", "cert-ray-chaos"
_STARTS = 5  # assumed
NEAR_ADDRESS, FAR_ADDRESS = "10.213.77.1", "10.213.77.2"


def _ip(*arguments: str, check: bool = True) -> None:
    subprocess.run(["ip", *arguments], check=check, timeout=30, capture_output=True)


@dataclass(frozen=True, slots=True)
class FarNode:
    """A running node; its processes see this machine through one cable."""

    process: subprocess.Popen[bytes]

    def cut(self) -> None:
        """Pull the cable: packets are lost, and nobody is told."""
        _ip("link", "set", _NEAR, "down")

    def mend(self) -> None:
        """Put it back."""
        _ip("link", "set", _NEAR, "up")

    def pids(self) -> set[int]:
        """Every process of the node."""
        return {child.pid for child in psutil.Process(self.process.pid).children(recursive=True)}

    def ends_within(self, seconds: float) -> bool:
        """Whether the node ends by itself."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True


@contextmanager
def started_far_node(address: str, folder: Path, cpus: int = 1) -> Iterator[FarNode]:
    """A node of the cluster at `address`, in a network of its own.

    Raises:
        RuntimeError: with its log, when it does not start.
    """
    _ip("netns", "add", _SPACE)
    process: subprocess.Popen[bytes] | None = None
    try:
        _ip("link", "add", _NEAR, "type", "veth", "peer", "name", _FAR)
        _ip("link", "set", _FAR, "netns", _SPACE)
        _ip("addr", "add", f"{NEAR_ADDRESS}/24", "dev", _NEAR)
        _ip("link", "set", _NEAR, "up")
        for step in (
            ("addr", "add", f"{FAR_ADDRESS}/24", "dev", _FAR),
            ("link", "set", _FAR, "up"),
            ("link", "set", "lo", "up"),
            ("route", "add", "default", "via", NEAR_ADDRESS),
        ):
            _ip("-n", _SPACE, *step)
        process = _started(address, folder / "far-node.log", cpus)
        yield FarNode(process)
    finally:
        if process is not None:
            stop(process)
        _ip("netns", "del", _SPACE, check=False)
        _ip("link", "del", _NEAR, check=False)


def _started(address: str, log: Path, cpus: int) -> subprocess.Popen[bytes]:
    """The node's process, up. Ray gives up on one that takes 30 s, which a busy machine needs; so this tries again."""
    command = ["ip", "netns", "exec", _SPACE, RAY, "start", f"--address={address}", "--block", "--disable-usage-stats"]
    command += [f"--node-ip-address={FAR_ADDRESS}", f"--num-cpus={cpus}", "--object-store-memory=100000000"]
    for _ in range(_STARTS):
        with log.open("wb") as stream:
            process = subprocess.Popen(command, env=os.environ, stdout=stream, stderr=stream, start_new_session=True)
        try:
            while process.poll() is None:
                if "--block" in log.read_text():  # which it says once its raylet is up
                    return process
                time.sleep(0.2)
        except BaseException:
            stop(process)
            raise
    raise RuntimeError(log.read_text())
