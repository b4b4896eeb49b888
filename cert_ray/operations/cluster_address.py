"""Checks the address of a Ray cluster before Ray uses it: Ray's client tries a dead one for a quarter of an hour.

In: the value of `--address`, `--cluster` or RAY_ADDRESS. Out: host and port, or nothing if only Ray can find the
cluster; an error if nobody listens there. Opens connections and sends nothing. No Ray in here.
"""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Callable

from cert_ray.errors import ClusterError, ConfigError

_CONNECTING_S = 5.0  # assumed: for one address of the host; a firewall that drops packets gives no answer
_MOST_PORT = 65_535
_AGAIN_S = 0.5  # assumed: between two attempts
_IS_IT_UP = "Is the head up, and its port reachable from here? `ray start --head` and `kubectl get raycluster` show it."
_WANTED = (
    "set --address, --cluster or RAY_ADDRESS to HOST:PORT of the head (port 6379 unless another was chosen), or to "
    "`auto` on a machine of the cluster"
)


def find_host(address: str) -> tuple[str, int] | None:
    """Host and port of an address; None for one that Ray resolves by itself, such as `auto`.

    Raises:
        ConfigError: for the dashboard's URL, or when the port is missing.
    """
    if address in {"auto", "local"}:
        return None
    if address.startswith(("http://", "https://")):
        raise ConfigError(
            f"{address!r} is the dashboard's address, for submitting jobs (`ray job submit --address`): {_WANTED}"
        )
    found = re.fullmatch(r"(?:ray://)?(?:\[(?P<v6>[^\]]+)\]|(?P<host>[^/:]+)):(?P<port>\d{1,5})", address)
    if found is None and "://" in address:
        return None  # a service that brings its own client
    if found is None or int(found["port"]) > _MOST_PORT:
        raise ConfigError(f"{address!r} is not the address of a Ray cluster: {_WANTED}")
    return found["v6"] or found["host"], int(found["port"])


def wait_for_listener(
    host: str,
    port: int,
    patience_s: float,
    clock: Callable[[], float] = time.monotonic,
    wait: Callable[[float], None] = time.sleep,
) -> None:
    """Return as soon as somebody listens at `host` and `port`: a head may just be restarting.

    Raises:
        ClusterError: when nobody does within `patience_s`, with the system's reason.
    """
    ends_s = clock() + patience_s
    while True:
        try:
            socket.create_connection((host, port), timeout=_CONNECTING_S).close()
        except (OSError, UnicodeError) as error:  # the latter for what cannot be a host's name
            if clock() + _AGAIN_S > ends_s:
                reason = getattr(error, "strerror", None) or str(error)
                raise ClusterError(f"{host}:{port}", f"nobody answers ({reason.lower()})", _IS_IT_UP) from error
            wait(_AGAIN_S)
        else:
            return
