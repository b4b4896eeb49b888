"""Token shards: how a packed view is stored on disk, and random access to its documents.

In: the tokens and pieces of one dataset shard. Out: `<name>.bin` (little endian, uint16 or uint32),
`<name>.pieces.parquet` (schemas.PIECES: where each piece of each document lies, its weight, whether it may be cut) and
`<name>.unigrams.parquet` (how often each token occurs in held-out documents). `PackedTokens` opens a finished pack and
checks every file against the manifest. It memory-maps a local pack; a remote one it first copies to the local disk,
where later starts find it. It does not plan rows: `packing` does.
"""

from __future__ import annotations

import fcntl
import functools
import json
import logging
import os
import shutil
import tempfile
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from cert_ray import manifests, storage
from cert_ray.errors import DiskFullError, ShardCorruptError
from cert_ray.manifests import Manifest, WrittenFile
from cert_ray.telemetry.progress import Progress
from cert_ray.tokens import index
from cert_ray.tokens.index import Documents, IntArray, Pieces

_log = logging.getLogger(__name__)
STAGE = "tokens"
VERB = "pack"
UNIGRAMS = pa.schema([("token", pa.int32()), ("count", pa.int64())])
_TOKENS_SUFFIX = ".bin"
_PIECES_SUFFIX = ".pieces.parquet"
_SHOWN_FROM_BYTES = 1e9  # show progress when reading this much, which takes some seconds; assumed
_READ_AT_ONCE = 8  # files of a local disk, of which the tables of pieces have tens of MB; assumed
_COPIES_AT_ONCE = 8  # assumed: one stream of an object store is seldom faster than 100 MB/s
# Lock files beside a copy, never removed. Whoever fills or removes the copy holds the first, whoever reads it the
# second, whose modification time is that of the last use.
_LOCK, _USED = ".lock", ".used"
_CHECKED = ".checked"  # beside these: size, time and inode of a local pack's files when they were last found correct
_COPIES_SHARE = 0.5  # of TMPDIR's disk; above it, copies that no process uses are removed; assumed
_UNIGRAMS_SUFFIX = ".unigrams.parquet"
_INDEX = "index-1"  # in a pack's folder below TMPDIR; the number is the version of its layout
_PIECES_IN_MEMORY = 1 << 20  # 13 MB; with more pieces, the processes of a machine share one index


def token_dtype(vocab_size: int) -> np.dtype[np.unsignedinteger]:
    """The dtype of a shard's tokens: two bytes where they suffice, else four; little endian everywhere."""
    return np.dtype("<u2") if vocab_size < 1 << 16 else np.dtype("<u4")


def write_shard(
    folder: str, name: str, tokens: npt.NDArray[np.unsignedinteger], pieces: pa.Table, unigrams: pa.Table
) -> tuple[WrittenFile, ...]:
    """Write the files of one shard into `folder`; the same arguments give the same bytes."""
    written = storage.write_bytes(storage.join(folder, name + _TOKENS_SUFFIX), tokens.tobytes())
    files = [WrittenFile.of(name + _TOKENS_SUFFIX, written, len(tokens))]
    for suffix, table in ((_PIECES_SUFFIX, pieces), (_UNIGRAMS_SUFFIX, unigrams)):
        written = storage.write_parquet(table, storage.join(folder, name + suffix))
        files.append(WrittenFile.of(name + suffix, written, table.num_rows))
    return tuple(files)


def held_out_unigrams(folder: str, files: list[WrittenFile], vocab_size: int) -> IntArray:
    """How often each token occurs in the held-out documents of `files`, summed over the shards."""
    counts = np.zeros(vocab_size, np.int64)
    for file in files:
        if file.name.endswith(_UNIGRAMS_SUFFIX):
            table = storage.read_parquet(storage.join(folder, file.name))
            counts[table["token"].to_numpy()] += table["count"].to_numpy()
    return counts


