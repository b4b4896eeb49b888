"""Who may ask, and how often: named API keys, and a rate limit for each of them.

In: a key file, and the key that a request carries. Out: the key's name, or a refusal. HTTP is not read here.

A key file has one key per line; lines that begin with `#` are comments:

    KEY                         named after its line, `key-3`
    NAME KEY
    NAME KEY 60/minute          with a rate limit of its own, in the notation of `limits`

KEY is the key itself, or `sha256:` and its hexadecimal SHA-256, so that the file gives nobody access. Keys must be
random and long (`openssl rand -hex 32`): then an unsalted digest is enough. Passwords are not keys.

Rates are counted in this process: each of `n` front doors allows an `n`th of the rate, and at least one request.
Requests are counted, not tokens.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import time
from dataclasses import dataclass

from limits import RateLimitItem
from limits import parse as parse_limit
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

from cert_ray import storage
from cert_ray.errors import ConfigError, RequestError

_HASHED = re.compile(r"sha256:([0-9a-f]{64})")


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One key: its name, its SHA-256, and its rate if it has one of its own."""

    name: str
    digest: bytes
    rate: str | None = None


@dataclass(frozen=True, slots=True)
class Quota:
    """What is left of a key's rate: requests, and seconds until the oldest counted one no longer counts."""

    limit: int
    remaining: int
    reset_s: float


class KeyRing:
    """The keys of a server."""

    def __init__(self, keys: tuple[ApiKey, ...]) -> None:
        self._keys = keys

    def find(self, sent: bytes) -> ApiKey | None:
        """The key that equals `sent`, if any. Every key is compared, in constant time: timing reveals nothing."""
        digest = hashlib.sha256(sent).digest()
        found = [key for key in self._keys if hmac.compare_digest(digest, key.digest)]
        return found[0] if found else None


class RateLimiter:
    """Counts the requests of each key in a moving window."""

    def __init__(self, default_rate: str | None, front_doors: int = 1) -> None:
        """`default_rate` is for keys without a rate of their own; None does not limit them.

        This process counts for one of `front_doors`, and allows its share of the rate.
        """
        self._front_doors = front_doors
        self._default_rate = default_rate
        self._limiter = MovingWindowRateLimiter(MemoryStorage())

    def count(self, key: ApiKey) -> Quota | None:
        """Count one request, and say what is left; None without a limit.

        Raises:
            RequestError: 429 when nothing was left, saying when to try again.
        """
        rate = key.rate or self._default_rate
        if rate is None:
            return None
        limit = parse_rate(rate)
        limit = type(limit)(max(1, limit.amount // self._front_doors), limit.multiples)
        allowed = self._limiter.hit(limit, key.name)
        reset_at, remaining = self._limiter.get_window_stats(limit, key.name)
        quota = Quota(limit.amount, remaining, max(0.0, reset_at - time.time()))
        if not allowed:
            problem = f"More than {limit.amount} requests in {limit.get_expiry()} s with the key {key.name!r}."
            raise RequestError(429, problem, None, "rate_limit_exceeded", retry_after_s=quota.reset_s)
        return quota


def parse_rate(rate: str) -> RateLimitItem:
    """A rate, written like `60/minute` or `10/second`.

    Raises:
        ConfigError: when it is not a rate.
    """
    try:
        return parse_limit(rate)
    except ValueError as error:
        raise ConfigError(f"rate {rate!r}: not a rate. Write it as 60/minute or 10/second.") from error


def _is_rate(text: str) -> bool:
    try:
        parse_rate(text)
    except ConfigError:
        return False
    return True


def read_key_file(url: str) -> KeyRing:
    """The keys in the file at `url`.

    Raises:
        ConfigError: when the file holds no key, or a bad line; the error gives the line's number, never its text.
    """
    keys: list[ApiKey] = []
    for number, line in enumerate(storage.read_text(url).splitlines(), start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            keys.append(_read_line(line.split(), number, url))
    if not keys:
        raise ConfigError(f"api_keys_file={url!r}: no key in it. Write one key per line, or leave the option out.")
    for what, values in (("name", [key.name for key in keys]), ("key", [key.digest for key in keys])):
        if len(set(values)) < len(values):
            raise ConfigError(f"api_keys_file={url!r}: the same {what} appears twice. Give each key one line.")
    return KeyRing(tuple(keys))


def _read_line(fields: list[str], number: int, url: str) -> ApiKey:
    if len(fields) > 3:
        raise ConfigError(f"api_keys_file={url!r}: line {number} has {len(fields)} fields. Write NAME KEY RATE.")
    name, text = (f"key-{number}", fields[0]) if len(fields) == 1 else (fields[0], fields[1])
    rate = fields[2] if len(fields) == 3 else None
    where = f"api_keys_file={url!r}: line {number}"
    if rate is not None and not _is_rate(rate):
        raise ConfigError(f"{where}: the third field is not a rate. Write NAME KEY RATE, the rate as 60/minute.")
    if _is_rate(text):
        raise ConfigError(f"{where}: the key looks like a rate, so it could be guessed. Write NAME KEY RATE.")
    hashed = _HASHED.fullmatch(text)
    if hashed is None and text.startswith("sha256:"):
        raise ConfigError(f"api_keys_file={url!r}: line {number}: sha256: needs 64 lower-case hexadecimal digits.")
    return ApiKey(name, bytes.fromhex(hashed[1]) if hashed else hashlib.sha256(text.encode()).digest(), rate)
