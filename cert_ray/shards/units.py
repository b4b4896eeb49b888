"""Work units and what has become of them: pure bookkeeping, no execution.

In: `WorkUnit`s, named and numbered by the input list. Out: which of them are already finished. A finished unit has a
`reports/<name>.json` whose digest equals the unit's and whose files have the checksums it states; anything else is done
again. Units never depend on the worker, the clock or the order of completion.

`versions/<name>` holds the version of a unit's input if its storage reports one (a modification time, an object tag).
Another version means that the input was rewritten, even if its name and size are the same. Versions decide only what is
reused; nothing made from an input contains them.

Each run of a stage puts a token into its folder. Its tasks and its driver check it before what they write becomes
visible, so neither can overwrite a later run's files (except in the moment between check and rename). If a later run
remakes an earlier stage meanwhile, its shards must not be taken for those that were there before: `made_from` and
`check_source` prevent that.
"""

from __future__ import annotations

import math
import socket
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pydantic
import xxhash

from cert_ray import manifests, storage
from cert_ray.config import Config
from cert_ray.errors import ConfigError, NotFinishedError, SchemaVersionError, SupersededError
from cert_ray.manifests import ATTEMPT_NAME, Manifest, ShardReport, WrittenFile
from cert_ray.schemas import SCHEMA_VERSION

REPORTS_FOLDER = "reports"
VERSIONS_FOLDER = "versions"

# From a timeline of 969 MB on two cores (2026-11-26): cleaning does about 4.4 MB per second and core. The shares are
# assumed; with them, that run had 62 tasks instead of 107.
BATCH_WEIGHT = 64_000_000  # upper limit of a task, unless one unit is more: about fifteen seconds
_SHARES_LEFT = 2  # a batch is at most a worker's share of what is left, divided by this
_LEAST_WEIGHT = 4_000_000  # a batch need not be smaller than this: about a second
_LEAST_SHARES = 8  # nor smaller than a worker's share of everything, divided by this


class WorkUnit(Config):
    """A slice of a stage's input. `name` is like `shard-00007`; `payload` is JSON and says which part of the input."""

    name: str
    payload: dict[str, Any]
    rows: int = 0
    version: str = pydantic.Field(default="", exclude=True)  # of the input, if its storage reports one
    # Work in bytes of input that could be cleaned in the same time; 0 is unknown. The heaviest units start first.
    weight: int = pydantic.Field(default=0, exclude=True)

    def unit_digest(self, config_digest: str) -> str:
        """xxh3-128 of unit, stage config and schema: a report with a different digest belongs to another run."""
        lines = f"{SCHEMA_VERSION}\n{config_digest}\n{self.model_dump_json()}"
        return str(xxhash.xxh3_128_hexdigest(lines.encode()))


Work = Callable[[WorkUnit], ShardReport]


def shard_name(index: int) -> str:
    """The name of the unit at `index` of the input list."""
    return f"shard-{index:05d}"


def weight_after_cleaning(documents: ShardReport, times_faster: float) -> int:
    """The weight of a unit made from a shard of `documents`, for work `times_faster` times as fast as cleaning.

    At least 1, even for a shard without documents. 0 means unknown, and is returned if the report does not tell.
    """
    size_bytes = documents.counts.get("content_bytes")
    return 0 if size_bytes is None else max(1, math.ceil(size_bytes / times_faster))


def inputs_digest(units: Iterable[WorkUnit]) -> str:
    """xxh3-128 over all units, in order: equal inputs have equal digests."""
    digest = xxhash.xxh3_128()
    for unit in units:
        digest.update(unit.model_dump_json().encode())
        digest.update(b"\n")
    return digest.hexdigest()


def batches(units: Sequence[WorkUnit], workers: int) -> list[list[WorkUnit]]:
    """All units, heaviest first, grouped into the tasks of a stage: large tasks first, small ones at the end.

    Starting a task takes Ray Data some tenths of a second, as long as a small unit itself. So each batch takes a share
    of what is left (factoring: Hummel, Schonberg, Flynn, CACM 1992), and workers still finish together. Shares stop
    shrinking for the last few seconds of work, where starting a task would take longer than the task. A unit of
    `BATCH_WEIGHT` or more is alone, and so is one of unknown weight.
    """
    weights = {unit.name: unit.weight or BATCH_WEIGHT for unit in units}
    left = sum(weights.values())
    workers = max(workers, 1)
    least = min(_LEAST_WEIGHT, left / (_LEAST_SHARES * workers))
    result: list[list[WorkUnit]] = []
    taken = share = 0.0
    for unit in sorted(units, key=lambda unit: -weights[unit.name]):
        if not result or taken + weights[unit.name] > share:
            share = min(max(left / (_SHARES_LEFT * workers), least), BATCH_WEIGHT)
            taken = 0
            result.append([])
        result[-1].append(unit)
        taken += weights[unit.name]
        left -= weights[unit.name]
    return result


