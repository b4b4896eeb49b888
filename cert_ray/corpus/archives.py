"""Archives, read as streams: tar in any compression, zip, wheels and source distributions.

In: the URL of an archive. Out: its regular members whose names match, in member order, each at most `max_file_bytes`
long, whatever its header claims. Nothing is written to disk, and at most one member is held in memory. A damaged
archive yields the members before the damage, then one `DAMAGED_ARCHIVE` drop. A zip has its list of members at the end,
so one that was cut short yields only that drop. Archives inside archives are not opened.

Arrow decompresses gzip, bzip2 and zstd (unlike others, it notices that a stream was cut short), `lzma` decompresses xz.
"""

from __future__ import annotations

import io
import lzma
import re
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from tarfile import EOFHeaderError  # type: ignore[attr-defined]  # documented by its base, HeaderError
from typing import IO, Any, Self

import pyarrow as pa

from cert_ray import storage
from cert_ray.corpus.inputs import InputKind, Matcher, RawDocument, Record, SourceConfig
from cert_ray.errors import InputError
from cert_ray.schemas import Dropped, DropReason

# What reading damaged bytes raises, by fuzzing. NotImplementedError: a flipped bit names an unknown method or type.
DAMAGE = (
    OSError,
    EOFError,
    ValueError,
    OverflowError,
    NotImplementedError,
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
)
_COMPRESSIONS = {".gz": "gzip", ".tgz": "gzip", ".bz2": "bz2", ".tbz2": "bz2", ".zst": "zstd", ".tzst": "zstd"}
# Bytes read per call of Arrow's decompressors. At damage, at most this much of the good data before it is lost.
_SALVAGE_BYTES = 512
# Real extended headers and long names are below 100 kB; a larger one would be read into memory whole. Assumed.
_MAX_HEADER_BYTES = 1 << 20
_EXTENDED_HEADERS = {
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
}
# name-version.tar.gz and name-version-tags.whl, as the packaging standards spell them.
_DISTRIBUTION = re.compile(
    r"^(?P<name>[A-Za-z0-9][\w.]*(?:-[A-Za-z_][\w.]*)*)-\d[^-]*(?:-.+\.whl|\.whl|\.tar\.gz|\.zip)$"
)


def read_archive(url: str, source: str, kind: InputKind, config: SourceConfig) -> Iterator[Record]:
    """The matching members of the archive at `url`; `source` names it in the records.

    Raises:
        InputError: when the store or disk fails.
    """
    distribution = _DISTRIBUTION.match(storage.name_of(source))
    repository = distribution["name"] if distribution else None
    matches = config.matcher()
    try:
        with open_bytes(url) as stream:
            members = (
                _tar_members(stream, url, matches, config)
                if kind is InputKind.TAR
                else _zip_members(stream, matches, config)
            )
            for path, content in members:
                if isinstance(content, Dropped):
                    yield path, source, content
                else:
                    yield RawDocument(path, source, content, repository)
    except DAMAGE as error:
        yield storage.name_of(source), source, Dropped(DropReason.DAMAGED_ARCHIVE, str(error) or type(error).__name__)


@contextmanager
def open_bytes(url: str) -> Iterator[IO[bytes]]:
    """The bytes of `url`. A fault of the disk or store raises `InputError`, so that it is not mistaken for damage."""
    try:
        opened = storage.open_read(url)
        stream = opened.__enter__()
    except OSError as error:
        raise _store_failed(url, error) from error
    try:
        yield io.BufferedReader(_Store(stream, url), buffer_size=1 << 18)
    finally:
        opened.__exit__(None, None, None)


def _store_failed(url: str, error: OSError) -> InputError:
    return InputError(
        url, f"reading failed: {error}", "Check the disk or store and run again; finished shards are kept."
    )


class _Store(io.RawIOBase):
    """A stream of `storage` whose faults raise `InputError`."""

    def __init__(self, stream: IO[bytes], url: str) -> None:
        super().__init__()
        self._stream, self._url = stream, url

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._stream.seekable()

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        return self._stream.tell()

    def readinto(self, buffer: Any, /) -> int:
        try:
            block = self._stream.read(len(buffer))
        except OSError as error:
            raise _store_failed(self._url, error) from error
        buffer[: len(block)] = block
        return len(block)


