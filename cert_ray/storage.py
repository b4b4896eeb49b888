"""Files by URL, local or remote: list, read, write. The only module that builds paths.

In and out: URLs as strings (`/data/x`, `s3://bucket/x`, `hf://...`), anything fsspec opens. On local disks, a write
becomes visible whole or not at all (temporary name, then rename); object stores guarantee this for a single object.
`retries` repeats calls after transient errors.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import fsspec
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import xxhash
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from cert_ray.errors import ConfigError, InputError, StorageFullError
from cert_ray.retries import tried_again

_CHECKSUM_BLOCK_BYTES = 4 << 20
_PARTIAL_SUFFIX = ".partial"
_ROWS_AT_A_TIME = 128  # read to pick some of them: a few hundred kilobytes of source; assumed
# What to install for a scheme that fsspec cannot open on its own.
_DRIVERS = {
    "s3": "'cert-ray[s3]'",
    "s3a": "'cert-ray[s3]'",
    "gs": "'cert-ray[gcs]'",
    "gcs": "'cert-ray[gcs]'",
    "az": "adlfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
}
# Left free on a local disk for logs and other programs; assumed.
RESERVE_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A listed file: its URL, its size, and a version that its storage changes with every write, if it has one."""

    url: str
    size_bytes: int
    version: str = ""


@dataclass(frozen=True, slots=True)
class Written:
    """What was written: its size and the xxh3-128 of its bytes, in hex."""

    size_bytes: int
    checksum: str


def resolve(url: str) -> tuple[Any, str]:
    """The fsspec filesystem of `url`, and the path inside it.

    Raises:
        ConfigError: when the scheme's driver is not installed or knows no account, or the scheme is unknown.
    """
    package = _DRIVERS.get(url.partition("://")[0])
    # Otherwise drivers answer from earlier listings, and miss what other processes have written since.
    options = {"use_listings_cache": False} if package else {}
    try:
        filesystem, path = fsspec.core.url_to_fs(url, **options)
    except (ImportError, ValueError) as error:
        if not package:
            cure = "Install its fsspec driver."
        elif isinstance(error, ImportError):
            cure = f"On every node: pip install {package}"
        else:
            cure = "Its account goes into the environment of every node: docs/operating.md names the variables."
        raise ConfigError(f"{url}: cannot open this kind of URL: {str(error).rstrip('.!')}. {cure}") from error
    return filesystem, path


def check_shared(url: str) -> None:
    """Raise `ConfigError` if other processes cannot see what this one writes at `url`."""
    if isinstance(resolve(url)[0], MemoryFileSystem):
        raise ConfigError(
            f"{url}: that is this process' own memory, which the other processes of a run do not see. Give a folder, "
            "or a URL of a store that every node reaches."
        )


def is_local(url: str) -> bool:
    """Whether `url` names a file on a disk of this machine."""
    return isinstance(resolve(url)[0], LocalFileSystem)


def local_path(url: str) -> Path:
    """The `Path` of a local URL.

    Raises:
        ConfigError: for a remote URL.
    """
    filesystem, path = resolve(url)
    if not isinstance(filesystem, LocalFileSystem):
        raise ConfigError(f"{url}: a path on a local or shared disk is needed here, not a remote URL.")
    return Path(path)


def for_arrow(url: str) -> tuple[str, pa.fs.FileSystem | None]:
    """`url` in Arrow's form, and the filesystem to open it with: None for a local disk.

    Arrow's own drivers are not used, because they look for accounts in other places than fsspec's. (Without one,
    Google's retries silently for minutes.)
    """
    if is_local(url):
        return url, None
    filesystem, path = resolve(url)
    return path, pa.fs.PyFileSystem(pa.fs.FSSpecHandler(filesystem))


def absolute(url: str) -> str:
    """`url` with a local path made absolute, so that it means the same in every process of a cluster."""
    return str(local_path(url)) if is_local(url) else url


