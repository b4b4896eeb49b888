"""The driver's memory grows by less than 100 bytes per document."""

from __future__ import annotations

import sys

import pytest

from tests.bench.bench_dedup_memory import bytes_per_document


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_driver_takes_less_than_100_bytes_per_document() -> None:
    found = bytes_per_document(2_000_000, copies=0.3, near=0.2, seed=1)
    del found["kept"]
    assert max(found.values()) < 100, found
