"""The filter: made where libseccomp is, absent with a word where it is not."""

from __future__ import annotations

import struct
import sys

import pytest

from cert_ray.errors import SandboxError
from cert_ray.evaluation import system_calls
from cert_ray.evaluation.sandbox import describe_isolation


def test_filters_are_whole_instructions_that_end_in_a_return() -> None:
    for network in (True, False):
        found = system_calls.find_filter(network=network)
        if found is None:
            pytest.skip("libseccomp is not installed")
        assert len(found) % 8 == 0
        assert struct.unpack("<HBBI", found[-8:])[0] & 7 == 6  # BPF_RET, linux/bpf_common.h
    assert system_calls.find_filter(network=True) != system_calls.find_filter(network=False)


def test_without_libseccomp_isolation_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyseccomp", None)
    system_calls._library.cache_clear()
    try:
        assert system_calls.find_filter(network=True) is None
        assert any("NO seccomp" in line for line in describe_isolation())
    finally:
        system_calls._library.cache_clear()


def test_a_libseccomp_that_does_not_know_clone3_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(library: object, network: bool) -> bytes:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(system_calls, "_library", lambda: sys)
    monkeypatch.setattr(system_calls, "_compiled", compiled)
    with pytest.raises(SandboxError, match=r"libseccomp 2\.5"):
        system_calls.find_filter(network=True)