def cache_folder(name: str) -> Path:
    """This machine's folder for what can be fetched or built again: $XDG_CACHE_HOME/cert-ray/`name`, else ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "cert-ray" / name


def join(url: str, *parts: str) -> str:
    """`url` with `parts` appended; the separator is `/` everywhere."""
    return "/".join([url.rstrip("/"), *parts]) if parts else url


def name_of(url: str) -> str:
    """The last part of `url`."""
    return url.rstrip("/").rsplit("/", 1)[-1]


@tried_again
def exists(url: str) -> bool:
    """Whether there is a file or folder at `url`."""
    filesystem, path = resolve(url)
    return bool(filesystem.exists(path))


@tried_again
def is_folder(url: str) -> bool:
    """Whether there is a folder (or object prefix) at `url`."""
    filesystem, path = resolve(url)
    return bool(filesystem.isdir(path))


@tried_again
def list_files(url: str) -> list[FileEntry]:
    """Every file below the folder `url`, sorted by URL. Symbolic links to folders are not followed (they may loop).

    Raises:
        InputError: when there is nothing at `url`.
    """
    filesystem, path = resolve(url)
    if not filesystem.exists(path):
        raise InputError(url, "nothing there", "Check the path, or the credentials for its store.")
    if isinstance(filesystem, LocalFileSystem):
        return sorted(_list_local(path), key=lambda entry: entry.url)
    found = filesystem.find(path, detail=True)
    return sorted(
        (
            FileEntry(filesystem.unstrip_protocol(name), int(entry["size"] or 0), _version(entry))
            for name, entry in found.items()
        ),
        key=lambda entry: entry.url,
    )


# Names of a file's version in S3, GCS, Azure, Hugging Face and other drivers of fsspec; the strongest first.
_VERSIONS = ("ETag", "etag", "blob_id", "generation", "md5Hash", "checksum", "LastModified", "last_modified", "mtime")


def _version(entry: Mapping[str, Any]) -> str:
    return next((f"{name} {entry[name]}" for name in _VERSIONS if entry.get(name)), "")


def _list_local(root: str) -> Iterator[FileEntry]:
    if not Path(root).is_dir():
        yield _local_entry(root, Path(root).stat())
        return
    for folder, _, names in os.walk(root, followlinks=False):
        for name in names:
            path = os.path.join(folder, name)  # noqa: PTH118 - millions of times, and Path costs ten times as much
            try:
                yield _local_entry(path, os.stat(path))  # noqa: PTH116
            except OSError:  # a dangling or looping link: reading it becomes a counted drop
                yield FileEntry(path, 0)


def _local_entry(path: str, found: os.stat_result) -> FileEntry:
    return FileEntry(path, found.st_size, str(found.st_mtime_ns))


@tried_again
def find(pattern: str) -> list[str]:
    """The URLs of everything that matches the glob `pattern`, sorted."""
    filesystem, inside = resolve(pattern)
    found = filesystem.glob(inside)
    local = isinstance(filesystem, LocalFileSystem)
    return sorted(str(path if local else filesystem.unstrip_protocol(path)) for path in found)


@tried_again
def list_folders(url: str) -> list[str]:
    """The names of the folders directly below `url`, sorted; none if there is nothing at `url`."""
    filesystem, path = resolve(url)
    if not filesystem.exists(path):
        return []
    return sorted(name_of(entry["name"]) for entry in filesystem.ls(path, detail=True) if entry["type"] == "directory")


@tried_again
def list_file_names(url: str) -> list[str]:
    """The names of the files directly in the folder `url`, sorted."""
    filesystem, path = resolve(url)
    return sorted(name_of(entry["name"]) for entry in filesystem.ls(path, detail=True) if entry["type"] == "file")


@contextmanager
def open_read(url: str) -> Iterator[IO[bytes]]:
    """Open `url` for reading bytes."""
    with _open_read(url) as stream:
        yield stream


@tried_again
def _open_read(url: str) -> IO[bytes]:
    filesystem, path = resolve(url)
    opened: IO[bytes] = filesystem.open(path, "rb")
    return opened


@tried_again
def read_bytes(url: str) -> bytes:
    """All bytes of `url`."""
    with open_read(url) as stream:
        return stream.read()


_before_commit: ContextVar[Callable[[], None] | None] = ContextVar("_before_commit", default=None)


@contextmanager
def commits_guarded(check: Callable[[], None]) -> Iterator[None]:
    """Call `check` right before each write in the block becomes visible; if it raises, the write does not."""
    token = _before_commit.set(check)
    try:
        yield
    finally:
        _before_commit.reset(token)


def check_commit() -> None:
    """Run the check of `commits_guarded` now, as a write would."""
    if (check := _before_commit.get()) is not None:
        check()


@contextmanager
def _open_write(url: str, size_bytes: int) -> Iterator[IO[bytes]]:
    """Open `url` for writing `size_bytes`. It appears under its name only if the block ends without an error."""
    filesystem, path = resolve(url)
    if not isinstance(filesystem, LocalFileSystem):
        check_commit()  # closing the stream commits, even after an error
        with filesystem.open(path, "wb") as stream:
            yield stream
        return
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    free_bytes = shutil.disk_usage(target.parent).free
    if free_bytes < size_bytes + RESERVE_BYTES:
        raise StorageFullError(url, size_bytes + RESERVE_BYTES, free_bytes)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=_PARTIAL_SUFFIX)
    try:
        with os.fdopen(handle, "wb") as stream:
            yield stream
        Path(temporary).chmod(0o644)
        check_commit()
        Path(temporary).replace(target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def remove_partial_files(url: str) -> None:
    """Remove what killed writers left below the local folder `url`. Nobody may be writing there."""
    if is_local(url):
        for path in local_path(url).rglob(f".*{_PARTIAL_SUFFIX}"):
            path.unlink(missing_ok=True)


@tried_again
def write_bytes(url: str, payload: bytes | pa.Buffer) -> Written:
    """Write `payload` to `url`, whole or not at all."""
    return _write(url, payload)


def _write(url: str, payload: bytes | pa.Buffer) -> Written:
    with _open_write(url, len(payload)) as stream:
        stream.write(payload)
    return Written(len(payload), str(xxhash.xxh3_128_hexdigest(payload)))


def write_text_once(url: str, text: str) -> Written:
    """`write_text` for callers that retry themselves: an error is raised at once, and not logged."""
    return _write(url, text.encode())


def write_text(url: str, text: str) -> Written:
    """Write `text` to `url` as UTF-8, whole or not at all."""
    return write_bytes(url, text.encode())


def read_text(url: str) -> str:
    """All of `url`, decoded as UTF-8."""
    return read_bytes(url).decode()


def parquet_bytes(table: pa.Table) -> pa.Buffer:
    """`table` as the bytes of one Parquet file; equal tables in equal chunks give equal bytes."""
    sink = pa.BufferOutputStream()
    # Level 1 takes 0.6 of the time of level 3 and 1.09 of the bytes (source text, Intel Xeon, 2026-11-25).
    options = {"compression": "zstd", "compression_level": 1, "use_dictionary": _dictionary_columns(table)}
    with pq.ParquetWriter(sink, table.schema, **options) as writer:
        if len(table):  # Hugging Face's `datasets` refuses a file whose first row group is empty
            writer.write_table(table, row_group_size=4096)
    return sink.getvalue()


_LONG_VALUE_BYTES = 256  # longer values seldom repeat; assumed


def _dictionary_columns(table: pa.Table) -> list[str]:
    """The columns to write with a dictionary, by their paths in Parquet: all except those with long values."""
    short = (field for field in table.schema if table.column(field.name).nbytes <= _LONG_VALUE_BYTES * len(table))
    nested = (field for field in table.schema if pa.types.is_nested(field.type))
    fields = {field.name: field.type for fields in (short, nested) for field in fields}
    return [path for name, kind in fields.items() for path in _leaf_paths(name, kind)]


def _leaf_paths(path: str, kind: pa.DataType) -> Iterator[str]:
    if pa.types.is_list(kind):
        yield from _leaf_paths(f"{path}.list.element", kind.value_type)
    elif pa.types.is_struct(kind):
        for field in kind:
            yield from _leaf_paths(f"{path}.{field.name}", field.type)
    else:
        yield path


def write_parquet(table: pa.Table, url: str) -> Written:
    """Write `table` to `url` as one Parquet file. The same table gives the same bytes."""
    return write_bytes(url, parquet_bytes(table))


@tried_again
def read_parquet(url: str, columns: list[str] | None = None, *, use_threads: bool = True) -> pa.Table:
    """The table at `url`, or only `columns` of it.

    Args:
        use_threads: let Arrow use threads. Each keeps memory for what it read; without them, reading is slower.

    Raises:
        pa.ArrowException: for a damaged file.
    """
    filesystem, path = resolve(url)
    options = {"use_threads": use_threads, "pre_buffer": use_threads}
    with _damage_told(url):
        return pq.read_table(path, columns=columns, filesystem=filesystem, partitioning=None, **options)


@tried_again
def read_rows(url: str, rows: Sequence[int], columns: list[str]) -> pa.Table:
    """`columns` of some `rows` (ascending) of the table at `url`, as far as they exist; a few in memory at a time.

    Raises:
        pa.ArrowException: for a damaged file.
    """
    found: list[pa.RecordBatch] = []
    with open_parquet(url) as table:
        first = 0
        for group in range(table.num_row_groups):
            last = first + table.metadata.row_group(group).num_rows
            wanted = [row - first for row in rows[bisect_left(rows, first) : bisect_left(rows, last)]]
            found += _rows_of_group(table, group, wanted, columns)
            first = last
        schema = pa.schema([table.schema_arrow.field(name) for name in columns])
    return pa.Table.from_batches(found, schema)


def _rows_of_group(
    table: pq.ParquetFile, group: int, wanted: list[int], columns: list[str]
) -> Iterator[pa.RecordBatch]:
    if not wanted:
        return
    first = 0
    for batch in table.iter_batches(_ROWS_AT_A_TIME, row_groups=[group], columns=columns, use_threads=False):
        last = first + len(batch)
        here = [row - first for row in wanted[bisect_left(wanted, first) : bisect_left(wanted, last)]]
        if here:
            yield batch.select(columns).take(pa.array(here))
        if last > wanted[-1]:
            return
        first = last


@contextmanager
def open_parquet(url: str) -> Iterator[pq.ParquetFile]:
    """The Parquet file at `url`, to read parts of it. Only one buffer is read ahead: the process keeps that memory.

    Raises:
        pa.ArrowException: for a damaged file, even if only the block reaches the damage.
    """
    with _damage_told(url), open_read(url) as stream:
        yield pq.ParquetFile(stream, pre_buffer=False, buffer_size=1 << 20)


@contextmanager
def _damage_told(url: str) -> Iterator[None]:
    """Tell damage from errors of the disk: what Arrow says about a local file's bytes must not be retried."""
    try:
        yield
    except OSError as error:
        if error.errno is None and type(error) is OSError and is_local(url):
            raise pa.ArrowInvalid(str(error)) from error
        raise


