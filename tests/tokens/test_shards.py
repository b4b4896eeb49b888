from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import fsspec
import numpy as np
import pyarrow as pa
import pytest

from cert_ray import schemas, storage
from cert_ray.errors import DiskFullError, NotFinishedError, SchemaVersionError, ShardCorruptError
from cert_ray.tokens import index, shards
from cert_ray.tokens.shards import PackedTokens, check_pack, pack_digest, token_dtype
from tests.tokens.packs import write_pack

SHARDS = [
    [[([10, 11], False)], [([12], True), ([13, 14], False)]],
    [],
    [[([15], False)], [([16, 17, 18], True)]],
]


def test_documents_are_numbered_across_shards_and_read_by_ordinal(tmp_path: Path) -> None:
    packed = PackedTokens.open(write_pack(tmp_path, SHARDS))
    assert len(packed) == 4
    assert [packed.tokens(document).tolist() for document in range(4)] == [[10, 11], [12, 13, 14], [15], [16, 17, 18]]
    assert packed.documents.tokens.tolist() == [2, 3, 1, 3]
    assert packed.documents.weight.tolist() == [1.0, 2.0, 1.0, 2.0]
    assert packed.documents.held_out.tolist() == [False, True, False, True]
    assert packed.pieces.first.tolist() == [0, 1, 3, 4, 5]
    assert packed.pieces.atomic.tolist() == [False, True, False, False, True]


def test_a_pack_without_documents_opens(tmp_path: Path) -> None:
    assert len(PackedTokens.open(write_pack(tmp_path, [[]]))) == 0


@pytest.mark.parametrize("vocab_size", [500, 65_535, 65_536, 100_000])
def test_tokens_survive_at_every_vocabulary_size(tmp_path: Path, vocab_size: int) -> None:
    top = vocab_size - 1
    packed = PackedTokens.open(write_pack(tmp_path, [[[([0, top], False)]]], vocab_size=vocab_size))
    assert packed.tokens(0).tolist() == [0, top]
    assert token_dtype(vocab_size).itemsize == (2 if vocab_size < 65_536 else 4)


def test_a_changed_byte_is_refused(tmp_path: Path) -> None:
    url = write_pack(tmp_path, SHARDS)
    shard = tmp_path / "shard-00000.bin"
    shard.write_bytes(b"\xff" + shard.read_bytes()[1:])
    with pytest.raises(ShardCorruptError, match=r"shard-00000\.bin.*cert-ray pack"):
        PackedTokens.open(url)


def test_a_missing_shard_is_refused(tmp_path: Path) -> None:
    url = write_pack(tmp_path, SHARDS)
    (tmp_path / "shard-00002.pieces.parquet").unlink()
    with pytest.raises(ShardCorruptError, match="no file"):
        PackedTokens.open(url)


def test_an_unfinished_or_foreign_folder_is_refused(tmp_path: Path) -> None:
    url = write_pack(tmp_path, SHARDS)
    manifest = tmp_path / "manifest.json"
    loaded = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(loaded | {"stage": "dataset"}))
    with pytest.raises(SchemaVersionError, match="stage tokens"):
        PackedTokens.open(url)
    manifest.unlink()
    with pytest.raises(NotFinishedError, match="cert-ray pack"):
        PackedTokens.open(url)