def decompressed(stream: IO[bytes], url: str) -> io.RawIOBase | IO[bytes]:
    """`stream`, decompressed according to the name in `url`. Reads return what precedes any damage, then raise."""
    name = url.lower()
    if name.endswith((".xz", ".txz")):
        return _Salvaged(lzma.LZMAFile(stream))
    for suffix, codec in _COMPRESSIONS.items():
        if name.endswith(suffix):
            return _Salvaged(pa.CompressedInputStream(pa.PythonFile(stream, mode="r"), codec))
    return stream


class _Salvaged(io.RawIOBase):
    """A decompressor's stream that returns what it has before it raises."""

    def __init__(self, stream: Any) -> None:
        super().__init__()
        self._stream = stream
        self._damage: Exception | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer)
        filled = 0
        while filled < len(view) and self._damage is None:
            try:
                count = self._stream.readinto(view[filled : filled + _SALVAGE_BYTES])
            except DAMAGE as error:
                self._damage = error
                break
            if not count:
                break
            filled += count
        if self._damage is not None and not filled:
            raise self._damage
        return filled


class _Header(tarfile.TarInfo):
    """A tar header that refuses huge extended headers, and tells its archive when it is the end mark."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        header = super().frombuf(buf, encoding, errors)
        if header.type in _EXTENDED_HEADERS and header.size > _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"an extended header of {header.size} bytes")
        return header

    @classmethod
    def fromtarfile(cls, tarfile: Any) -> Self:
        try:
            return super().fromtarfile(tarfile)
        except EOFHeaderError:
            tarfile.ended = True
            raise


class _Tar(tarfile.TarFile):
    """A tar that knows whether its end mark was read. Without it the tar was cut short, which `tarfile` ignores."""

    tarinfo = _Header
    ended = False


def _tar_members(
    stream: IO[bytes], url: str, matches: Matcher, config: SourceConfig
) -> Iterator[tuple[str, bytes | Dropped]]:
    with _Tar.open(fileobj=decompressed(stream, url), mode="r|") as archive:
        assert isinstance(archive, _Tar)
        while (member := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # otherwise it keeps every header of the archive
            path = member.name
            if not matches(path) or member.isdir():
                continue
            shown = path.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
            if _is_unsafe(path):
                yield shown, Dropped(DropReason.UNSAFE_MEMBER_PATH)
            elif not member.isreg():
                yield shown, Dropped(DropReason.UNREADABLE, "not a regular file")
            elif member.size > config.max_file_bytes:
                yield shown, Dropped(DropReason.TOO_LARGE)
            else:
                content = archive.extractfile(member)
                assert content is not None, "regular members have content"
                yield shown, content.read()
        if not archive.ended:
            raise tarfile.ReadError("the archive ends without its end mark")


def _zip_members(stream: IO[bytes], matches: Matcher, config: SourceConfig) -> Iterator[tuple[str, bytes | Dropped]]:
    with zipfile.ZipFile(stream) as archive:
        for member in archive.infolist():
            if not matches(member.filename) or member.is_dir():
                continue
            path = member.filename.encode("utf-8", "replace").decode()
            if _is_unsafe(path):
                yield path, Dropped(DropReason.UNSAFE_MEMBER_PATH)
            elif stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG):
                yield path, Dropped(DropReason.UNREADABLE, "not a regular file")
            else:
                yield path, _read_zip_member(archive, member, config.max_file_bytes)


def _read_zip_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, max_bytes: int) -> bytes | Dropped:
    """A member's content. Damage inside it drops this member only: the list of members says where the next one is."""
    if member.flag_bits & 1:
        return Dropped(DropReason.UNREADABLE, "encrypted")
    try:
        with archive.open(member) as content:
            read = content.read(max_bytes + 1)  # the size in the header may be wrong
    except NotImplementedError as error:
        return Dropped(DropReason.UNREADABLE, str(error))
    except DAMAGE as error:
        return Dropped(DropReason.DAMAGED_ARCHIVE, str(error) or type(error).__name__)
    return Dropped(DropReason.TOO_LARGE) if len(read) > max_bytes else read


def _is_unsafe(path: str) -> bool:
    """Whether unpacking `path` could write outside of the target folder, on any system."""
    parts = path.replace("\\", "/").split("/")
    return parts[0] == "" or ".." in parts or parts[0].endswith(":")
