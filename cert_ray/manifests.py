"""What a finished stage wrote. `manifest.json` is written last: a stage is finished when it exists.

In: the resolved config, the digest of the inputs, one `ShardReport` per work unit. Out: a `Manifest` that checks
itself: rows read = rows kept + rows dropped by reason, per shard and in total. It holds no time and no host name, so
the same input and config give the same bytes; timings go to the log and the metrics.
"""

from __future__ import annotations

import logging
import platform
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import pydantic
import xxhash

from cert_ray import storage
from cert_ray.config import Config
from cert_ray.errors import ConservationError, NotFinishedError, SchemaVersionError, ShardCorruptError
from cert_ray.schemas import SCHEMA_VERSION

logger = logging.getLogger(__name__)

MANIFEST_NAME = "manifest.json"
ATTEMPT_NAME = ".attempt"  # the token of the run at work in a stage's folder


class WrittenFile(Config):
    """One file of a shard: name relative to the stage's folder, rows, bytes and xxh3-128."""

    name: str
    rows: int
    size_bytes: int
    checksum: str
    # The checksum before rows were emptied on request. What was made from that file stays valid, except these rows.
    stands_for: str | None = None

    @classmethod
    def of(cls, name: str, written: storage.Written, rows: int = 0) -> Self:
        """The entry for a file that was just written."""
        return cls(name=name, rows=rows, size_bytes=written.size_bytes, checksum=written.checksum)

    @property
    def identity(self) -> str:
        """The checksum that later stages know the file by."""
        return self.stands_for or self.checksum


class ShardReport(Config):
    """What one work unit did. `unit_digest` identifies the input and config that it was made from."""

    shard: str
    unit_digest: str
    files: tuple[WrittenFile, ...]
    rows_read: int
    rows_kept: int
    dropped: dict[str, int] = pydantic.Field(default_factory=dict)
    counts: dict[str, int] = pydantic.Field(default_factory=dict)  # further sums over shards: bytes, tokens

    def check(self, stage: str) -> None:
        """Raise `ConservationError` unless read = kept + dropped."""
        dropped = sum(self.dropped.values())
        if self.rows_read != self.rows_kept + dropped:
            raise ConservationError(f"{stage}/{self.shard}", self.rows_read, self.rows_kept, dropped)


class Manifest(Config):
    """A finished stage: its inputs, its options, the files it wrote, and what it dropped."""

    stage: str
    schema_version: int = SCHEMA_VERSION
    config: dict[str, Any]
    inputs_digest: str
    python_version: str = pydantic.Field(default_factory=platform.python_version)
    shards: tuple[ShardReport, ...]
    rows_read: int
    rows_kept: int
    dropped: dict[str, int]
    counts: dict[str, int]
    notes: dict[str, Any] = pydantic.Field(default_factory=dict)  # beyond counts: measured entropy, losses

    @property
    def files(self) -> list[WrittenFile]:
        """Every file of every shard, in shard order."""
        return [file for shard in self.shards for file in shard.files]

    def files_digest(self) -> str:
        """xxh3-128 over the names and identities of all files, in order: equal files have equal digests."""
        lines = "".join(f"{file.name} {file.identity}\n" for file in self.files)
        return str(xxhash.xxh3_128_hexdigest(lines.encode()))

    def check(self) -> None:
        """Raise `ConservationError` unless every shard and the total add up."""
        for shard in self.shards:
            shard.check(self.stage)
        dropped = sum(self.dropped.values())
        if self.rows_read != self.rows_kept + dropped:
            raise ConservationError(self.stage, self.rows_read, self.rows_kept, dropped)
        check_handover(f"{self.stage}: its shards", sum(shard.rows_read for shard in self.shards), self.rows_read)


def summarize(
    stage: str,
    config: Config,
    inputs_digest: str,
    shards: Iterable[ShardReport],
    notes: dict[str, Any] | None = None,
) -> Manifest:
    """Add up `shards`, in the order of their names, into a manifest.

    Raises:
        ConservationError: when a shard, and so the total, does not add up.
    """
    ordered = sorted(shards, key=lambda shard: shard.shard)
    return Manifest(
        stage=stage,
        config=config.model_dump(mode="json"),
        inputs_digest=inputs_digest,
        notes=notes or {},
        **_sums(stage, ordered),
    )


def _sums(stage: str, shards: list[ShardReport]) -> dict[str, Any]:
    """The fields of a manifest that are computed from its shards."""
    dropped: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for shard in shards:
        shard.check(stage)
        dropped.update(shard.dropped)
        counts.update(shard.counts)
    return {
        "shards": tuple(shards),
        "rows_read": sum(shard.rows_read for shard in shards),
        "rows_kept": sum(shard.rows_kept for shard in shards),
        "dropped": dict(sorted(dropped.items())),
        "counts": dict(sorted(counts.items())),
    }


def with_shards(manifest: Manifest, shards: Iterable[ShardReport]) -> Manifest:
    """`manifest` with other reports, added up again: same stage, options, inputs and notes.

    Raises:
        ConservationError: as `summarize`.
    """
    ordered = sorted(shards, key=lambda shard: shard.shard)
    return manifest.model_copy(update=_sums(manifest.stage, ordered))