def write_table(folder: str, name: str, table: pa.Table) -> WrittenFile:
    """Write `table` to `folder`/`name` as Parquet; return the report's entry for it."""
    written = storage.write_parquet(table, storage.join(folder, name))
    return WrittenFile.of(name, written, table.num_rows)


@dataclass(frozen=True, slots=True)
class Attempt:
    """One run of a stage: its folder, its options, and the `verb` that a user runs for it."""

    folder: str
    stage: str
    verb: str
    config_digest: str
    token: str  # stays in the folder until a later run begins there

    def check(self) -> None:
        """Check that this is still the last run that began in the folder, before a write becomes visible.

        Raises:
            SupersededError: when a later run has begun, or finished.
            ConfigError: when this node sees no run there at all: the folder is on another disk.
        """
        found = _token(self.folder)
        if found is None and not manifests.is_finished(self.folder):
            raise ConfigError(
                f"{self.folder}: this run began there, and {socket.gethostname()} does not see it. Give a `run` that "
                "every node sees: a shared folder, or a URL."
            )
        if found != self.token:
            raise SupersededError(self.folder)


def _token(folder: str) -> str | None:
    """The token of the run at work in `folder`; None if the last run has finished."""
    try:
        return storage.read_text(storage.join(folder, ATTEMPT_NAME))
    except FileNotFoundError:
        return None


@contextmanager
def attempt(folder: str, stage: str, verb: str, config_digest: str) -> Iterator[Attempt]:
    """Begin a run of `stage` in `folder`, with its own token: from now on, earlier runs write nothing more there.

    Once a later run has begun, any write in the block raises `SupersededError` instead.

    Raises:
        SchemaVersionError: when another stage, or another version of the schema, wrote `folder`; it is not touched.
    """
    if manifests.is_finished(folder):
        manifests.read_manifest(folder, stage, verb)
    begun = Attempt(folder, stage, verb, config_digest, uuid.uuid4().hex)
    storage.write_text(storage.join(folder, ATTEMPT_NAME), begun.token)
    with storage.commits_guarded(begun.check):
        yield begun


@contextmanager
def made_from(folder: str, manifest: Manifest, verb: str) -> Iterator[None]:
    """Check that the finished stage in `folder`, which the block reads, is still there and the same when it ends.

    A later run with other options removes that manifest, and shards with it, while this run may be at a later stage.
    What this run then reads is missing or belongs to the other run, but it is not damaged.

    Raises:
        SupersededError: when the stage has changed, whatever the block raised. Otherwise the block's own error passes.
    """
    try:
        yield
    except SupersededError:
        raise
    except Exception as error:  # of any kind, since Ray wraps errors of tasks in its own
        if not _stands(folder, manifest, verb):
            raise SupersededError(folder) from error
        raise
    if not _stands(folder, manifest, verb):
        raise SupersededError(folder)


def _stands(folder: str, manifest: Manifest, verb: str) -> bool:
    try:
        return manifests.read_manifest(folder, manifest.stage, verb).files_digest() == manifest.files_digest()
    except (NotFinishedError, SchemaVersionError):
        return False


def check_source(folder: str, shard: str, identity: str) -> None:
    """Check that a shard of the finished stage in `folder`, which was just read, is the one known by `identity`.

    If a later run makes other shards there, the shard read may be one of them; what is made from it must not pass for
    the result of the earlier one. Call this in the task, before it returns its report.

    Raises:
        SupersededError: when a later run is at work there, or has made another shard.
    """
    if _token(folder) is not None:
        raise SupersededError(folder)
    report = _read_report(folder, shard)  # read after the token: shows a run that ended in between
    if report is None or report.files[0].identity != identity:
        raise SupersededError(folder)


def perform(unit: WorkUnit, work: Work, run: Attempt) -> ShardReport:
    """Run `work` on `unit`, check that its rows add up, and write its report: only then is the unit finished.

    Raises:
        SupersededError: when a later run has begun in the folder; none of its files are overwritten.
    """
    with storage.commits_guarded(run.check):
        report = work(unit).model_copy(update={"unit_digest": unit.unit_digest(run.config_digest)})
        report.check(run.stage)
        if unit.version:
            storage.write_text(_version_url(run.folder, unit.name), unit.version)
        storage.write_text(report_url(run.folder, unit.name), report.model_dump_json() + "\n")
    return report


