"""Archives give the same members in any wrapping; damage, size claims and bad paths end in drops."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import random
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from cert_ray.corpus.archives import read_archive
from cert_ray.corpus.inputs import InputKind, RawDocument, Record, SourceConfig, kind_of
from cert_ray.errors import InputError
from cert_ray.schemas import DropReason
from tests.corpus.hostile import tar_bytes

MEMBERS = [("pkg/a.py", "x = 1\n"), ("pkg/readme.md", "no"), ("pkg/b.py", "y = 'ü'\n")]


def read(path: Path, **options: object) -> list[Record]:
    config = SourceConfig.from_mapping({"inputs": [str(path)], **options}, "test")
    kind = kind_of(str(path))
    assert kind is not None
    return list(read_archive(str(path), str(path), kind, config))


def drops(records: list[Record]) -> list[tuple[str, DropReason]]:
    return [(record[0], record[2].reason) for record in records if not isinstance(record, RawDocument)]


def contents(records: list[Record]) -> list[tuple[str, bytes | str]]:
    return [(record.path, record.payload) for record in records if isinstance(record, RawDocument)]


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "tar": bytes,
    "tar.gz": gzip.compress,
    "tgz": gzip.compress,
    "tar.bz2": bz2.compress,
    "tar.xz": lzma.compress,
    "tar.zst": zstandard.compress,
}


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_every_compression_gives_the_same_members(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(COMPRESSIONS[suffix](tar_bytes(MEMBERS)))
    records = read(path)
    assert contents(records) == [("pkg/a.py", b"x = 1\n"), ("pkg/b.py", "y = 'ü'\n".encode())]
    assert drops(records) == []


@pytest.mark.parametrize("suffix", COMPRESSIONS)
@pytest.mark.parametrize("share", [0.35, 0.65, 0.95])
def test_truncated_tar_gives_what_stands_before_the_damage(tmp_path: Path, suffix: str, share: float) -> None:
    noise = random.Random(0)  # does not compress, so that a share of the bytes is about a share of the members
    members = [(f"{index}.py", noise.randbytes(20_000).hex()) for index in range(5)]
    whole = COMPRESSIONS[suffix](tar_bytes(members))
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(whole[: int(len(whole) * share)])
    records = read(path)
    found = contents(records)
    assert found == [(name, text.encode()) for name, text in members[: len(found)]]
    # What compresses in blocks loses the last one: nothing in tar, 900 kB (here all) in bzip2.
    assert len(found) <= int(5 * share)
    assert len(found) >= {"tar": int(5 * share), "tar.bz2": 0}.get(suffix, int(5 * share) - 2)
    assert drops(records) == [(path.name, DropReason.DAMAGED_ARCHIVE)]


def test_tar_cut_between_two_members_is_damaged_too(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(tar_bytes(MEMBERS)[: 2 * 512])
    assert contents(read(path)) == [("pkg/a.py", b"x = 1\n")]
    assert drops(read(path)) == [("x.tar", DropReason.DAMAGED_ARCHIVE)]


def test_members_that_are_not_regular_files_are_not_opened(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:
        for name, kind in (("link.py", tarfile.SYMTYPE), ("pipe.py", tarfile.FIFOTYPE), ("folder.py", tarfile.DIRTYPE)):
            header = tarfile.TarInfo(name)
            header.type, header.linkname = kind, "/etc/passwd"
            archive.addfile(header)
    assert drops(read(path)) == [("link.py", DropReason.UNREADABLE), ("pipe.py", DropReason.UNREADABLE)]


def test_huge_extended_header_is_not_read_into_memory(tmp_path: Path) -> None:
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, 8 << 30
    path = tmp_path / "x.tar"
    path.write_bytes(tar_bytes(MEMBERS[:1])[:1024] + header.tobuf(tarfile.GNU_FORMAT) + bytes(4096))
    records = read(path)
    assert contents(records) == [("pkg/a.py", b"x = 1\n")]
    assert drops(records) == [("x.tar", DropReason.DAMAGED_ARCHIVE)]


@pytest.mark.parametrize("name", ["x.zip", "x.tar.zst"])
def test_member_over_the_limit_is_dropped_and_the_next_one_read(tmp_path: Path, name: str) -> None:
    members = [("big.py", "#" * 5_000), ("exact.py", "#" * 1_000), ("small.py", "x")]
    path = tmp_path / name
    path.write_bytes(zstandard.compress(tar_bytes(members)) if name.endswith("zst") else zip_bytes(members))
    records = read(path, max_file_bytes=1_000)
    assert drops(records) == [("big.py", DropReason.TOO_LARGE)]
    assert [path for path, _ in contents(records)] == ["exact.py", "small.py"]


def zip_bytes(members: list[tuple[str, str]]) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return sink.getvalue()


def test_zip_member_that_claims_to_be_small_is_bounded(tmp_path: Path) -> None:
    honest = zip_bytes([("bomb.py", "#" * 3_000_000), ("good.py", "x")])
    claimed = honest.replace((3_000_000).to_bytes(4, "little"), (10).to_bytes(4, "little"))
    assert claimed != honest
    path = tmp_path / "x.zip"
    path.write_bytes(claimed)
    records = read(path)
    assert [name for name, _ in drops(records)] == ["bomb.py"]
    assert contents(records) == [("good.py", b"x")]


def test_damage_inside_one_zip_member_costs_that_member_alone(tmp_path: Path) -> None:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("a.py", "first content")
        archive.writestr("b.py", "second content")
    path = tmp_path / "x.zip"
    path.write_bytes(sink.getvalue().replace(b"first", b"fisrt"))
    assert drops(read(path)) == [("a.py", DropReason.DAMAGED_ARCHIVE)]
    assert contents(read(path)) == [("b.py", b"second content")]


def test_zip_of_an_unknown_version_is_damaged(tmp_path: Path) -> None:
    content = bytearray(zip_bytes(MEMBERS))
    content[content.index(b"PK\x01\x02") + 6] = 205  # "version needed to extract": 20.5, found by fuzzing
    path = tmp_path / "x.zip"
    path.write_bytes(content)
    assert drops(read(path)) == [("x.zip", DropReason.DAMAGED_ARCHIVE)]


@pytest.mark.parametrize("name", ["../a.py", "/a.py", "x/../../a.py", "C:/a.py", "..\\a.py", "C:\\a.py"])
def test_unsafe_member_paths_are_dropped(tmp_path: Path, name: str) -> None:
    (tmp_path / "x.tar").write_bytes(tar_bytes([(name, "x")]))
    (tmp_path / "x.zip").write_bytes(zip_bytes([(name, "x")]))
    for archive in ("x.tar", "x.zip"):
        assert [reason for _, reason in drops(read(tmp_path / archive))] == [DropReason.UNSAFE_MEMBER_PATH]


@pytest.mark.parametrize(
    ("name", "project"),
    [
        ("numpy-1.26.4.tar.gz", "numpy"),
        ("scikit-learn-1.4.0.zip", "scikit-learn"),
        ("typing_extensions-4.9.0-py3-none-any.whl", "typing_extensions"),
        ("zope.interface-6.1-cp311-cp311-manylinux_2_17_x86_64.whl", "zope.interface"),
        ("crawl.tar.gz", None),
        ("crawl-part-7.zip.tar", None),
    ],
)
def test_distributions_are_named_by_their_project(tmp_path: Path, name: str, project: str | None) -> None:
    path = tmp_path / name
    if kind_of(name) is InputKind.ZIP:
        path.write_bytes(zip_bytes(MEMBERS))
    else:
        path.write_bytes(gzip.compress(tar_bytes(MEMBERS)) if name.endswith("gz") else tar_bytes(MEMBERS))
    found = {record.repository for record in read(path) if isinstance(record, RawDocument)}
    assert found == {project}


def test_failing_store_is_an_error_not_damage(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="reading failed"):
        read(tmp_path / "gone.tar")
