"""Errors of storage that pass, and trying again: the one policy, for tasks and for the driver.

In: a call that may be made again. Out: what it returns, or its error when that is none that passes, or came every time.
Clients of object stores have tried again by themselves before. Each call of `cert_ray.storage` is tried again here, and
so is a work unit as a whole, for what it reads as a stream; an error that came every time is not tried again outside.
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

# Assumed; each 20% more or less, so that tasks that failed together do not come together again.
_WAITS_S = (2, 4, 8, 16)
_ONCE: ContextVar[bool] = ContextVar("once", default=False)
_GAVE_UP = f"It was tried {len(_WAITS_S) + 1} times."
# What stays as it is: full, for reading only, a socket (ENXIO), in use by ourselves (EMFILE is a leak, ENOTEMPTY a
# folder that others write to), or asked in a way that is refused (a store's "bad request" is EINVAL).
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
# What drivers of remote storage call what passes, themselves or in what it is derived from; none of it is an `OSError`
# that Python knows. httpx's ReadError is a NetworkError; tarfile has a ReadError, too, which tells of damage.
_PASSING_NAMES = re.compile(
    r"(?:Connection|Timeout)\w*Error$"  # botocore, urllib3, requests, aiohttp
    r"|^(?:Timeout|ChunkedEncodingError)$"  # requests
    r"|^(?:TimeoutException|NetworkError|RemoteProtocolError)$"  # httpx
    r"|^(?:ServiceRequestError|ServiceResponseError)$"  # azure: not sent, or no answer that it understood
    r"|^(?:ClientPayloadError|ResponseStreamingError|IncompleteRead(?:Error)?)$"  # an answer that broke off: aiohttp,
    # botocore, urllib and azure
)
# Where drivers keep the HTTP status of an answer that refuses: azure, aiohttp and urllib, gcsfs; requests, httpx and
# huggingface_hub have it on the error's response. The first that there is counts: aiohttp warns of its `code`.
_STATUS_NAMES = ("status_code", "status", "code")
# Elsewhere for the moment (S3, while a new bucket's name spreads), waited too long, asked too often, and what is the
# server's fault, but for what it does not implement. Elsewhere for good (301, 308) is a wrong region or endpoint:
# botocore has followed it where it could.
_PASSING_STATUSES = {307, 408, 429, *range(500, 600)} - {501}
# A 409 stays, but for these of S3's: another request was changing the same thing at that moment.
_PASSING_CODES = {"OperationAborted", "ConditionalRequestConflict"}


# Packages whose errors need not be ones that Python knows: s3fs passes botocore's on where credentials are missing.
_STORES = (
    *("botocore.", "aiobotocore.", "aiohttp.", "requests.", "httpx.", "gcsfs.", "azure.", "adlfs."),
    *("google.api_core.", "google.auth.", "google.cloud."),
)


def is_of_storage(error: BaseException) -> bool:
    """Whether `error` is one of a disk, the network, a driver of remote storage, or its client."""
    if isinstance(error, OSError):
        return not type(error).__module__.startswith("ray.")  # whose TimeoutError is an OSError, too
    return _is_of_a_client(error) or _wrapped_by_adlfs(error) is not None


def _is_of_a_client(error: BaseException) -> bool:
    return any(f"{kind.__module__}.".startswith(_STORES) for kind in type(error).__mro__)


def _wrapped_by_adlfs(error: BaseException) -> BaseException | None:
    """The client's error of which adlfs made a plain one, as it does where it writes, removes or connects."""
    cause = error.__cause__
    return cause if type(error) in (RuntimeError, ValueError) and cause and _is_of_a_client(cause) else None


def is_passing(error: BaseException) -> bool:
    """Whether `error` is one that storage over a network gives now and then; a full disk stays full.

    A missing file and a refused permission are errors of other types, or of other HTTP statuses. An input that could
    not be read is judged by why, and so is an `OSError` that a client made of the store's answer.
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
        # s3fs makes EBUSY of a conflict as of "slow down", and EIO of every code that it does not know.
        return error.__cause__ is None or _is_passing_answer(error.__cause__) is not False
    if (wrapped := _wrapped_by_adlfs(error)) is not None:
        return is_passing(wrapped)
    if (passes := _is_passing_answer(error)) is not None:
        return passes
    return any(_PASSING_NAMES.search(kind.__name__) for kind in type(error).__mro__)


def _is_passing_answer(error: BaseException) -> bool | None:
    """Whether the answer that `error` tells of is one that passes; None where it tells of none."""
    status, response = _http_status(error), getattr(error, "response", None)
    if status is None:
        return None
    code = response.get("Error", {}).get("Code") if isinstance(response, Mapping) else None
    return status in _PASSING_STATUSES or code in _PASSING_CODES


def _http_status(error: BaseException) -> int | None:
    """The status of the answer that `error` tells of: 3xx, 4xx or 5xx; None where it tells of none."""
    for holder in (error, getattr(error, "response", None)):
        if isinstance(holder, Mapping):  # botocore's response
            value = holder.get("ResponseMetadata", {}).get("HTTPStatusCode")
        else:
            value = next((getattr(holder, name) for name in _STATUS_NAMES if hasattr(holder, name)), None)
        if isinstance(value, int | str) and str(value).isdecimal() and 300 <= int(value) < 600:
            return int(value)
    return None


def _is_forbidden_by_gcsfs(error: OSError) -> bool:
    """Whether gcsfs made it of a 403, which it tells in the text alone."""
    return error.errno is None and str(error).startswith("Forbidden: ")


def tried_again(call: Callable[P, R]) -> Callable[P, R]:
    """`call`, made up to five times, over half a minute, while it raises what passes; it must bear being repeated."""

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
    """In the block nothing is tried again here: somebody waits for the answer, be it that there is none."""
    token = _ONCE.set(True)
    try:
        yield
    finally:
        _ONCE.reset(token)


def answered_within(limit_s: float, call: Callable[[], R]) -> R:
    """What `call` returns, or raises, in a thread of its own, which is left alone where it does not come back in time.

    For what takes connections and says nothing, storage or a cluster's head: their clients wait for long.

    Raises:
        TimeoutError: when that took longer than `limit_s`.
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
