"""Storage over S3: the real client against an S3 of this machine, which now and then refuses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.fs
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


LOOKS = [storage.exists, storage.is_folder, storage.list_files, storage.list_folders, storage.list_file_names]


@pytest.mark.parametrize("look", LOOKS)
def test_what_another_process_wrote_after_a_look_is_found(server: S3, look: Callable[[str], object]) -> None:
    folder = f"looked/{look.__name__}"
    url = f"s3://{BUCKET}/{folder}"
    storage.write_text(f"{url}/first", "1")
    look(url)
    assert not storage.exists(f"{url}/second")
    server.client().put_object(Bucket=BUCKET, Key=f"{folder}/second", Body=b"2")
    server.client().put_object(Bucket=BUCKET, Key=f"{folder}/below/third", Body=b"3")
    assert storage.exists(f"{url}/second")
    assert storage.read_text(f"{url}/second") == "2"
    assert storage.list_file_names(url) == ["first", "second"]
    assert storage.list_folders(url) == ["below"]
    assert [storage.name_of(entry) for entry in storage.find(f"{url}/*")] == ["below", "first", "second"]


def test_a_folder_that_arrow_copies_as_ray_train_does_is_whole(server: S3, tmp_path: Path) -> None:
    part = tmp_path / "part"
    (part / "engine").mkdir(parents=True)
    contents = {"engine/state.pt": b"s" * 200_000, "part-00000.json": b"{}", "empty": b""}
    for name, content in contents.items():
        (part / name).write_bytes(content)
    path, filesystem = storage.for_arrow(f"{FOLDER}/step-000001")
    assert filesystem is not None
    filesystem.create_dir(path)
    pyarrow.fs.copy_files(
        str(part), path, source_filesystem=pyarrow.fs.LocalFileSystem(), destination_filesystem=filesystem
    )
    assert {name: storage.read_bytes(f"{FOLDER}/step-000001/{name}") for name in contents} == contents
    back = tmp_path / "back"
    back.mkdir()
    storage.copy_files_to_local(f"{FOLDER}/step-000001", back)
    assert {file.name: file.read_bytes() for file in back.iterdir()} == {"part-00000.json": b"{}", "empty": b""}


def test_refused_requests_are_tried_again(server: S3) -> None:
    server.refuse_every = 3
    try:
        for number in range(5):
            storage.write_text(f"{FOLDER}/many/{number}", str(number))
        assert [storage.read_text(f"{FOLDER}/many/{number}") for number in range(5)] == list("01234")
    finally:
        server.refuse_every = None
    assert server.refused >= 3