def check_handover(stage: str, given: int, taken: int) -> None:
    """Raise `ConservationError` unless `stage` took exactly the rows that the step before it gave."""
    if given != taken:
        raise ConservationError(f"{stage} (rows handed over)", given, taken, 0)


def write_manifest(folder: str, manifest: Manifest) -> None:
    """Write `manifest` into `folder`: from now on, the stage counts as finished.

    Files that killed tasks left half written are removed first.

    Raises:
        ConservationError: when its rows do not add up; then nothing is written.
        SupersededError: when another run has begun in `folder`; then nothing there is changed.
    """
    manifest.check()
    storage.check_commit()
    storage.remove_partial_files(folder)
    storage.write_text(storage.join(folder, MANIFEST_NAME), manifest.model_dump_json(indent=1) + "\n")
    storage.check_commit()  # the token is still this run's
    storage.remove(storage.join(folder, ATTEMPT_NAME))


def is_finished(folder: str) -> bool:
    """Whether `folder` has a manifest."""
    return storage.exists(storage.join(folder, MANIFEST_NAME))


def read_manifest(folder: str, stage: str, verb: str) -> Manifest:
    """The manifest of `folder`, which `stage` wrote; `verb` is what a user runs to make it.

    Raises:
        NotFinishedError: when there is no manifest.
        SchemaVersionError: when another stage or another version of the schema wrote it.
    """
    url = storage.join(folder, MANIFEST_NAME)
    if not storage.exists(url):
        raise NotFinishedError(folder, verb)
    cure = f"Make it again with this version's `cert-ray {verb}`, into an empty folder."
    try:
        loaded = pydantic.TypeAdapter(dict[str, Any]).validate_json(storage.read_bytes(url))
    except pydantic.ValidationError as error:
        raise SchemaVersionError(url, "a JSON manifest", "something else", cure) from error
    for field, expected in (("schema_version", SCHEMA_VERSION), ("stage", stage)):
        if loaded.get(field) != expected:
            raise SchemaVersionError(url, f"{field} {expected}", f"{field} {loaded.get(field)}", cure)
    return Manifest.from_mapping(loaded, url)


def files_counted(manifest: Manifest) -> dict[str, Any]:
    """How many files a dataset's stages read, kept, and dropped by reason, for cards and reports."""
    return {"read": manifest.rows_read, "kept": manifest.rows_kept, "dropped": manifest.dropped}


def check_file(folder: str, file: WrittenFile, verb: str) -> None:
    """Compare `file` as it is on disk with what its report says.

    Raises:
        ShardCorruptError: when it is missing, or its size or checksum differs.
    """
    url = storage.join(folder, file.name)
    if not storage.exists(url):
        raise ShardCorruptError(url, f"{file.size_bytes} bytes", "no file", verb)
    check_same(url, storage.checksum(url), file, verb)


def check_same(url: str, found: storage.Written, file: WrittenFile, verb: str) -> None:
    """Raise `ShardCorruptError` if `found`, read at `url`, disagrees with the report of `file`."""
    if (found.size_bytes, found.checksum) != (file.size_bytes, file.checksum):
        expected = f"{file.size_bytes} bytes, xxh3 {file.checksum}"
        raise ShardCorruptError(url, expected, f"{found.size_bytes} bytes, xxh3 {found.checksum}", verb)


def are_whole(folder: str, files: Iterable[WrittenFile], verb: str) -> bool:
    """Whether all of `files` are in `folder` as their report says."""
    try:
        for file in files:
            check_file(folder, file, verb)
    except ShardCorruptError:
        return False
    return True


def finished_manifest(
    folder: str, stage: str, verb: str, config: Config, inputs_digest: str, but: Iterable[str] = ()
) -> Manifest | None:
    """The manifest of `folder` if it was made with these options and inputs and its files are intact, else None.

    Args:
        but: names of options that may differ.

    Raises:
        SchemaVersionError: when another stage, or another version of the schema, wrote `folder`.
        ConservationError: when its rows do not add up.
    """
    if not is_finished(folder):
        return None
    manifest = read_manifest(folder, stage, verb)
    if manifest.inputs_digest != inputs_digest or not config.decides_as(manifest.config, but):
        return None
    manifest.check()
    return manifest if are_whole(folder, manifest.files, verb) else None


def copy_in(file: Path, folder: str) -> WrittenFile:
    """Copy the local `file` into `folder` under its name; return a report's entry for it."""
    return WrittenFile.of(file.name, storage.copy_from_local(file, storage.join(folder, file.name)))


def tell_of_replacing(folder: str, stage: str, others: Sequence[str]) -> None:
    """Warn that what `stage` finished in `folder` is about to be replaced because `others` differ, if there are any."""
    if others:
        logger.warning(
            "%s: %s holds what was finished with other %s: it is replaced. Give each a `run` of its own to keep both.",
            stage,
            folder,
            ", ".join(others),
        )