def test_a_remote_pack_is_copied_once_and_reads_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pack(tmp_path / "local", SHARDS)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    remote = fsspec.filesystem("memory")
    remote.put(str(tmp_path / "local") + "/", "/packs/numpy/", recursive=True)
    for _ in range(2):
        packed = PackedTokens.open("memory://packs/numpy")
        assert packed.tokens(3).tolist() == [16, 17, 18]
        for path in remote.find("/packs"):
            if not path.endswith("manifest.json"):
                remote.rm(path)
    remote.rm("/packs", recursive=True)


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A pack in memory, and an empty TMPDIR for its copy."""
    write_pack(tmp_path / "local", SHARDS)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    filesystem = fsspec.filesystem("memory")
    filesystem.put(str(tmp_path / "local") + "/", "/packs/numpy/", recursive=True)
    yield "memory://packs/numpy"
    filesystem.rm("/packs", recursive=True)


def _copies(tmp_path: Path) -> list[str]:
    found = (tmp_path / "cache").rglob("*")
    return sorted(path.name for path in found if path.is_file() and path.suffix not in (".lock", ".used"))


def test_a_copy_that_a_kill_cut_short_is_gone_on_with(remote: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    copied: list[str] = []

    def copy(url: str, target: Path) -> storage.Written:
        if len(copied) >= 2:
            target.write_bytes(b"a part")
            raise KeyboardInterrupt
        copied.append(storage.name_of(url))
        return copy_to_local(url, target)

    copy_to_local = storage.copy_to_local
    monkeypatch.setattr(storage, "copy_to_local", copy)
    with pytest.raises(KeyboardInterrupt):
        PackedTokens.open(remote)
    first, copied = copied, []
    monkeypatch.setattr(storage, "copy_to_local", lambda url, to: (copied.append(url), copy_to_local(url, to))[1])
    assert PackedTokens.open(remote).tokens(3).tolist() == [16, 17, 18]
    files = [file.name for file in check_pack(remote).files]
    assert sorted([*first, *map(storage.name_of, copied)]) == sorted(files)
    assert _copies(tmp_path) == sorted(files)


def test_a_disk_without_room_for_a_remote_pack_is_told_before_it_is_copied(
    remote: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=60_000_000, total=10**9))
    with pytest.raises(DiskFullError, match=r"takes 0\.0 GB more below .*, and that disk has 0\.1 GB left"):
        PackedTokens.open(remote)
    assert _copies(tmp_path) == []


def other_pack(tmp_path: Path, name: str) -> str:
    """The URL of a pack in memory beside that of `remote`, with other content."""
    write_pack(tmp_path / name, [*SHARDS, [[([len(name)], False)]]])
    fsspec.filesystem("memory").put(str(tmp_path / name) + "/", f"/packs/{name}/", recursive=True)
    return f"memory://packs/{name}"


@pytest.mark.parametrize("why", ["room", "share"])
def test_a_copy_makes_way_for_another_pack_unless_it_is_used(
    remote: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folders = tmp_path / "cache" / f"cert-ray-tokens-{os.getuid()}"

    def copies() -> set[str]:
        return {path.name for path in folders.iterdir() if path.is_dir()}

    urls = {name: other_pack(tmp_path, name) for name in ("oldest", "newer", "last one")} | {"used": remote}
    digests = {name: pack_digest(check_pack(url)) for name, url in urls.items()}
    used = PackedTokens.open(remote)
    for age_s, name in ((10, "newer"), (20, "oldest")):
        PackedTokens.open(urls[name])
        os.utime(folders / f"{digests[name]}.used", (1e9 - age_s, 1e9 - age_s))
    os.utime(folders / f"{digests['used']}.used", (1, 1))  # the oldest of all, and read
    assert copies() == {digests[name] for name in ("used", "oldest", "newer")}
    held = sum(path.stat().st_size for path in folders.rglob("*") if path.is_file())
    needed = sum(file.size_bytes for file in check_pack(urls["last one"]).files)
    room = needed + storage.RESERVE_BYTES - 1 if why == "room" else 10**12
    total = 10**12 if why == "room" else 2 * (held + needed - 1)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=room, total=total))
    with caplog.at_level("INFO", "cert_ray"):
        PackedTokens.open(urls["last one"])
    assert copies() == {digests[name] for name in ("used", "newer", "last one")}
    assert "removed 1 unused copies of other packs" in caplog.text
    assert used.tokens(3).tolist() == [16, 17, 18]
    PackedTokens.open(urls["oldest"])  # copied again; what nobody has read for longest goes
    assert copies() == {digests[name] for name in ("used", "last one", "oldest")}


def test_a_remote_pack_is_compared_while_it_is_copied_and_by_sizes_before(remote: str, tmp_path: Path) -> None:
    file = next(file for file in check_pack(remote).files if file.name.endswith(".bin"))
    url = storage.join(remote, file.name)
    content = storage.read_bytes(url)
    storage.write_bytes(url, b"\xff" * len(content))
    check_pack(remote)
    with pytest.raises(ShardCorruptError, match=file.name):
        PackedTokens.open(remote, verify=False)
    assert file.name not in _copies(tmp_path)
    storage.write_bytes(url, content[:-2])
    with pytest.raises(ShardCorruptError, match=file.name):
        check_pack(remote)
    storage.remove(url)
    with pytest.raises(ShardCorruptError, match="no file"):
        check_pack(remote)


def test_a_local_pack_is_read_once_until_a_file_of_it_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, read = write_pack(tmp_path / "local", SHARDS), []
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    checksum = storage.checksum
    monkeypatch.setattr(storage, "checksum", lambda url: (read.append(storage.name_of(url)), checksum(url))[1])
    names = sorted(file.name for file in check_pack(url).files)
    assert sorted(read) == names
    check_pack(url)
    assert sorted(read) == names
    moved = tmp_path / "moved"  # a copy elsewhere is not known
    shutil.copytree(url, moved)
    read.clear()
    check_pack(str(moved))
    assert sorted(read) == names
    read.clear()
    file = tmp_path / "local" / names[0]
    content = file.read_bytes()
    file.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    os.utime(file, ns=(1, 1))  # a clock that is wrong is no way around it
    for _ in range(2):
        with pytest.raises(ShardCorruptError, match=names[0]):
            check_pack(url)
    file.write_bytes(content)
    check_pack(url)
    file.unlink()
    with pytest.raises(ShardCorruptError, match="no file"):
        check_pack(url)


def test_what_takes_a_while_with_a_large_pack_shows_how_far_it_is(
    remote: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "cert_ray"):
        PackedTokens.open(remote)
        assert not caplog.records
        monkeypatch.setattr(shards, "_SHOWN_FROM_BYTES", 1)
        monkeypatch.setattr(shards, "_PIECES_IN_MEMORY", 0)
        check_pack(str(tmp_path / "local"))
        PackedTokens.open(other_pack(tmp_path, "another"))
    told = [record.getMessage() for record in caplog.records]
    files = 3 * len(SHARDS)
    assert f"comparing {tmp_path}/local: {files}/{files} files MB/s=" in told[0]
    assert f"copying memory://packs/another: {files + 3}/{files + 3} files MB/s=" in told[1]
    assert f": {len(SHARDS) + 1}/{len(SHARDS) + 1} files MB/s=" in told[2]
    assert told[2].startswith("index of ")


def test_addresses_of_documents_do_not_overlap(tmp_path: Path) -> None:
    packed = PackedTokens.open(write_pack(tmp_path, SHARDS))
    ends = packed.pieces.start + packed.pieces.tokens
    assert np.array_equal(packed.pieces.start[1:], ends[:-1])


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty TMPDIR of a machine that shares the index of every pack."""
    monkeypatch.setattr(shards, "_PIECES_IN_MEMORY", 0)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


