"""Work units and what has become of them: pure bookkeeping, no execution.

In: `WorkUnit`s, named and numbered by the input list. Out: which of them are finished already. A finished unit has a
`reports/<name>.json` whose digest equals the unit's and whose files carry the checksums it states; anything else is
done again. Units never depend on the worker, the clock or the order of completion.

`versions/<name>` holds the version of a unit's input where its storage tells one (a time of change, an object's tag):
another one means that the input was written again, though its name and size are the same. Versions decide what is
reused; nothing that is made from an input knows them.

Each run of a stage puts a token into its folder. Its tasks and its driver check it before what they write becomes
visible, so neither can overwrite a later run's files (but for the moment between that look and the rename). What a
later run makes of the stages before must not be read into shards that are called after what stood there before:
`made_from` and `check_source` see to that.
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

# By a timeline of 969 MB on two cores (2026-11-26): cleaning takes about 4.4 MB a second and core. The shares are
# assumed; with them that run had 62 tasks in place of 107.
BATCH_WEIGHT = 64_000_000  # that a task takes at most, unless one unit is more: some fifteen seconds
_SHARES_LEFT = 2  # a batch is at most a worker's share of what is left, divided by this
_LEAST_WEIGHT = 4_000_000  # below which no batch need be: about a second
_LEAST_SHARES = 8  # nor below a worker's share of everything, divided by this


class WorkUnit(Config):
    """A slice of a stage's input. `name` is `shard-00007`; `payload` is JSON and says which part of the input it is."""

    name: str
    payload: dict[str, Any]
    rows: int = 0
    version: str = pydantic.Field(default="", exclude=True)  # of the input, where its storage tells one
    # Work, as of cleaning so many bytes of input; 0 is unknown. The heaviest start first.
    weight: int = pydantic.Field(default=0, exclude=True)

    def unit_digest(self, config_digest: str) -> str:
        """xxh3-128 of the unit, the stage's config and the schema: a report with another one belongs to another run."""
        lines = f"{SCHEMA_VERSION}\n{config_digest}\n{self.model_dump_json()}"
        return str(xxhash.xxh3_128_hexdigest(lines.encode()))


Work = Callable[[WorkUnit], ShardReport]


def shard_name(index: int) -> str:
    """The name of the unit at `index` of the input list."""
    return f"shard-{index:05d}"


def weight_after_cleaning(documents: ShardReport, times_faster: float) -> int:
    """The weight of a unit made of a shard of `documents`, by work so many times faster than cleaning.

    1 at least, also of a shard without documents: 0 would be unknown, and is where the report does not tell.
    """
    size_bytes = documents.counts.get("content_bytes")
    return 0 if size_bytes is None else max(1, math.ceil(size_bytes / times_faster))


def inputs_digest(units: Iterable[WorkUnit]) -> str:
    """xxh3-128 over all units, in order: equal inputs, equal digest."""
    digest = xxhash.xxh3_128()
    for unit in units:
        digest.update(unit.model_dump_json().encode())
        digest.update(b"\n")
    return digest.hexdigest()


def batches(units: Sequence[WorkUnit], workers: int) -> list[list[WorkUnit]]:
    """All units, heaviest first, as the tasks of a stage: large ones first, small ones at the end.

    Handing a task over takes Ray Data some tenths of a second, as long as a small unit itself. So each batch takes a
    share of what is left (factoring: Hummel, Schonberg, Flynn, CACM 1992), and workers still end together; to the last
    few seconds of work, where a share would be less than handing it over takes. A unit of `BATCH_WEIGHT` or more is
    alone, and so is one of unknown weight.
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
    """Write `table` to `folder`/`name` as Parquet; returns the report's entry for it."""
    written = storage.write_parquet(table, storage.join(folder, name))
    return WrittenFile(name=name, rows=table.num_rows, size_bytes=written.size_bytes, checksum=written.checksum)


