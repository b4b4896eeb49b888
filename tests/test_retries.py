"""Trying again: what passes, how often, and that nobody does it twice over."""

from __future__ import annotations

import errno
import http.client
import importlib
import io
import tarfile
import threading
import urllib.error
import warnings
from collections.abc import Callable
from email.message import Message
from types import SimpleNamespace
from unittest import mock

import aiohttp
import httpx
import pytest
import requests
from botocore.exceptions import ClientError, ResponseStreamingError
from huggingface_hub import hf_raise_for_status
from huggingface_hub.errors import HfHubHTTPError

from cert_ray import retries
from cert_ray.errors import InputError, RequestError, StorageFullError, SupersededError
from cert_ray.retries import answered_within, asked_once, is_of_storage, is_passing, tried_again


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
        (OSError("Forbidden: https://store/x\n\nno access"), False),  # as gcsfs'
        (OSError(errno.EBUSY, "slow down"), True),
        (OSError(errno.ENOSPC, "no space left"), False),
        (OSError(errno.EROFS, "read-only"), False),
        (OSError(errno.ENXIO, "a socket"), False),
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
        (http.client.IncompleteRead(b"half"), True),
        (http.client.BadStatusLine("no HTTP"), False),
        (tarfile.ReadError("damaged"), False),
    ],
)
def test_what_passes(error: Exception, passes: bool) -> None:
    assert is_passing(error) is passes


class StandInGcsfsHttpError(Exception):
    """As gcsfs': the store's own description of what went wrong, its code a number or text."""

    def __init__(self, error_response: dict[str, object]) -> None:
        self.code = error_response.get("code")
        super().__init__(error_response.get("message"))


class StandInHttpResponseError(Exception):
    """As azure.core's: its status is that of the response, None without one."""

    def __init__(self, message: str, response: object = None) -> None:
        self.status_code = getattr(response, "status_code", None)
        self.response = response
        super().__init__(message)


def installed_or(stand_in: type[Exception], module: str, name: str) -> type[Exception]:
    """The client's own exception where it is installed, else what stands in for it here."""
    try:
        found: type[Exception] = getattr(importlib.import_module(module), name)
    except ImportError:
        return stand_in
    return found


def azure_error(name: str, derived_from: type[Exception]) -> type[Exception]:
    return installed_or(type(name, (derived_from,), {}), "azure.core.exceptions", name)


GcsfsHttpError = installed_or(StandInGcsfsHttpError, "gcsfs.retry", "HttpError")
AzureHttpResponseError = installed_or(StandInHttpResponseError, "azure.core.exceptions", "HttpResponseError")
AzureRequestError = azure_error("ServiceRequestError", Exception)
AzureResponseError = azure_error("ServiceResponseError", Exception)


def made_plain(plain: type[Exception], cause: Exception) -> Exception:
    """As adlfs makes it of an error of its client."""
    error = plain(f"Failed to upload block: {cause}!")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize("plain", [RuntimeError, ValueError])
@pytest.mark.parametrize(("status", "passes"), [(503, True), (403, False), (404, False)])
def test_an_error_that_adlfs_makes_a_plain_one_of_is_judged_by_what_it_was(plain, status, passes):
    answer = aiohttp.ClientResponseError(mock.Mock(), (), status=status)  # a client of its kind that is installed
    error = made_plain(plain, answer)
    assert is_passing(error) is passes
    assert is_of_storage(error)
    assert not is_of_storage(made_plain(plain, KeyError("x")))
    assert not is_passing(made_plain(plain, TimeoutError()))  # of somebody else


@pytest.mark.parametrize(
    ("kind", "passes"),
    [
        (AzureRequestError, True),
        (AzureResponseError, True),
        (azure_error("ServiceRequestTimeoutError", AzureRequestError), True),
        (azure_error("ServiceResponseTimeoutError", AzureResponseError), True),
        (azure_error("IncompleteReadError", AzureHttpResponseError), True),
        (azure_error("DecodeError", AzureHttpResponseError), False),
        (azure_error("AzureError", Exception), False),
    ],
)
def test_azure_tells_what_passes_by_its_errors_names_where_no_answer_came(kind: type[Exception], passes: bool) -> None:
    assert is_passing(kind("no answer")) is passes


def refused_by_requests(status: int) -> Exception:
    response = requests.Response()
    response.status_code = status
    with pytest.raises(requests.HTTPError) as raised:
        response.raise_for_status()
    return raised.value


def refused_by_httpx(status: int) -> Exception:
    with pytest.raises(httpx.HTTPStatusError) as raised:
        httpx.Response(status, request=httpx.Request("GET", "https://store/x")).raise_for_status()
    return raised.value