def test_an_index_that_a_machine_shares_is_that_of_a_process(
    tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = write_pack(tmp_path / "pack", SHARDS)
    first = PackedTokens.open(url)
    monkeypatch.setattr("cert_ray.tokens.index.write", None)  # made once
    again = PackedTokens.open(url)
    monkeypatch.setattr(shards, "_PIECES_IN_MEMORY", 100)
    for part in ("documents", "pieces"):
        alone = getattr(PackedTokens.open(url), part)
        for name in alone.__slots__:
            for packed in (first, again):
                mapped = getattr(getattr(packed, part), name)
                assert isinstance(mapped, np.memmap)
                assert mapped.dtype == getattr(alone, name).dtype
                assert np.array_equal(mapped, getattr(alone, name))
    assert again.tokens(3).tolist() == [16, 17, 18]


def test_an_index_that_a_kill_cut_short_is_written_anew(
    tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = write_pack(tmp_path / "pack", SHARDS)
    with monkeypatch.context() as patch:
        patch.setattr("cert_ray.tokens.index.write", lambda *_: _write_a_part(shared))
        with pytest.raises(KeyboardInterrupt):
            PackedTokens.open(url)
    assert PackedTokens.open(url).tokens(3).tolist() == [16, 17, 18]


def _write_a_part(shared: Path) -> None:
    (pack,) = filter(Path.is_dir, (shared / f"cert-ray-tokens-{os.getuid()}").iterdir())
    (pack / "index-1.partial").mkdir()
    (pack / "index-1.partial" / "start").write_bytes(b"a part")
    raise KeyboardInterrupt


def test_a_machine_without_room_for_an_index_says_so(
    tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = write_pack(tmp_path / "pack", SHARDS)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=60_000_000, total=10**9))
    with pytest.raises(DiskFullError, match=r"GB more below .*, and that disk has 0\.1 GB left"):
        PackedTokens.open(url)


def test_cumulative_weights_leave_held_out_documents_out(tmp_path: Path) -> None:
    packed = PackedTokens.open(write_pack(tmp_path, SHARDS))  # weights 1, 2, 1, 2, the twos held out
    assert packed.documents.cumulative.tolist() == [1.0, 1.0, 2.0, 2.0]


@pytest.mark.parametrize("weights", [[1.0, -1.0], [1.0, np.nan], [np.inf]])
def test_weights_that_cannot_be_drawn_from_are_refused(weights: list[float]) -> None:
    count = len(weights)
    columns = [range(count), range(count), [1] * count, weights, [False] * count, [False] * count]
    table = pa.table(dict(zip(schemas.PIECES.names, columns, strict=True)), schema=schemas.PIECES)
    with pytest.raises(ValueError, match="weights must be finite and not negative"):
        index.in_memory([index.part_of(table)])
