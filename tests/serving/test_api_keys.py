"""Key files are read line by line, keys are found by their digest, and rates are counted per key."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from cert_ray.errors import ConfigError, RequestError
from cert_ray.serving.api_keys import ApiKey, KeyRing, RateLimiter, read_key_file


def read(tmp_path: Path, text: str) -> KeyRing:
    (tmp_path / "keys").write_text(text)
    return read_key_file(str(tmp_path / "keys"))


def test_keys_are_plain_or_hashed_named_or_numbered(tmp_path: Path) -> None:
    hashed = hashlib.sha256(b"third").hexdigest()
    ring = read(tmp_path, f"# keys of the team\n\nfirst\nalice second 5/minute\n  bob\tsha256:{hashed}  \n")
    found = [ring.find(key) for key in (b"first", b"second", b"third")]
    assert [(key.name, key.rate) for key in found if key] == [("key-3", None), ("alice", "5/minute"), ("bob", None)]
    for stranger in (b"", b"fourth", b"alice", hashed.encode(), f"sha256:{hashed}".encode(), b"\xff"):
        assert ring.find(stranger) is None


def test_a_file_in_which_every_key_is_hashed_gives_no_access(tmp_path: Path) -> None:
    line = "sha256:" + hashlib.sha256(b"key").hexdigest()
    ring = read(tmp_path, line)
    assert ring.find(line.encode()) is None


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "no key in it"),
        ("# only a comment\n", "no key in it"),
        ("a b c d", "line 1 has 4 fields"),
        ("a SECRET often", "not a rate"),
        ("sha256:SECRET", "line 1: sha256: needs 64"),
        ("SECRET 60/minute", "line 1: the key looks like a rate"),
        ("name 60/minute SECRET", "line 1: the third field is not a rate"),
        ("a SECRET\na other", "the same name"),
        ("a SECRET\nb SECRET", "the same key"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_without_showing_keys(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as refused:
        read(tmp_path, text)
    assert "SECRET" not in str(refused.value)


def test_a_front_door_allows_its_share_of_a_rate() -> None:
    for rate, front_doors, share in (("10/hour", 3, 3), ("2/hour", 3, 1), ("10/2 hour", 2, 5)):
        quota = RateLimiter(rate, front_doors).count(ApiKey("key", b"1"))
        assert quota is not None
        assert (quota.limit, quota.remaining) == (share, share - 1)


def test_each_key_has_a_rate_of_its_own() -> None:
    rates = RateLimiter("2/hour")
    often, seldom = ApiKey("often", b"1", "100/hour"), ApiKey("seldom", b"2")
    for left in (1, 0):
        quota = rates.count(seldom)
        assert quota is not None
        assert (quota.limit, quota.remaining) == (2, left)
    with pytest.raises(RequestError, match="2 requests in 3600 s") as refused:
        rates.count(seldom)
    assert refused.value.status == 429
    assert refused.value.retry_after_s is not None
    assert 0 < refused.value.retry_after_s <= 3600
    quota = rates.count(often)
    assert quota is not None
    assert quota.remaining == 99
    assert RateLimiter(None).count(seldom) is None