class PackedTokens:
    """A finished pack: its documents, and their tokens by address. Open it once per process; do not pickle it."""

    def __init__(self, manifest: Manifest, folder: Path) -> None:
        """`folder` is on a local disk and holds the files that `manifest` lists. Call `open` instead."""
        self.manifest = manifest
        self.view: str | None = manifest.config.get("view")
        self.vocab_size: int = manifest.notes["vocab_size"]
        self.context_tokens: int = manifest.config["context_tokens"]
        self.tokenizer_digest: str = manifest.notes["tokenizer_digest"]
        self.pad_id: int = manifest.notes["pad_id"]
        self.end_id: int = manifest.notes["end_id"]
        dtype = token_dtype(self.vocab_size)
        self._shards = [
            _map(folder / file.name, dtype) for file in manifest.files if file.name.endswith(_TOKENS_SUFFIX)
        ]
        self._shard_ends = np.cumsum([0, *map(len, self._shards)])[1:]
        self.documents, self.pieces = _index_of(manifest, folder)

    @classmethod
    def open(cls, url: str, verify: bool = True) -> PackedTokens:
        """Open the pack at `url`, checking sizes and checksums (one read of every file) unless `verify` is false.

        The files of a remote pack are also checked as they are copied.

        Raises:
            NotFinishedError, SchemaVersionError: when `url` is no finished pack of this version.
            ShardCorruptError: when a file is missing or disagrees with the manifest.
            DiskFullError: when TMPDIR has no room for a remote pack, or for the index of a large one.
        """
        manifest = manifests.read_manifest(url, STAGE, VERB)
        with ExitStack() as undone:
            in_use: int | None = None
            if storage.is_local(url):
                folder = storage.local_path(url)
            else:
                folder, in_use = _local_copy(url, manifest)
                undone.callback(os.close, in_use)
            if verify:
                for file in manifest.files:
                    manifests.check_file(str(folder), file, VERB)
            packed = cls(manifest, folder)
            undone.pop_all()
        if in_use is not None:
            weakref.finalize(packed, os.close, in_use)
        return packed

    def __len__(self) -> int:
        """How many documents there are."""
        return len(self.documents.tokens)

    def read(self, start: int, count: int) -> npt.NDArray[np.unsignedinteger]:
        """The `count` tokens from address `start` on, as a view of the memory map. All must be in one shard."""
        shard = int(np.searchsorted(self._shard_ends, start, side="right"))
        offset = start - (int(self._shard_ends[shard - 1]) if shard else 0)
        return self._shards[shard][offset : offset + count]

    def tokens(self, document: int) -> npt.NDArray[np.unsignedinteger]:
        """The tokens of the document with this ordinal, as a view of the memory map."""
        first = self.pieces.first[document]
        return self.read(int(self.pieces.start[first]), int(self.documents.tokens[document]))


def _map(path: Path, dtype: np.dtype[np.unsignedinteger]) -> npt.NDArray[np.unsignedinteger]:
    if path.stat().st_size == 0:  # an empty file cannot be mapped
        return np.zeros(0, dtype)
    return np.memmap(path, dtype, mode="r")


def pack_digest(pack: Manifest) -> str:
    """Digest of a pack by its manifest, which lists every file's checksum."""
    return str(xxhash.xxh3_128_hexdigest(pack.model_dump_json().encode()))


def check_pack(url: str) -> Manifest:
    """Check the files of the pack at `url` and return its manifest.

    The files of a local pack are read and compared; those that this machine has read before are skipped while size,
    time and inode are unchanged. Of a remote pack only sizes are compared: whoever opens it copies and compares it.

    Raises:
        NotFinishedError, SchemaVersionError, ShardCorruptError: as `PackedTokens.open`.
    """
    manifest = manifests.read_manifest(url, STAGE, VERB)
    if storage.is_local(url):
        _check_unless_known(storage.local_path(url), manifest)
        return manifest
    found = {storage.name_of(entry.url): entry.size_bytes for entry in storage.list_files(url)}
    for file in manifest.files:
        if found.get(file.name) != file.size_bytes:
            told = f"{found[file.name]} bytes" if file.name in found else "no file"
            raise ShardCorruptError(storage.join(url, file.name), f"{file.size_bytes} bytes", told, VERB)
    return manifest


