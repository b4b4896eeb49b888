"""Token shards: how a packed view lies on disk, and random access to its documents.

In: the tokens and pieces of one dataset shard. Out: `<name>.bin` (little endian, uint16 or uint32),
`<name>.pieces.parquet` (schemas.PIECES: where each piece of each document lies, its weight, whether it may be cut) and
`<name>.unigrams.parquet` (how often each token stands in held-out documents). `PackedTokens` opens a finished pack,
local by memory map, remote through a copy on the local disk that later starts find again, and checks every file against
the manifest. It does not plan rows: `packing` does.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from cert_ray import manifests, storage
from cert_ray.errors import DiskFullError, ShardCorruptError
from cert_ray.manifests import Manifest, WrittenFile
from cert_ray.tokens import index
from cert_ray.tokens.index import Documents, Pieces

STAGE = "tokens"
VERB = "pack"
UNIGRAMS = pa.schema([("token", pa.int32()), ("count", pa.int64())])
_TOKENS_SUFFIX = ".bin"
_PIECES_SUFFIX = ".pieces.parquet"
_LOCK = ".lock"  # of a copy
_COPIES_AT_ONCE = 8  # assumed: one stream of an object store is seldom faster than 100 MB/s
_UNIGRAMS_SUFFIX = ".unigrams.parquet"
_INDEX = "index-1"  # below a pack's folder below TMPDIR; the number is its layout's
_PIECES_IN_MEMORY = 1 << 20  # 13 MB; of a larger pack the processes of a machine share one index

IntArray = npt.NDArray[np.int64]


def token_dtype(vocab_size: int) -> np.dtype[np.unsignedinteger]:
    """The dtype of a shard's tokens: two bytes where they suffice, else four; little endian everywhere."""
    return np.dtype("<u2") if vocab_size < 1 << 16 else np.dtype("<u4")


def write_shard(
    folder: str, name: str, tokens: npt.NDArray[np.unsignedinteger], pieces: pa.Table, unigrams: pa.Table
) -> tuple[WrittenFile, ...]:
    """Write the files of one shard into `folder`; the same arguments give the same bytes."""
    written = storage.write_bytes(storage.join(folder, name + _TOKENS_SUFFIX), tokens.tobytes())
    files = [WrittenFile(name=name + _TOKENS_SUFFIX, rows=len(tokens), **_measures(written))]
    for suffix, table in ((_PIECES_SUFFIX, pieces), (_UNIGRAMS_SUFFIX, unigrams)):
        written = storage.write_parquet(table, storage.join(folder, name + suffix))
        files.append(WrittenFile(name=name + suffix, rows=table.num_rows, **_measures(written)))
    return tuple(files)


def _measures(written: storage.Written) -> dict[str, int | str]:
    return {"size_bytes": written.size_bytes, "checksum": written.checksum}


def held_out_unigrams(folder: str, files: list[WrittenFile], vocab_size: int) -> IntArray:
    """How often each token stands in the held-out documents of `files`, added up over the shards."""
    counts = np.zeros(vocab_size, np.int64)
    for file in files:
        if file.name.endswith(_UNIGRAMS_SUFFIX):
            table = storage.read_parquet(storage.join(folder, file.name))
            counts[table["token"].to_numpy()] += table["count"].to_numpy()
    return counts