@dataclass(frozen=True, slots=True)
class Attempt:
    """One run of a stage: where, of what (`verb` is what a user runs to make it), by which options."""

    folder: str
    stage: str
    verb: str
    config_digest: str
    token: str  # in the folder as long as no later run has begun there

    def check(self) -> None:
        """Before a write becomes visible: is this still the last run that began in the folder?

        Raises:
            SupersededError: when a later one has begun, or finished.
            ConfigError: when this node does not see that any has: its disk is another one.
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
    """The token of the run that is at work in `folder`; None where the last one has finished."""
    try:
        return storage.read_text(storage.join(folder, ATTEMPT_NAME))
    except FileNotFoundError:
        return None


@contextmanager
def attempt(folder: str, stage: str, verb: str, config_digest: str) -> Iterator[Attempt]:
    """A run of `stage` in `folder`, by a token of its own: from now on earlier runs write nothing more there.

    Whatever the block writes, `SupersededError` is raised instead as soon as a later run has begun.

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
    """The block reads the finished stage in `folder`: is it finished, and the same, when the block ends?

    A later run of other options takes that manifest away, and shards with it, without a word to a run that is at a
    later stage by then: what that one has to read is missing or another's, not damaged.

    Raises:
        SupersededError: when it is not, whatever the block raised. Otherwise that comes as it is.
    """
    try:
        yield
    except SupersededError:
        raise
    except Exception as error:  # of any kind, since Ray tells its tasks' errors as errors of its own
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
    """For work that has read a shard of the finished stage in `folder`: was that the one known by `identity`?

    Where a later run makes other shards there, what was read may be one of them, and nothing made from it may be called
    after the one that stood there before. Asked in the work's task, before it returns its report.

    Raises:
        SupersededError: when a later run is at work there, or has made another one.
    """
    if _token(folder) is not None:
        raise SupersededError(folder)
    report = _read_report(folder, shard)  # after the token: a run that ended between both is seen by what it left
    if report is None or report.files[0].identity != identity:
        raise SupersededError(folder)


def perform(unit: WorkUnit, work: Work, run: Attempt) -> ShardReport:
    """Run `work` on `unit`, check that its rows add up, and write its report: only then is the unit finished.

    Raises:
        SupersededError: when a later run has begun in the folder; nothing of it is overwritten.
    """
    with storage.commits_guarded(run.check):
        report = work(unit).model_copy(update={"unit_digest": unit.unit_digest(run.config_digest)})
        report.check(run.stage)
        if unit.version:
            storage.write_text(_version_url(run.folder, unit.name), unit.version)
        storage.write_text(report_url(run.folder, unit.name), report.model_dump_json() + "\n")
    return report


def finished_report(unit: WorkUnit, folder: str, config_digest: str, verb: str) -> ShardReport | None:
    """The report of `unit` if it was finished from the same input and config and its files are whole, else None."""
    report = _read_report(folder, unit.name)
    if report is None or report.unit_digest != unit.unit_digest(config_digest) or was_rewritten(unit, folder):
        return None
    return report if manifests.are_whole(folder, report.files, verb) else None


def _read_report(folder: str, name: str) -> ShardReport | None:
    """The report of a shard; None where there is none that can be read."""
    url = report_url(folder, name)
    if not storage.exists(url):
        return None
    try:
        return ShardReport.model_validate_json(storage.read_bytes(url))
    except pydantic.ValidationError:
        return None


@contextmanager
def damage_named(folder: str, shard: str, verb: str) -> Iterator[None]:
    """Where the block, which reads files of `shard`, fails: is one of them not what the shard's report says?

    Files are compared with their reports before a stage reads them, once; this is for what happens to them afterwards.

    Raises:
        ShardCorruptError: naming that file. Where all of them are whole, what the block raised comes as it is.
        SupersededError: when the run that reads them has been superseded: the later one may have removed them.
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
    """Whether the input of `unit` has another version than when its shard was made; unknown versions are no others."""
    url = _version_url(folder, unit.name)
    return bool(unit.version) and storage.exists(url) and storage.read_text(url) != unit.version


def withdraw_manifest(units: Sequence[WorkUnit], folder: str, config_digest: str, stage: str, verb: str) -> None:
    """Remove the manifest of `folder` unless its shards are those of `units` as they are: they are about to change.

    Units that are only damaged are rebuilt with the same bytes, so a manifest of the same units may stand meanwhile.

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
    """Remove what units of an earlier plan left in `folder` that `units` lack: readers would take it for data."""
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
        storage.remove(entry.url)  # last: killed before, the next run finds it again


def clear_for(units: Sequence[WorkUnit], run: Attempt) -> None:
    """Remove from the run's folder what must not stand while `units` are made: another plan's manifest and units.

    Raises:
        SchemaVersionError: when another stage, or another version of the schema, wrote the folder.
    """
    withdraw_manifest(units, run.folder, run.config_digest, run.stage, run.verb)
    remove_other_units(units, run.folder)


def run_in_process(units: Sequence[WorkUnit], work: Work, run: Attempt) -> list[ShardReport]:
    """Every unit's report, one after the other in this process: what the run on Ray must equal."""
    clear_for(units, run)
    return [
        finished_report(unit, run.folder, run.config_digest, run.verb) or perform(unit, work, run) for unit in units
    ]


def report_url(folder: str, name: str) -> str:
    """Where the report of the unit `name` stands."""
    return storage.join(folder, REPORTS_FOLDER, f"{name}.json")


def _version_url(folder: str, name: str) -> str:
    return storage.join(folder, VERSIONS_FOLDER, name)