def _check_unless_known(folder: Path, manifest: Manifest) -> None:
    with _own_folder(manifest) as own:
        noted = own.with_suffix(_CHECKED)
        try:
            known = json.loads(noted.read_text())
        except (OSError, ValueError):  # missing, or cut short
            known = {}
        now = {str(folder / file.name): _state(folder / file.name) for file in manifest.files}
        unknown = [file for file in manifest.files if known.get(path := str(folder / file.name)) != now[path]]
        check = functools.partial(manifests.check_file, str(folder), verb=VERB)
        _each(unknown, check, _READ_AT_ONCE, f"comparing {folder}")
        if unknown:
            with suppress(OSError):  # e.g. disk full: then the files are read again next time
                noted.write_text(json.dumps(now))


def _state(path: Path) -> list[int]:
    """Size, time and inode, which change when a file is written again; empty if there is no file."""
    if not path.exists():
        return []
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ino]


def _local_copy(url: str, manifest: Manifest) -> tuple[Path, int]:
    """Copy the pack at `url` below this machine's TMPDIR; return the folder and a file descriptor that protects it.

    The copy is identified by its content and stays, so later starts find it. One process per machine copies while the
    others wait. A copy that was interrupted continues with the files that are missing. No other process removes the
    copy until the file descriptor is closed or this process ends.

    Raises:
        DiskFullError: before anything is copied, when the disk has no room for the missing files.
        ShardCorruptError: when a copied file disagrees with the manifest.
    """
    with _own_folder(manifest) as folder, ExitStack() as undone:
        in_use = os.open(folder.with_suffix(_USED), os.O_RDWR)
        undone.callback(os.close, in_use)
        fcntl.flock(in_use, fcntl.LOCK_SH)
        missing = [file for file in manifest.files if not _has_arrived(folder / file.name, file)]
        if missing:
            _make_room(url, sum(file.size_bytes for file in missing), folder.parent)
        _each(missing, functools.partial(_copy, url, folder), _COPIES_AT_ONCE, f"copying {url}")
        undone.pop_all()
    return folder, in_use


@contextmanager
def _progress(what: str, files: Sequence[WrittenFile]) -> Iterator[Callable[[WrittenFile], None]]:
    """Show progress over `files` if they may take a while. The block calls the yielded function for each file done."""
    if sum(file.size_bytes for file in files) < _SHOWN_FROM_BYTES:
        yield lambda _: None
        return
    with Progress(what, len(files), "files") as progress:
        yield lambda file: progress.advance(size_bytes=file.size_bytes)


def _each(files: Sequence[WrittenFile], work: Callable[[WrittenFile], None], at_once: int, what: str) -> None:
    """Call `work` on each of `files`, with progress labelled `what`. After a failure, no more are started."""
    with ThreadPoolExecutor(at_once) as threads, _progress(what, files) as done:
        for file, _ in zip(files, threads.map(work, files), strict=True):
            done(file)


def _copy(url: str, folder: Path, file: WrittenFile) -> None:
    arriving = folder / f".{file.name}.partial"
    written = storage.copy_to_local(storage.join(url, file.name), arriving)
    manifests.check_same(storage.join(url, file.name), written, file, VERB)
    arriving.rename(folder / file.name)


@contextmanager
def _own_folder(manifest: Manifest) -> Iterator[Path]:
    """This machine's folder for the pack, below TMPDIR. One process holds it at a time; its last use is set to now."""
    folder = Path(tempfile.gettempdir()) / f"cert-ray-tokens-{os.getuid()}" / pack_digest(manifest)
    folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with _locked(folder.with_suffix(_LOCK)):
        folder.with_suffix(_USED).touch(mode=0o600)
        folder.mkdir(exist_ok=True, mode=0o700)
        yield folder