@tried_again
def checksum(url: str) -> Written:
    """Size and xxh3-128 of the bytes at `url`, read in blocks."""
    digest = xxhash.xxh3_128()
    size_bytes = 0
    with open_read(url) as stream:
        while block := stream.read(_CHECKSUM_BLOCK_BYTES):
            digest.update(block)
            size_bytes += len(block)
    return Written(size_bytes, digest.hexdigest())


@tried_again
def remove(url: str) -> None:
    """Remove the file or folder at `url`, if there is one."""
    filesystem, path = resolve(url)
    if filesystem.exists(path):
        filesystem.rm(path, recursive=True)


@tried_again
def make_folder(url: str) -> None:
    """Make the folder `url`, and its parents."""
    filesystem, path = resolve(url)
    filesystem.makedirs(path, exist_ok=True)


@tried_again
def copy_to_local(url: str, target: Path) -> Written:
    """Copy the file at `url` to the local path `target`, in blocks. The caller compares what arrived."""
    digest = xxhash.xxh3_128()
    size_bytes = 0
    with open_read(url) as stream, target.open("wb") as sink:
        while block := stream.read(_CHECKSUM_BLOCK_BYTES):
            digest.update(block)
            size_bytes += sink.write(block)
    return Written(size_bytes, digest.hexdigest())


@tried_again
def copy_from_local(source: Path, url: str) -> Written:
    """Copy the local file `source` to `url` in blocks, whole or not at all."""
    digest = xxhash.xxh3_128()
    size_bytes = source.stat().st_size
    with source.open("rb") as stream, _open_write(url, size_bytes) as sink:
        while block := stream.read(_CHECKSUM_BLOCK_BYTES):
            digest.update(block)
            sink.write(block)
    return Written(size_bytes, digest.hexdigest())


@tried_again
def copy_files_to_local(url: str, target: Path) -> None:
    """Copy the files directly in the folder `url` into the local folder `target`.

    Subfolders are left out: those of a model's folder hold checkpoints, which are many times as large.
    """
    filesystem, path = resolve(url)
    found = [entry["name"] for entry in filesystem.ls(path, detail=True) if entry["type"] == "file"]
    filesystem.get(found, [str(target / name_of(name)) for name in found])
