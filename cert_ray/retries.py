"""Retries of transient storage errors: the one policy for tasks and driver.

In: a call that may be repeated. Out: what it returns, or its error if that is not transient or came every time. Clients
of object stores have already retried by themselves. Each call of `cert_ray.storage` is retried here, and so is a work
unit as a whole, because it reads streams. An error that came every time is not retried by an outer call.
"""

from __future__ import annotations

import errno
import functools
import logging
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from typing import ParamSpec, TypeVar

from cert_ray.errors import CertRayError, InputError

P = ParamSpec("P")
R = TypeVar("R")

logger = logging.getLogger(__name__)

# Assumed. Each varies by up to 20%, so that tasks that failed together do not retry together.
_WAITS_S = (2, 4, 8, 16)
_ONCE: ContextVar[bool] = ContextVar("once", default=False)
_GAVE_UP = f"It was tried {len(_WAITS_S) + 1} times."
# Errors that waiting does not cure: full, read-only, a socket (ENXIO), our own use (EMFILE is a leak, ENOTEMPTY a
# folder that others write to), or a refused request (a store's "bad request" is EINVAL).
_LASTING = {
    errno.ENOSPC,
    errno.ENXIO,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EINVAL,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.ENOSYS,
    errno.ENOTEMPTY,
    errno.EMFILE,
}
# Names of transient errors, or of their base classes, in drivers of remote storage; none is one of Python's own
# `OSError`s. httpx's ReadError is a NetworkError; tarfile's ReadError, in contrast, means damage.
_PASSING_NAMES = re.compile(
    r"(?:Connection|Timeout)\w*Error$"  # botocore, urllib3, requests, aiohttp
    r"|^(?:Timeout|ChunkedEncodingError)$"  # requests
    r"|^(?:TimeoutException|NetworkError|RemoteProtocolError)$"  # httpx
    r"|^(?:ServiceRequestError|ServiceResponseError)$"  # azure: not sent, or no valid answer
    r"|^(?:ClientPayloadError|ResponseStreamingError|IncompleteRead(?:Error)?)$"  # an answer that broke off: aiohttp,
    # botocore, urllib and azure
)
# Where errors of drivers keep the HTTP status: azure, aiohttp and urllib, gcsfs. requests, httpx and huggingface_hub
# have it on the error's response. The first that exists is used: aiohttp warns when its `code` is read.
_STATUS_NAMES = ("status_code", "status", "code")
# Temporarily elsewhere (S3, while a new bucket's name spreads), timed out, too many requests, and the server's faults,
# except "not implemented". Permanently elsewhere (301, 308) means a wrong region or endpoint: botocore has followed it
# if it could.
_PASSING_STATUSES = {307, 408, 429, *range(500, 600)} - {501}
# A 409 is permanent, except these of S3: another request was changing the same object at that moment.
_PASSING_CODES = {"OperationAborted", "ConditionalRequestConflict"}


# Packages that raise errors of their own types: s3fs passes on botocore's when credentials are missing.
_STORES = (
    *("botocore.", "aiobotocore.", "aiohttp.", "requests.", "httpx.", "gcsfs.", "azure.", "adlfs."),
    *("google.api_core.", "google.auth.", "google.cloud."),
)


def is_of_storage(error: BaseException) -> bool:
    """Whether `error` comes from a disk, the network, a driver of remote storage, or its client."""
    if isinstance(error, OSError):
        return not type(error).__module__.startswith("ray.")  # Ray's TimeoutError is an OSError, too
    return _is_of_a_client(error) or _wrapped_by_adlfs(error) is not None


def _is_of_a_client(error: BaseException) -> bool:
    return any(f"{kind.__module__}.".startswith(_STORES) for kind in type(error).__mro__)


def _wrapped_by_adlfs(error: BaseException) -> BaseException | None:
    """The client's error that adlfs turned into a plain one, as it does when it writes, removes or connects."""
    cause = error.__cause__
    return cause if type(error) in (RuntimeError, ValueError) and cause and _is_of_a_client(cause) else None


