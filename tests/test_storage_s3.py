"""Storage over S3: the real client against an S3 of this machine, which now and then refuses."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import xxhash

from cert_ray import storage
from tests.chaos.s3 import BUCKET, S3, started_s3

FOLDER = f"s3://{BUCKET}/run"
# botocore and moto say these of themselves.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]


@pytest.fixture(scope="module")
def server() -> Iterator[S3]:
    with pytest.MonkeyPatch.context() as environment, started_s3() as s3:
        for name, value in s3.variables.items():
            environment.setenv(name, value)
        yield s3


def test_what_is_written_is_read_listed_and_removed(server: S3) -> None:
    written = storage.write_bytes(f"{FOLDER}/a/b.bin", b"12345")
    assert (written.size_bytes, written.checksum) == (5, xxhash.xxh3_128_hexdigest(b"12345"))
    assert storage.checksum(f"{FOLDER}/a/b.bin") == written
    assert storage.read_bytes(f"{FOLDER}/a/b.bin") == b"12345"
    (first,) = storage.list_files(f"{FOLDER}/a")
    assert (first.url, first.size_bytes) == (f"{FOLDER}/a/b.bin", 5)
    storage.write_bytes(f"{FOLDER}/a/b.bin", b"54321")
    (second,) = storage.list_files(f"{FOLDER}/a")
    assert second.version != first.version != ""
    storage.remove(f"{FOLDER}/a/b.bin")
    assert not storage.exists(f"{FOLDER}/a/b.bin")


def test_a_missing_object_is_a_missing_file(server: S3) -> None:
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(f"{FOLDER}/none")


def test_refused_requests_are_tried_again(server: S3) -> None:
    server.refuse_every = 3
    try:
        for number in range(5):
            storage.write_text(f"{FOLDER}/many/{number}", str(number))
        assert [storage.read_text(f"{FOLDER}/many/{number}") for number in range(5)] == list("01234")
    finally:
        server.refuse_every = None
    assert server.refused >= 3
