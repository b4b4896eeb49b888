"""What is no cluster's address says what to give, and one where nobody listens is told within the patience for it."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from cert_ray.errors import ClusterError, ConfigError
from cert_ray.operations.cluster_address import find_host, wait_for_listener
from tests.ray_heads import free_port


class Clock:
    """Moves on when it is waited for."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def wait(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.fixture
def listener() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize(
    ("address", "host"),
    [
        ("10.0.0.1:6379", ("10.0.0.1", 6379)),
        ("ray://head.example.com:10001", ("head.example.com", 10001)),
        ("[::1]:6379", ("::1", 6379)),
        ("auto", None),
        ("local", None),
        ("vendor://mine", None),
    ],
)
def test_addresses_that_ray_takes(address: str, host: tuple[str, int] | None) -> None:
    assert find_host(address) == host


@pytest.mark.parametrize(
    "address", ["http://head:8265", "https://head", "10.0.0.1", "10.0.0.1:", "head:six", "", "::1", "head:99999"]
)
def test_what_is_no_address_of_a_cluster_says_what_is(address: str) -> None:
    with pytest.raises(ConfigError, match=r"HOST:PORT of the head \(port 6379"):
        find_host(address)


def test_a_listener_is_found_at_once(listener: int) -> None:
    clock = Clock()
    wait_for_listener("127.0.0.1", listener, 0, clock, clock.wait)
    assert clock.now_s == 0


@pytest.mark.parametrize("host", ["127.0.0.1", "nowhere.invalid", "no..name"])
def test_an_address_where_nobody_listens_is_given_up_within_the_patience_for_it(host: str) -> None:
    clock, port = Clock(), free_port()
    with pytest.raises(
        ClusterError, match=rf"^the Ray cluster at {host}:{port}: nobody answers \(.+\)\. Is the head up"
    ):
        wait_for_listener(host, port, 5, clock, clock.wait)
    assert clock.now_s <= 5


def test_a_head_that_is_starting_again_is_waited_for() -> None:
    clock, port = Clock(), free_port()
    with socket.socket() as head:

        def wait(seconds: float) -> None:
            clock.wait(seconds)
            if clock.now_s == 2:
                head.bind(("127.0.0.1", port))
                head.listen()

        wait_for_listener("127.0.0.1", port, 30, clock, wait)
    assert clock.now_s == 2
