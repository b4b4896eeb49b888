"""Removes files from an existing run, rewriting only the shards that hold them.

In: a run's folder and the requests in its `removals.jsonl`. Out: `documents` and `dataset` without the text of the
files named, with reports, manifests and card to match: read = kept + dropped still holds, with `removed_on_request`
among the reasons. `dedup` holds only hashes and stays. Paths stay in the lists of drops.

Killed anywhere and run again, it gives the same result. A shard's new report is written first, so that from then on the
old shard counts as damaged; then its drops and statistics; then the shard, last because the others are computed from
it. Manifests come after all shards. No preprocessing may run on the folder meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from cert_ray import manifests, storage
from cert_ray.corpus.removals import (
    COLUMNS,
    Removal,
    RewrittenFile,
    blank,
    content_bytes,
    read_removals,
    selected,
    write_removals,
)
from cert_ray.dataset.annotate import row_counts, with_removed
from cert_ray.dataset.card import write_card
from cert_ray.dataset.statistics import FOLDER as STATISTICS
from cert_ray.dataset.statistics import ShardStatistics, file_name, read_statistics, shard_statistics
from cert_ray.errors import InputError, ShardCorruptError
from cert_ray.manifests import ShardReport, WrittenFile
from cert_ray.schemas import ANNOTATED, DROPS, DropReason
from cert_ray.schemas import DOCUMENTS as DOCUMENT_ROWS
from cert_ray.shards.units import REPORTS_FOLDER, report_url

VERB = "preprocess"
DOCUMENTS, DATASET = "documents", "dataset"


def request_removal(run: str, removal: Removal, keep_out: bool = False) -> Removal:
    """Record `removal` in `run`, with the shards that it touches. If it was requested before, return the first request.

    Args:
        keep_out: record it even if it selects no file of the run, so that later preprocessing leaves such files out.

    Raises:
        InputError: when there is no run, or `removal` selects nothing in it.
    """
    removals = read_removals(run)
    for known in removals:
        if known.selector == removal.selector:
            return known
    files = tuple(touched_files(run, removal))
    if not files and not keep_out:
        raise InputError(
            run,
            f"holds no file of {removal}",
            "Check the spelling with `cert-ray inspect`; with --keep-out it is recorded for files read later.",
        )
    requested = removal.model_copy(update={"files": files})
    write_removals(run, (*removals, requested))
    return requested


def touched_files(run: str, removal: Removal) -> Iterator[RewrittenFile]:
    """The shards of `run` that hold text which `removal` selects.

    Raises:
        InputError: when there is no run.
    """
    found = False
    for stage in (DOCUMENTS, DATASET):
        folder = storage.join(run, stage)
        for report in _reports(folder):
            found = True
            name = f"{report.shard}.parquet"
            table = _read_selectors(folder, name)
            mask = selected(table, [removal]) if table is not None else None
            if mask is None or not pc.any(mask).as_py():
                continue
            if stage == DOCUMENTS:  # rows removed earlier no longer have a text
                present = pc.is_valid(storage.read_parquet(storage.join(folder, name), ["content"]).column("content"))
                mask = pc.and_(mask, present)
            rows = int(pc.sum(mask).as_py())
            before = next(file.checksum for file in report.files if file.name == name)
            if rows:
                yield RewrittenFile(file=f"{stage}/{name}", rows=rows, before=before)
    if not found:
        raise InputError(run, "no run of `cert-ray preprocess`", "Give the folder that the recipe's `run` names.")


def apply_removals(run: str) -> None:
    """Rewrite whatever holds text that a request selects; if nothing does, only card and manifests are written again.

    Raises:
        ShardCorruptError: for a shard that disagrees with its report.
    """
    removals = read_removals(run)
    for stage, rewritten in ((DOCUMENTS, _without_text), (DATASET, _without_rows)):
        folder = storage.join(run, stage)
        for report in _reports(folder):
            table = _read_selectors(folder, f"{report.shard}.parquet")
            if table is not None and pc.any(selected(table, removals)).as_py():
                rewritten(folder, report, removals)
        storage.remove_partial_files(folder)
        _remove_leftovers(folder)
        if manifests.is_finished(folder):
            manifest = manifests.read_manifest(folder, stage, VERB)
            current = {report.shard: report for report in _reports(folder)}
            manifest = manifests.with_shards(manifest, [current[shard.shard] for shard in manifest.shards])
            if stage == DATASET:
                write_card(folder, manifest)
            manifests.write_manifest(folder, manifest)


def finish_removal(run: str, removal: Removal) -> Removal:
    """Record in `run` what became of the shards that `removal` touched."""
    after = {
        f"{stage}/{file.name}": file.checksum
        for stage in (DOCUMENTS, DATASET)
        for report in _reports(storage.join(run, stage))
        for file in report.files
    }
    files = tuple(file.model_copy(update={"after": after.get(file.file)}) for file in removal.files)
    finished = removal.model_copy(update={"files": files, "finished": True})
    if not removal.finished:
        others = read_removals(run)
        write_removals(run, (finished if known.selector == removal.selector else known for known in others))
    return finished if not removal.finished else removal


def _reports(folder: str) -> list[ShardReport]:
    """The reports of all finished shards in `folder`, and of those that only its manifest lists."""
    reports = {}
    if manifests.is_finished(folder):
        manifest = manifests.read_manifest(folder, storage.name_of(folder), VERB)
        reports = {report.shard: report for report in manifest.shards}
    url = storage.join(folder, REPORTS_FOLDER)
    for entry in storage.list_files(url) if storage.exists(url) else []:
        if not storage.name_of(entry.url).startswith("."):
            report = ShardReport.model_validate_json(storage.read_bytes(entry.url))
            reports[report.shard] = report
    return [reports[shard] for shard in sorted(reports)]


def _read_selectors(folder: str, name: str) -> pa.Table | None:
    """The columns of a shard that selecting needs; None if the shard was deleted as an intermediate."""
    url = storage.join(folder, name)
    return _read(url, COLUMNS) if storage.exists(url) else None


def _read(url: str, columns: list[str] | None = None) -> pa.Table:
    try:
        return storage.read_parquet(url, columns)
    except (OSError, pa.ArrowException) as error:
        raise ShardCorruptError(url, "a Parquet file", str(error).partition("\n")[0], VERB) from error


def _without_text(folder: str, report: ShardReport, removals: Sequence[Removal]) -> None:
    """Rewrite one shard of documents: its rows stay, without their text."""
    name = f"{report.shard}.parquet"
    documents = _as(DOCUMENT_ROWS, blank(_read(storage.join(folder, name)), removals))
    counts = {**report.counts, "content_bytes": content_bytes(documents)}
    _replace(folder, report, [(name, len(documents), storage.parquet_bytes(documents))], counts=counts)


def _without_rows(folder: str, report: ShardReport, removals: Sequence[Removal]) -> None:
    """Rewrite one shard of the dataset: rows become drops."""
    name, drops_name = f"{report.shard}.parquet", f"drops/{report.shard}.parquet"
    rows = _read(storage.join(folder, name))
    mask = selected(rows, removals)
    removed, rows = rows.filter(mask), _as(ANNOTATED, rows.filter(pc.invert(mask)))
    drops = _as(DROPS, _read(storage.join(folder, drops_name)))
    whole = {file.name: manifests.are_whole(folder, [file], VERB) for file in report.files}
    if whole[name] or not whole[drops_name]:  # otherwise an interrupted removal has already written the drops
        drops = with_removed(drops, removed)
    statistics = _without_names(folder, report.shard, rows, removed).model_dump_json() + "\n"
    on_request = int(pc.sum(pc.equal(drops.column("reason"), DropReason.REMOVED_ON_REQUEST)).as_py())
    _replace(
        folder,
        report,
        [
            (drops_name, len(drops), storage.parquet_bytes(drops)),
            (f"{STATISTICS}/{report.shard}.json", 0, statistics.encode()),
            (name, len(rows), storage.parquet_bytes(rows)),
        ],
        rows_kept=len(rows),
        dropped=dict(sorted({**report.dropped, str(DropReason.REMOVED_ON_REQUEST): on_request}.items())),
        counts={**report.counts, **row_counts(rows)},
    )


def _as(schema: pa.Schema, table: pa.Table) -> pa.Table:
    """`table` as the stage would have made it: Parquet files name the items of lists differently."""
    return table.cast(schema).combine_chunks()


def _without_names(folder: str, shard: str, rows: pa.Table, removed: pa.Table) -> ShardStatistics:
    """The counts of `rows`. Clusters whose survivor was removed keep their size, but not its name."""
    before = read_statistics(folder, shard).largest_clusters
    gone = {
        file_name(repository, path)
        for repository, path in zip(
            removed.column("repository").to_pylist(), removed.column("path").to_pylist(), strict=True
        )
    }
    samples = (s.model_copy(update={"kept": None}) if s.kept in gone else s for s in before)
    return shard_statistics(rows, tuple(samples))


def _replace(folder: str, report: ShardReport, contents: list[tuple[str, int, Any]], **updates: Any) -> None:
    """Write the new report, then `contents` (name, rows, bytes) in order.

    Raises:
        ShardCorruptError: when the files neither match the report nor come from an interrupted removal.
    """
    written = {
        name: WrittenFile(
            name=name, rows=rows, size_bytes=len(payload), checksum=str(xxhash.xxh3_128_hexdigest(payload))
        )
        for name, rows, payload in contents
    }
    files = tuple(written.get(file.name, file) for file in report.files)
    if storage.name_of(folder) == DOCUMENTS:  # keys, clusters and sketches made from the other rows are still valid
        files = tuple(
            old if new.checksum == old.checksum else new.model_copy(update={"stands_for": old.identity})
            for new, old in zip(files, report.files, strict=True)
        )
    after = report.model_copy(update={"files": files, **updates})
    if after == report:
        if manifests.are_whole(folder, report.files, VERB):
            return
    else:  # equal only after an interrupted removal, which leaves the same report
        for file in report.files:
            manifests.check_file(folder, file, VERB)
        after.check(storage.name_of(folder))
        storage.write_text(report_url(folder, report.shard), after.model_dump_json() + "\n")
    for name, _, payload in contents:
        storage.write_bytes(storage.join(folder, name), payload)


def _remove_leftovers(folder: str) -> None:
    """Delete shards that no report lists: they, too, may hold text."""
    if not storage.exists(folder):
        return
    known = {f"{report.shard}.parquet" for report in _reports(folder)}
    for entry in storage.list_files(folder):
        name = storage.name_of(entry.url)
        is_shard = entry.url == storage.join(folder, name) and name.endswith(".parquet")
        if is_shard and name not in known:
            storage.remove(entry.url)