@contextmanager
def _locked(path: Path, kind: int = fcntl.LOCK_EX) -> Iterator[None]:
    """Lock the file `path` during the block. The system releases the lock when this process ends, however it ends."""
    with path.open("ab") as lock:
        fcntl.flock(lock, kind)
        yield


def _index_of(manifest: Manifest, folder: Path) -> tuple[Documents, Pieces]:
    """The index of the pack in `folder`. The processes of this machine share that of a large pack."""
    files = [file for file in manifest.files if file.name.endswith(_PIECES_SUFFIX)]
    parts = _index_parts(folder, files)
    pieces = sum(file.rows for file in files)
    if pieces <= _PIECES_IN_MEMORY:
        return index.in_memory(parts)
    with _own_folder(manifest) as own:
        if not (own / _INDEX).is_dir():
            _make_room(str(folder), index.size_bytes(pieces, manifest.rows_kept), own.parent)
            index.write(parts, own / _INDEX)
        return index.mapped(own / _INDEX)  # a mapping stays readable even if another pack's copy removes the file


def _index_parts(folder: Path, files: Sequence[WrittenFile]) -> Iterator[index.Part]:
    """The index of each shard, in order; one thread per core, at most `_READ_AT_ONCE`, works ahead."""
    at_once = min(_READ_AT_ONCE, os.cpu_count() or 1)

    def read(file: WrittenFile) -> index.Part:
        table = storage.read_parquet(str(folder / file.name), columns=index.COLUMNS, use_threads=False)
        return index.part_of(table)

    with ThreadPoolExecutor(at_once) as threads, _progress(f"index of {folder}", files) as done:
        ahead: deque[Future[index.Part]] = deque()
        for number, file in enumerate(files):
            ahead.append(threads.submit(read, file))
            if number >= at_once:
                yield ahead.popleft().result()
                done(files[number - at_once])
        for file in files[-len(ahead) :]:
            yield ahead.popleft().result()
            done(file)


def _has_arrived(path: Path, file: WrittenFile) -> bool:
    return path.is_file() and path.stat().st_size == file.size_bytes


def _make_room(url: str, needed_bytes: int, copies: Path) -> None:
    """Remove unused copies, least recently used first, until the new one fits on the disk and in `_COPIES_SHARE`.

    Raises:
        DiskFullError: when it still does not fit on the disk.
    """
    disk = shutil.disk_usage(copies)
    room_bytes = disk.free - needed_bytes - storage.RESERVE_BYTES
    sizes = {folder: _size_bytes(folder) for folder in copies.iterdir() if folder.is_dir()}
    share_bytes = disk.total * _COPIES_SHARE - needed_bytes - sum(sizes.values())
    removed: list[int] = []
    for folder in sorted(sizes, key=_last_used):
        if min(room_bytes, share_bytes) + sum(removed) >= 0:
            break
        if _removed_unless_used(folder):
            removed.append(sizes[folder])
    if removed:
        told = "removed %d unused copies of other packs (%.1f GB) below %s, to make room for %s"
        _log.info(told, len(removed), sum(removed) / 1e9, copies, url)
    if room_bytes + sum(removed) < 0:
        raise DiskFullError(
            f"{url}: reading it takes {needed_bytes / 1e9:,.1f} GB more below {copies}, and that disk has "
            f"{(disk.free + sum(removed)) / 1e9:,.1f} GB left; every other copy there is in use. Free some, "
            "or set TMPDIR, on every node, to a folder on a larger disk."
        )


def _size_bytes(folder: Path) -> int:
    return sum(entry.size_bytes for entry in storage.list_files(str(folder)))


def _last_used(folder: Path) -> float:
    """When the copy was last opened; for copies by earlier versions, when it was made."""
    used = folder.with_suffix(_USED)
    return (used if used.exists() else folder).stat().st_mtime


def _removed_unless_used(folder: Path) -> bool:
    now = fcntl.LOCK_EX | fcntl.LOCK_NB
    try:
        with _locked(folder.with_suffix(_LOCK), now), _locked(folder.with_suffix(_USED), now):
            shutil.rmtree(folder)
    except OSError:  # in use
        return False
    return True