class PackedTokens:
    """A finished pack: its documents, and their tokens by address. Open it once per process; do not pickle it."""

    def __init__(self, manifest: Manifest, folder: Path) -> None:
        """`folder` is on a local disk and holds the files that `manifest` lists. Callers use `open`."""
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

        Of a remote pack they are checked while it is copied, once.

        Raises:
            NotFinishedError, SchemaVersionError: when `url` is no finished pack of this version.
            ShardCorruptError: when a file is missing or disagrees with the manifest.
            DiskFullError: when TMPDIR has no room for a remote one.
        """
        manifest = manifests.read_manifest(url, STAGE, VERB)
        folder = storage.local_path(url) if storage.is_local(url) else _local_copy(url, manifest)
        if verify:
            for file in manifest.files:
                manifests.check_file(str(folder), file, VERB)
        return cls(manifest, folder)

    def __len__(self) -> int:
        """How many documents there are."""
        return len(self.documents.tokens)

    def read(self, start: int, count: int) -> npt.NDArray[np.unsignedinteger]:
        """The `count` tokens from address `start` on, a view of the memory map; they lie in one shard."""
        shard = int(np.searchsorted(self._shard_ends, start, side="right"))
        offset = start - (int(self._shard_ends[shard - 1]) if shard else 0)
        return self._shards[shard][offset : offset + count]

    def tokens(self, document: int) -> npt.NDArray[np.unsignedinteger]:
        """The tokens of the document with that ordinal, a view of the memory map."""
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
    """The manifest of the pack at `url`, whose files are there: read and compared, or of a remote one by their sizes.

    Whoever opens a remote one copies it, and compares what arrives.

    Raises:
        NotFinishedError, SchemaVersionError, ShardCorruptError: as `PackedTokens.open`.
    """
    manifest = manifests.read_manifest(url, STAGE, VERB)
    if storage.is_local(url):
        for file in manifest.files:
            manifests.check_file(url, file, VERB)
        return manifest
    found = {storage.name_of(entry.url): entry.size_bytes for entry in storage.list_files(url)}
    for file in manifest.files:
        if found.get(file.name) != file.size_bytes:
            told = f"{found[file.name]} bytes" if file.name in found else "no file"
            raise ShardCorruptError(storage.join(url, file.name), f"{file.size_bytes} bytes", told, VERB)
    return manifest


def _local_copy(url: str, manifest: Manifest) -> Path:
    """The pack at `url` below this machine's TMPDIR, where it stays: known by its content, for every later start.

    One process of a machine copies, the others wait for it. What a kill cut short is gone on with, file by file.

    Raises:
        DiskFullError: before anything is copied, when the disk has no room for what is missing.
        ShardCorruptError: when what arrives is not what the manifest says.
    """
    with _own_folder(manifest) as folder:
        missing = [file for file in manifest.files if not _has_arrived(folder / file.name, file)]
        _check_room(url, sum(file.size_bytes for file in missing), folder)
        with ThreadPoolExecutor(_COPIES_AT_ONCE) as threads:
            copies = [threads.submit(_copy, url, file, folder) for file in missing]
            try:
                for copy in copies:
                    copy.result()
            except BaseException:
                threads.shutdown(cancel_futures=True)
                raise
    return folder


def _copy(url: str, file: WrittenFile, folder: Path) -> None:
    arriving = folder / f".{file.name}.partial"
    written = storage.copy_to_local(storage.join(url, file.name), arriving)
    manifests.check_same(storage.join(url, file.name), written, file, VERB)
    arriving.rename(folder / file.name)


@contextmanager
def _own_folder(manifest: Manifest) -> Iterator[Path]:
    """This machine's folder below TMPDIR for what belongs to the pack, for one process at a time."""
    folder = Path(tempfile.gettempdir()) / f"cert-ray-tokens-{os.getuid()}" / pack_digest(manifest)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (folder / _LOCK).open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # let go when this process ends, however it does
        yield folder


def _index_of(manifest: Manifest, folder: Path) -> tuple[Documents, Pieces]:
    """The index of the pack whose files lie in `folder`; of a large one, as this machine's processes share it."""
    files = [file for file in manifest.files if file.name.endswith(_PIECES_SUFFIX)]
    tables = (storage.read_parquet(str(folder / file.name)) for file in files)
    pieces = sum(file.rows for file in files)
    if pieces <= _PIECES_IN_MEMORY:
        return index.in_memory(tables)
    with _own_folder(manifest) as own:
        if not (own / _INDEX).is_dir():
            _check_room(str(folder), index.size_bytes(pieces, manifest.rows_kept), own)
            index.write(tables, own / _INDEX)
    return index.mapped(own / _INDEX)


def _has_arrived(path: Path, file: WrittenFile) -> bool:
    return path.is_file() and path.stat().st_size == file.size_bytes


def _check_room(url: str, needed_bytes: int, folder: Path) -> None:
    copies = folder.parent
    free_bytes = shutil.disk_usage(copies).free
    if needed_bytes and free_bytes < needed_bytes + storage.RESERVE_BYTES:
        raise DiskFullError(
            f"{url}: to read it, {needed_bytes / 1e9:,.1f} GB more of it are needed below {copies}, and that disk has "
            f"{free_bytes / 1e9:,.1f} GB left. Remove other packs' copies from there, or set TMPDIR, on every node, to "
            "a folder of a larger disk."
        )
