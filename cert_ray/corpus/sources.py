"""Inputs of every kind, cut into work units and read record by record.

In: `SourceConfig`. `plan_units` lists the inputs and cuts them: loose files are grouped by bytes, Parquet is cut at row
groups, an archive or a JSONL file is one unit. `read_unit` yields the records of a unit in input order, each a
`RawDocument` or a drop. Planning reads the footers of Parquet files and the first lines of JSONL files, to refuse at
once a table that lacks columns. With `limit`, it also counts members of archives, up to the limit.

Only regular files are opened. A unit lists its files with their sizes and versions (modification times, object tags),
so that a file rewritten with the same size is noticed.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import xxhash

from cert_ray import storage
from cert_ray.corpus.archives import read_archive
from cert_ray.corpus.inputs import (
    SUPPORTED,
    Columns,
    InputKind,
    RawDocument,
    Record,
    SourceConfig,
    kind_of,
)
from cert_ray.corpus.tables import check_jsonl, read_jsonl, read_parquet, row_groups
from cert_ray.errors import InputError
from cert_ray.schemas import Dropped, DropReason
from cert_ray.shards.units import WorkUnit, shard_name
from cert_ray.storage import FileEntry

__all__ = ["Columns", "RawDocument", "SourceConfig", "plan_units", "read_unit"]

logger = logging.getLogger(__name__)

Payload = dict[str, Any]


@dataclass
class _Budget:
    """How much `limit` and `max_input_bytes` still allow (None: no limit), and the bytes per unit."""

    files: int | None
    size_bytes: int | None
    unit_bytes: int

    @property
    def spent(self) -> bool:
        return self.files == 0 or (self.size_bytes is not None and self.size_bytes <= 0)

    def take(self, files: int, size_bytes: int) -> None:
        if self.files is not None:
            self.files = max(0, self.files - files)
        if self.size_bytes is not None:
            self.size_bytes -= size_bytes


@dataclass(frozen=True, slots=True)
class _Planned:
    """A planned unit: its rows if known, the version of its input, and its bytes as weight."""

    payload: Payload
    rows: int
    version: str
    weight: int


def plan_units(config: SourceConfig, first: int = 0) -> list[WorkUnit]:
    """The units of all inputs, numbered from `first`; they depend only on the inputs and `config`.

    Raises:
        InputError: for an input that does not exist, holds nothing to read, or is of an unknown kind.
        MissingColumnsError: for a table without the columns to read.
    """
    listed = [_listed(given, config) for given in _expanded(config.inputs)]
    in_all = sum(_cost(entry, config) for found in listed for entry in (*found.files, *found.containers))
    budget = _Budget(config.limit, config.max_input_bytes, config.unit_bytes_of(in_all))
    payloads: list[_Planned] = []
    for found in listed:
        payloads += _plan_files(found.folder, found.files, config, budget)
        for source, entry in zip(found.sources, found.containers, strict=True):
            if budget.spent:
                break
            payloads += _plan_container(source, entry, config, budget)
    return [
        WorkUnit(
            name=shard_name(index),
            payload=planned.payload,
            rows=planned.rows,
            version=planned.version,
            weight=planned.weight,
        )
        for index, planned in enumerate(payloads, first)
    ]


def read_unit(unit: WorkUnit, config: SourceConfig) -> Iterator[Record]:
    """The records of `unit`, in input order; only the current one is held in memory.

    Raises:
        InputError: when the disk or store fails while reading. (A damaged file is a drop.)
    """
    payload = unit.payload
    if payload["kind"] == "files":
        return _read_files(payload, config)
    return _bounded(_read_container(payload, config), payload["limit"], payload["max_bytes"])


def _expanded(inputs: tuple[str, ...]) -> Iterator[str]:
    """Inputs in the order given, without duplicates; globs are replaced by what they match."""
    seen: set[str] = set()
    for given in inputs:
        matches = [given]
        if any(character in given for character in "*?[") and not storage.exists(given):
            matches = storage.find(given)
            if not matches:
                raise InputError(given, "nothing matches this pattern", "Check the path; quote it for the shell.")
        yield from (match for match in matches if match not in seen)
        seen.update(matches)


@dataclass(frozen=True, slots=True)
class _Listed:
    """What to read of one input: loose files below `folder`, then containers, each with the name of its source."""

    folder: str
    files: list[FileEntry]
    containers: list[FileEntry]
    sources: list[str]


def _listed(given: str, config: SourceConfig) -> _Listed:
    if storage.is_folder(given):
        return _listed_folder(given, config)
    if not storage.exists(given):
        raise InputError(given, "nothing there", "Check the path, or the credentials for its store.")
    entry = storage.list_files(given)[0]
    name = storage.name_of(given)
    if storage.is_local(given) and not storage.local_path(given).is_file():
        raise InputError(given, "not a regular file", "Only files and folders are read.")
    if kind_of(given):
        return _Listed(given, [], [entry], [given])
    if config.matcher()(name):
        return _Listed(given.rstrip("/").removesuffix(name).rstrip("/") or ".", [entry], [], [])
    raise InputError(
        given,
        f"its name is not that of any input (include is {', '.join(config.include)})",
        f"Supported are folders, files that `include` names, and {SUPPORTED}.",
    )


def _listed_folder(given: str, config: SourceConfig) -> _Listed:
    entries = storage.list_files(given)
    root = _root_of(given)
    matches = config.matcher()
    files = [entry for entry in entries if matches(entry.url[len(root) :])]
    containers = [entry for entry in entries if kind_of(entry.url)]
    opened = config.open_containers if config.open_containers is not None else not files
    if not files and not (opened and containers):
        raise InputError(
            given,
            f"holds no file to read: {len(entries)} files, none matches include={list(config.include)}"
            + (f", exclude={list(config.exclude)}" if config.exclude else ""),
            f"Change include or exclude, or give archives and tables ({SUPPORTED}).",
        )
    logger.info(
        "%s: %d files match, %d archives and tables %s, %d others left out",
        given,
        len(files),
        len(containers),
        "opened" if opened else "left closed",
        len(entries) - len(files) - len(containers),
    )
    opened_containers = containers if opened else []
    return _Listed(
        given, files, opened_containers, [storage.join(given, entry.url[len(root) :]) for entry in opened_containers]
    )


def _root_of(given: str) -> str:
    """The prefix that `storage.list_files` puts before the relative paths below the folder `given`."""
    filesystem, path = storage.resolve(given)
    root = path if storage.is_local(given) else filesystem.unstrip_protocol(path)
    return str(root).rstrip("/") + "/"


def _plan_files(given: str, entries: list[FileEntry], config: SourceConfig, budget: _Budget) -> Iterator[_Planned]:
    """Loose files, in order, as units of about `unit_bytes`."""
    root = _root_of(given)
    group: list[FileEntry] = []
    grouped_bytes = 0

    def planned() -> _Planned:
        names = [_as_json(entry.url[len(root) :]) for entry in group]
        sizes = [entry.size_bytes for entry in group]
        payload = {"kind": "files", "source": given, "root": _as_json(root), "files": names, "sizes": sizes}
        versions = xxhash.xxh3_128_hexdigest("\n".join(entry.version for entry in group).encode())
        return _Planned(payload, len(group), str(versions), grouped_bytes)

    for entry in entries:
        cost = _cost(entry, config)
        if budget.spent or (budget.size_bytes is not None and cost > budget.size_bytes):
            budget.size_bytes = 0 if budget.size_bytes is not None else None
            break
        if group and grouped_bytes + cost > budget.unit_bytes:
            yield planned()
            group, grouped_bytes = [], 0
        group.append(entry)
        grouped_bytes += cost
        budget.take(1, cost)
    if group:
        yield planned()


def _cost(entry: FileEntry, config: SourceConfig) -> int:
    """How many bytes of a file are read; of a loose file at most `max_file_bytes`."""
    return entry.size_bytes if kind_of(entry.url) else min(entry.size_bytes, config.max_file_bytes)


def _plan_container(source: str, entry: FileEntry, config: SourceConfig, budget: _Budget) -> Iterator[_Planned]:
    kind = kind_of(entry.url)
    payload = {
        "kind": kind,
        "source": _shown(source),
        "url": _as_json(entry.url),
        "size_bytes": entry.size_bytes,
        "limit": budget.files,
        "max_bytes": budget.size_bytes,
    }
    if kind is InputKind.PARQUET:
        for groups, rows, size_bytes in row_groups(entry.url, source, config, budget.unit_bytes):
            if budget.spent:
                return
            taken = rows if budget.files is None else min(rows, budget.files)
            left = {"limit": budget.files, "max_bytes": budget.size_bytes}
            yield _Planned({**payload, **left, "row_groups": groups}, taken, entry.version, size_bytes)
            budget.take(taken, size_bytes)
        return
    if kind is InputKind.JSONL:
        check_jsonl(entry.url, source, config)
    rows = 0
    if budget.files is not None:  # counting stops at the limit, which is small
        unit = WorkUnit(name="counting", payload=payload)
        rows = sum(1 for _ in read_unit(unit, config))
    yield _Planned(payload, rows, entry.version, entry.size_bytes)
    budget.take(rows, entry.size_bytes)


def _as_json(path: str) -> str:
    """`path` in a form that JSON can hold, since file names need not be UTF-8. `_from_json` reads it back."""
    return path.encode("utf-8", "surrogateescape").decode("latin-1")


def _from_json(text: str) -> str:
    return text.encode("latin-1").decode("utf-8", "surrogateescape")


def _shown(path: str) -> str:
    """`path` as UTF-8 text; invalid bytes become the replacement character."""
    return path if path.isascii() else path.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _read_files(payload: Payload, config: SourceConfig) -> Iterator[Record]:
    root = _from_json(payload["root"])
    filesystem, folder = storage.resolve(root)
    local = storage.is_local(root)
    for name in map(_from_json, payload["files"]):
        if local:
            content = _read_local(root + name, config.max_file_bytes)
        else:
            content = _read_remote(filesystem, storage.join(folder, name), config.max_file_bytes)
        if isinstance(content, Dropped):
            yield _shown(name), payload["source"], content
        else:
            yield RawDocument(_shown(name), payload["source"], content)


def _read_local(path: str, max_bytes: int) -> bytes | Dropped:
    try:
        # O_NONBLOCK: otherwise opening a FIFO waits for its writer, possibly for ever.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        return Dropped(DropReason.UNREADABLE, error.strerror or "cannot be opened")
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            return Dropped(DropReason.UNREADABLE, "not a regular file")
        blocks, size = [], 0
        while size <= max_bytes and (block := os.read(handle, max_bytes + 1 - size)):
            blocks.append(block)
            size += len(block)
    except OSError as error:
        return Dropped(DropReason.UNREADABLE, error.strerror or "cannot be read")
    finally:
        os.close(handle)
    return Dropped(DropReason.TOO_LARGE) if size > max_bytes else b"".join(blocks)


def _read_remote(filesystem: Any, path: str, max_bytes: int) -> bytes | Dropped:
    try:
        with filesystem.open(path, "rb") as stream:
            content = bytes(stream.read(max_bytes + 1))
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        return Dropped(DropReason.UNREADABLE, type(error).__name__)
    return Dropped(DropReason.TOO_LARGE) if len(content) > max_bytes else content


def _read_container(payload: Payload, config: SourceConfig) -> Iterator[Record]:
    url, source = _from_json(payload["url"]), payload["source"]
    kind = InputKind(payload["kind"])
    if storage.is_local(url) and not storage.local_path(url).is_file():
        return iter([(storage.name_of(source), source, Dropped(DropReason.UNREADABLE, "not a regular file"))])
    if kind is InputKind.PARQUET:
        return read_parquet(url, source, payload["row_groups"], config)
    if kind is InputKind.JSONL:
        return read_jsonl(url, source, config)
    return read_archive(url, source, kind, config)


def _bounded(records: Iterator[Record], limit: int | None, max_bytes: int | None) -> Iterator[Record]:
    """At most `limit` of `records`, ending before the one that would exceed `max_bytes` of content."""
    for number, record in enumerate(records):
        if limit is not None and number >= limit:
            return
        if max_bytes is not None and isinstance(record, RawDocument):
            max_bytes -= len(record.payload)
            if max_bytes < 0:
                return
        yield record