def refused_by_hugging_face(status: int) -> Exception:
    (hub_http,) = (kind.__module__.partition(".")[0] for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")
    http = pytest.importorskip(hub_http)  # httpx, under the name that this version of the hub's client knows it by
    with pytest.raises(HfHubHTTPError) as raised:
        hf_raise_for_status(http.Response(status, request=http.Request("GET", "https://store/x")))
    return raised.value


def refused_by_aiohttp(status: int) -> Exception:
    return aiohttp.ClientResponseError(mock.Mock(), (), status=status)


def refused_by_urllib(status: int) -> Exception:
    return urllib.error.HTTPError("https://store/x", status, "refused", Message(), io.BytesIO())


def refused_by_gcsfs(status: int) -> Exception:
    return GcsfsHttpError({"code": status, "message": "refused"})


def refused_by_gcsfs_in_text(status: int) -> Exception:
    return GcsfsHttpError({"code": str(status), "message": "refused"})


def refused_by_azure(status: int) -> Exception:
    return AzureHttpResponseError("refused", SimpleNamespace(status_code=status, reason="refused"))


@pytest.mark.parametrize(
    "refused",
    [
        refused_by_requests, refused_by_httpx, refused_by_hugging_face, refused_by_aiohttp, refused_by_urllib,
        refused_by_gcsfs, refused_by_gcsfs_in_text, refused_by_azure,
    ],
)  # fmt: skip
def test_an_http_status_passes_where_the_server_is_at_fault_or_asked_too_often(
    refused: Callable[[int], Exception],
) -> None:
    statuses = (400, 401, 403, 404, 408, 409, 412, 416, 429, 499, 500, 501, 502, 503, 504, 599)
    assert [status for status in statuses if is_passing(refused(status))] == [408, 429, 500, 502, 503, 504, 599]


@pytest.mark.parametrize(
    "refused",
    [refused_by_aiohttp, refused_by_urllib, refused_by_gcsfs, refused_by_gcsfs_in_text, refused_by_azure],
)
def test_only_a_temporary_redirection_that_no_client_followed_passes(refused: Callable[[int], Exception]) -> None:
    assert [status for status in (301, 302, 303, 307, 308) if is_passing(refused(status))] == [307]


@pytest.mark.parametrize(
    ("code", "status", "passes"),
    [
        ("SlowDown", 503, True),
        ("InternalError", 500, True),
        ("InternalError", 200, True),  # a copy that failed after the answer had begun
        ("RequestTimeout", 400, True),
        ("TooManyRequests", 429, True),
        ("OperationAborted", 409, True),
        ("ConditionalRequestConflict", 409, True),
        ("TemporaryRedirect", 307, True),
        ("Redirect", 307, True),
        ("307", 307, True),
        ("PermanentRedirect", 301, False),
        ("301", 301, False),
        ("AuthorizationHeaderMalformed", 400, False),
        ("BucketAlreadyOwnedByYou", 409, False),
        ("RestoreAlreadyInProgress", 409, False),
        ("409", 409, False),
        ("KMS.DisabledException", 400, False),
        ("AccessDenied", 403, False),
        ("RequestHeaderSectionTooLarge", 403, False),
        ("NoSuchKey", 404, False),
        ("NotImplemented", 501, False),
    ],
)
def test_what_s3fs_makes_of_an_answer_is_judged_by_the_answer(code: str, status: int, passes: bool) -> None:
    errors = pytest.importorskip("s3fs.errors")
    answer = {"Error": {"Code": code, "Message": "refused"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    refused = ClientError(answer, "GetObject")
    assert is_passing(errors.translate_boto_error(refused)) is passes
    if status != 200 and code != "RequestTimeout":  # which S3 tells by its code alone
        assert is_passing(refused) is passes


def test_judging_touches_nothing_that_a_client_has_deprecated() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not is_passing(aiohttp.ClientResponseError(mock.Mock(), (), status=404))
        assert not is_passing(aiohttp.ClientResponseError(mock.Mock(), ()))


@pytest.mark.parametrize(
    "error",
    [
        AzureHttpResponseError("no answer"),
        GcsfsHttpError({}),
        GcsfsHttpError({"code": 7}),
        GcsfsHttpError({"code": "backendError"}),
        RequestError(503, "our own, raised on purpose"),
        FileNotFoundError(2, "gone"),
    ],
)
def test_what_tells_of_no_answer_of_a_server_is_not_taken_for_one(error: Exception) -> None:
    assert not is_passing(error)


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


def test_who_waits_for_the_answer_asks_once(waits: list[float]) -> None:
    calls = []

    @retries.tried_again
    def unreachable() -> None:
        calls.append(1)
        raise ConnectionError("nobody there")

    with retries.asked_once(), pytest.raises(ConnectionError) as caught:
        unreachable()
    assert (len(calls), waits) == (1, [])
    assert not hasattr(caught.value, "__notes__")
    with pytest.raises(ConnectionError):
        unreachable()
    assert len(calls) == 6


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


def test_what_comes_back_in_time_is_as_it_was_and_what_does_not_is_left_alone() -> None:
    def refuse() -> int:
        raise ConnectionRefusedError("no")

    released = threading.Event()
    with asked_once():
        assert answered_within(60, retries._ONCE.get)
    with pytest.raises(ConnectionRefusedError):
        answered_within(60, refuse)
    with pytest.raises(TimeoutError, match="does not answer within 0 s"):
        answered_within(0.1, lambda: released.wait(60))
    released.set()