def finished_report(unit: WorkUnit, folder: str, config_digest: str, verb: str) -> ShardReport | None:
    """The report of `unit` if it was finished with the same input and config and its files are intact, else None."""
    report = _read_report(folder, unit.name)
    if report is None or report.unit_digest != unit.unit_digest(config_digest) or was_rewritten(unit, folder):
        return None
    return report if manifests.are_whole(folder, report.files, verb) else None


def _read_report(folder: str, name: str) -> ShardReport | None:
    """The report of a shard; None if it is missing or cannot be read."""
    url = report_url(folder, name)
    if not storage.exists(url):
        return None
    try:
        return ShardReport.model_validate_json(storage.read_bytes(url))
    except pydantic.ValidationError:
        return None


@contextmanager
def damage_named(folder: str, shard: str, verb: str) -> Iterator[None]:
    """If the block, which reads files of `shard`, fails: check whether one of them disagrees with the shard's report.

    Files are compared with their reports once, before a stage reads them; this finds what happened to them afterwards.

    Raises:
        ShardCorruptError: naming that file. If all of them are intact, the block's own error passes.
        SupersededError: when the run that reads them has been superseded: the later run may have removed them.
    """
    try:
        yield
    except (pa.ArrowException, OSError, ValueError):
        storage.check_commit()
        report = _read_report(folder, shard)
        for file in report.files if report is not None else ():
            manifests.check_file(folder, file, verb)
        raise


def was_rewritten(unit: WorkUnit, folder: str) -> bool:
    """Whether the input's version has changed since the shard of `unit` was made; an unknown version never counts."""
    url = _version_url(folder, unit.name)
    return bool(unit.version) and storage.exists(url) and storage.read_text(url) != unit.version


def withdraw_manifest(units: Sequence[WorkUnit], folder: str, config_digest: str, stage: str, verb: str) -> None:
    """Remove the manifest of `folder`, whose shards are about to change, unless it already lists exactly `units`.

    Units that are only damaged are rebuilt with the same bytes, so a manifest of the same units may stay meanwhile.

    Raises:
        SchemaVersionError: when another stage, or another version of the schema, wrote `folder`.
    """
    if not manifests.is_finished(folder):
        return
    standing = [(shard.shard, shard.unit_digest) for shard in manifests.read_manifest(folder, stage, verb).shards]
    wanted = [(unit.name, unit.unit_digest(config_digest)) for unit in units]
    if standing != wanted or any(was_rewritten(unit, folder) for unit in units):
        storage.remove(storage.join(folder, manifests.MANIFEST_NAME))


def remove_other_units(units: Sequence[WorkUnit], folder: str) -> None:
    """Remove the files of an earlier plan's units that are not among `units`: readers would take them for data."""
    reports = storage.join(folder, REPORTS_FOLDER)
    if not storage.exists(reports):
        return
    kept = {unit.name for unit in units}
    for entry in storage.list_files(reports):
        name = storage.name_of(entry.url).removesuffix(".json")
        if name in kept:
            continue
        try:
            files = ShardReport.model_validate_json(storage.read_bytes(entry.url)).files
        except pydantic.ValidationError:
            files = ()
        for file in files:
            storage.remove(storage.join(folder, file.name))
        storage.remove(_version_url(folder, name))
        storage.remove(entry.url)  # last: after a kill, the next run finds it again


def clear_for(units: Sequence[WorkUnit], run: Attempt) -> None:
    """Remove from the run's folder what must not exist while `units` are made: another plan's manifest and units.

    Raises:
        SchemaVersionError: when another stage, or another version of the schema, wrote the folder.
    """
    withdraw_manifest(units, run.folder, run.config_digest, run.stage, run.verb)
    remove_other_units(units, run.folder)


def run_in_process(units: Sequence[WorkUnit], work: Work, run: Attempt) -> list[ShardReport]:
    """Run the units one after the other in this process; a run on Ray must give the same reports."""
    clear_for(units, run)
    return [
        finished_report(unit, run.folder, run.config_digest, run.verb) or perform(unit, work, run) for unit in units
    ]


def report_url(folder: str, name: str) -> str:
    """The URL of the report of the unit `name`."""
    return storage.join(folder, REPORTS_FOLDER, f"{name}.json")


def _version_url(folder: str, name: str) -> str:
    return storage.join(folder, VERSIONS_FOLDER, name)
