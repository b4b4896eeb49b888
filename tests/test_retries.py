"""Trying again: what passes, how often, and that nobody does it twice over."""

from __future__ import annotations

import errno
import tarfile

import aiohttp
import httpx
import pytest
import requests
from botocore.exceptions import ResponseStreamingError

from cert_ray import retries
from cert_ray.errors import InputError, StorageFullError, SupersededError
from cert_ray.retries import is_passing, tried_again


class ReadTimeoutError(Exception):
    """As botocore's and urllib3's: no error that Python knows."""


class ServerDisconnectedError(ConnectionError):
    """As aiohttp's, known by what it is derived from."""


def unreadable(cause: Exception) -> InputError:
    error = InputError("s3://bucket/x.tar", "reading failed", "Check the store.")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (OSError(errno.EIO, "the storage said so"), True),
        (OSError("Service Unavailable"), True),
        (OSError(errno.EBUSY, "slow down"), True),
        (OSError(errno.ENOSPC, "no space left"), False),
        (OSError(errno.EROFS, "read-only"), False),
        (OSError(errno.EINVAL, "bad request"), False),
        (FileNotFoundError(2, "gone"), False),
        (PermissionError(13, "not yours"), False),
        (ConnectionResetError(), True),
        (TimeoutError(), True),
        (ReadTimeoutError(), True),
        (ServerDisconnectedError(), True),
        (unreadable(OSError(errno.EIO, "the storage said so")), True),
        (unreadable(FileNotFoundError(2, "gone")), False),
        (InputError("x", "nothing there", "Check the path."), False),
        (StorageFullError("x", 2, 1), False),
        (SupersededError("x"), False),
        (ValueError("ConnectionError"), False),
        (OSError(errno.ENOTEMPTY, "not empty"), False),
        (OSError(errno.EMFILE, "too many open files"), False),
        (requests.ReadTimeout(), True),
        (requests.ConnectTimeout(), True),
        (requests.ConnectionError(), True),
        (requests.exceptions.ChunkedEncodingError(), True),
        (requests.exceptions.InvalidURL(), False),
        (requests.HTTPError("404 Client Error"), False),
        (httpx.ReadTimeout(""), True),
        (httpx.ConnectTimeout(""), True),
        (httpx.PoolTimeout(""), True),
        (httpx.ConnectError(""), True),
        (httpx.ReadError(""), True),
        (httpx.RemoteProtocolError(""), True),
        (httpx.LocalProtocolError(""), False),
        (httpx.UnsupportedProtocol(""), False),
        (httpx.InvalidURL(""), False),
        (aiohttp.ClientPayloadError(), True),
        (aiohttp.ServerTimeoutError(), True),
        (aiohttp.ClientConnectionError(), True),
        (aiohttp.InvalidURL("x"), False),
        (ResponseStreamingError(error="broke off"), True),
        (tarfile.ReadError("damaged"), False),
    ],
)
def test_what_passes(error: Exception, passes: bool) -> None:
    assert is_passing(error) is passes


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    waited: list[float] = []
    monkeypatch.setattr(retries, "_wait", waited.append)
    return waited


@pytest.mark.parametrize("failures", range(7))
def test_a_call_is_tried_five_times_over_half_a_minute(failures: int, waits: list[float]) -> None:
    left = [OSError(errno.EIO, "busy")] * failures

    @tried_again
    def call(value: int) -> int:
        if left:
            raise left.pop()
        return value

    if failures < 5:
        assert call(7) == 7
    else:
        with pytest.raises(OSError, match="busy") as raised:
            call(7)
        assert raised.value.__notes__ == ["It was tried 5 times."]
        assert len(left) == failures - 5
    assert len(waits) == min(failures, 4)
    assert waits == sorted(waits)
    assert sum(waits) <= 36


def test_what_came_every_time_is_not_tried_again_further_out(waits: list[float]) -> None:
    calls = []

    @tried_again
    def inner() -> None:
        calls.append(1)
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        tried_again(inner)()
    assert len(calls) == 5


def test_what_does_not_pass_comes_at_once(waits: list[float]) -> None:
    @tried_again
    def call() -> None:
        raise FileNotFoundError(2, "gone")

    with pytest.raises(FileNotFoundError):
        call()
    assert waits == []