def is_passing(error: BaseException) -> bool:
    """Whether `error` is transient, as networked storage raises now and then; a full disk stays full.

    A missing file and a denied permission have other types, or other HTTP statuses. An `InputError` is judged by its
    cause, and so is an `OSError` that a client made from the store's answer.
    """
    if _GAVE_UP in getattr(error, "__notes__", ()):
        return False
    if isinstance(error, InputError):
        return error.__cause__ is not None and is_passing(error.__cause__)
    if isinstance(error, CertRayError):
        return False
    if type(error) is OSError:
        if error.errno in _LASTING or _is_forbidden_by_gcsfs(error):
            return False
        # s3fs turns both a conflict and "slow down" into EBUSY, and every code that it does not know into EIO.
        return error.__cause__ is None or _is_passing_answer(error.__cause__) is not False
    if (wrapped := _wrapped_by_adlfs(error)) is not None:
        return is_passing(wrapped)
    if (passes := _is_passing_answer(error)) is not None:
        return passes
    return any(_PASSING_NAMES.search(kind.__name__) for kind in type(error).__mro__)


def _is_passing_answer(error: BaseException) -> bool | None:
    """Whether the HTTP answer in `error` is transient; None if `error` holds no answer."""
    status, response = _http_status(error), getattr(error, "response", None)
    if status is None:
        return None
    code = response.get("Error", {}).get("Code") if isinstance(response, Mapping) else None
    return status in _PASSING_STATUSES or code in _PASSING_CODES


def _http_status(error: BaseException) -> int | None:
    """The status of the HTTP answer in `error`: 3xx, 4xx or 5xx; None if `error` holds none."""
    for holder in (error, getattr(error, "response", None)):
        if isinstance(holder, Mapping):  # botocore's response
            value = holder.get("ResponseMetadata", {}).get("HTTPStatusCode")
        else:
            value = next((getattr(holder, name) for name in _STATUS_NAMES if hasattr(holder, name)), None)
        if isinstance(value, int | str) and str(value).isdecimal() and 300 <= int(value) < 600:
            return int(value)
    return None


def _is_forbidden_by_gcsfs(error: OSError) -> bool:
    """Whether gcsfs made `error` from a 403, which only its text says."""
    return error.errno is None and str(error).startswith("Forbidden: ")


def tried_again(call: Callable[P, R]) -> Callable[P, R]:
    """`call`, tried up to five times over half a minute while its errors are transient; it must be safe to repeat."""

    @functools.wraps(call)
    def patient(*args: P.args, **options: P.kwargs) -> R:
        if _ONCE.get():
            return call(*args, **options)
        for wait_s in _WAITS_S:
            try:
                return call(*args, **options)
            except Exception as error:
                if not is_passing(error):
                    raise
                logger.warning("%s, tried again: %s: %s", call.__name__, type(error).__name__, error)
            _wait(wait_s * random.uniform(0.8, 1.2))
        try:
            return call(*args, **options)
        except Exception as error:
            if is_passing(error):
                error.add_note(_GAVE_UP)
            raise

    return patient


@contextmanager
def asked_once() -> Iterator[None]:
    """Disable retries in the block: somebody is waiting, and an error now is better than an answer later."""
    token = _ONCE.set(True)
    try:
        yield
    finally:
        _ONCE.reset(token)


def answered_within(limit_s: float, call: Callable[[], R]) -> R:
    """What `call` returns or raises. It runs in its own thread, which is abandoned if it does not finish in time.

    For storage or a cluster's head that accepts connections but never answers: their clients wait for a long time.

    Raises:
        TimeoutError: when `call` takes longer than `limit_s`.
    """
    answer: Future[R] = Future()

    def ask() -> None:
        try:
            answer.set_result(call())
        except Exception as error:  # noqa: BLE001 - whoever waits gets it
            answer.set_exception(error)

    threading.Thread(target=copy_context().run, args=[ask], name="cert-ray-asking", daemon=True).start()
    if not wait([answer], limit_s).done:
        raise TimeoutError(f"it does not answer within {limit_s:.0f} s")
    return answer.result()


def _wait(seconds: float) -> None:
    time.sleep(seconds)
