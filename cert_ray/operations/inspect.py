"""`cert-ray inspect`: rows of a dataset, why files were dropped, and a file beside its sketch.

In: a run's folder or its `dataset`. Out: text on a `rich` console: tables in colour at a terminal, else plain lines
with tabs between columns. Reads only what it shows: for rows, the first shards; for drops, the shards whose reports
count the reason; for a document, one row group of the shard that its id begins with.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cert_ray import manifests, storage
from cert_ray.dataset.pairs import COLUMNS, Block, Piece, blocks_of
from cert_ray.errors import InputError, NotFinishedError
from cert_ray.manifests import Manifest
from cert_ray.schemas import DropReason
from cert_ray.sketching.anonymize import SketchKind

VERB = "preprocess"
_DOC_ID = re.compile(r"(shard-[^/.]+)-\d+")
_ROW_COLUMNS = ["doc_id", "path", "repository", "size_bytes", "stars", "cluster_size", "weight", "libraries"]
_FACTS = ["doc_id", "path", "source", "repository", "stars", "licence", "size_bytes", "libraries", "ut_score"]
_FACTS += ["func_score", "weight", "cluster_size"]
_DUPLICATES = {DropReason.EXACT_DUPLICATE, DropReason.NEAR_DUPLICATE}
_STYLES = {"string": "black on bright_green", "name": "black on bright_yellow", "number": "black on bright_cyan"}
_NUMBERS = {"number", "float", "floatexponant", "complex"}


@dataclass(frozen=True, slots=True)
class Opened:
    """A finished dataset, and those of the stages it was made from that are still there."""

    folder: str
    manifest: Manifest
    documents: Manifest | None
    run: str | None


@dataclass(frozen=True, slots=True)
class DroppedFile:
    """A file that is not in the dataset. `survivor` is the id and name of the file that was kept for a duplicate."""

    path: str
    source: str
    reason: str
    detail: str
    survivor: str | None = None


def open_run(url: str) -> Opened:
    """The dataset at `url`, which is a run's folder or its `dataset`.

    Raises:
        InputError: when it is neither.
        NotFinishedError, SchemaVersionError: when there is no finished dataset of this version.
    """
    url = storage.absolute(url)
    below = storage.join(url, "dataset")
    run: str | None = url
    folder = below
    if not manifests.is_finished(below):
        if not manifests.is_finished(url):
            if not storage.exists(storage.join(url, "documents")) and not storage.exists(below):
                raise InputError(url, "neither a run's folder nor a dataset", "Give what the recipe names as `run`.")
            raise NotFinishedError(url, VERB)
        folder = url.rstrip("/")
        run = folder.removesuffix("/dataset") if folder.endswith("/dataset") else None
    documents = storage.join(run, "documents") if run else None
    known = manifests.read_manifest(documents, "documents", VERB) if documents and _finished(documents) else None
    return Opened(folder, manifests.read_manifest(folder, "dataset", VERB), known, run)


def _finished(folder: str) -> bool:
    return storage.exists(folder) and manifests.is_finished(folder)


def rows_of(opened: Opened, limit: int) -> list[dict[str, Any]]:
    """The first `limit` rows, without their text."""
    rows: list[dict[str, Any]] = []
    for shard in opened.manifest.shards:
        if len(rows) >= limit:
            break
        with storage.open_parquet(storage.join(opened.folder, f"{shard.shard}.parquet")) as table:
            for batch in table.iter_batches(min(limit, 4096), columns=_ROW_COLUMNS):
                rows += batch.to_pylist()
                if len(rows) >= limit:
                    break
    return rows[:limit]


def drops_of(opened: Opened, reason: str, limit: int) -> list[DroppedFile]:
    """The first `limit` files dropped for `reason`.

    Raises:
        InputError: when nothing was dropped for it, or the drops of its stage are not beside the dataset.
    """
    if not opened.manifest.dropped.get(reason):
        known = ", ".join(f"{name} ({count:,})" for name, count in opened.manifest.dropped.items()) or "nothing"
        raise InputError(opened.folder, f"no file was dropped as {reason}", f"Dropped were {known}.")
    found: list[DroppedFile] = []
    for shard in opened.manifest.shards:
        if len(found) < limit and shard.dropped.get(reason):
            found += list(_drops_of_shard(opened, shard.shard, reason, limit - len(found)))
    if not found:
        raise InputError(
            opened.folder,
            f"files were dropped as {reason} by the stage `documents`, whose folder is not beside it",
            "Give the run's folder, with `documents/drops` in it.",
        )
    return found


def _drops_of_shard(opened: Opened, shard: str, reason: str, limit: int) -> Iterator[DroppedFile]:
    folders = [opened.folder, *([storage.join(opened.run, "documents")] if opened.run else [])]
    for folder in folders:
        url = storage.join(folder, "drops", f"{shard}.parquet")
        if limit <= 0 or not storage.exists(url):
            continue
        table = storage.read_parquet(url)
        table = table.filter(pc.equal(table.column("reason"), reason)).slice(0, limit)
        limit -= len(table)
        for row in table.to_pylist():
            survivor = _survivor(opened, row["detail"]) if reason in _DUPLICATES else None
            yield DroppedFile(row["path"], row["source"], reason, row["detail"] or "", survivor)


def _survivor(opened: Opened, number: str | None) -> str | None:
    """The document with that number in the whole corpus: its id and path, or its place if its text is gone."""
    if opened.documents is None or opened.run is None or not (number or "").isdecimal():
        return None
    row = int(number or 0)
    for shard in opened.documents.shards:
        if row < shard.rows_kept:
            url = storage.join(opened.run, "documents", f"{shard.shard}.parquet")
            if not storage.exists(url):
                return f"file {row} of {shard.shard} (its cleaned documents were removed)"
            found = _row_at(url, row, ["doc_id", "path"])
            return f"{found['doc_id']} {found['path']}"
        row -= shard.rows_kept
    return None


def _row_at(url: str, row: int, columns: Sequence[str]) -> dict[str, Any]:
    """One row, reading only its row group."""
    with storage.open_parquet(url) as table:
        for group in range(table.num_row_groups):
            rows = table.metadata.row_group(group).num_rows
            if row < rows:
                values: dict[str, Any] = table.read_row_group(group, list(columns)).slice(row, 1).to_pylist()[0]
                return values
            row -= rows
    raise AssertionError(f"{url} has no row {row}")


def document_of(opened: Opened, doc_id: str) -> dict[str, Any] | DroppedFile:
    """The dataset's row of `doc_id`, or why the cleaned document with that id is not in the dataset.

    Raises:
        InputError: when no document has this id.
    """
    named = _DOC_ID.fullmatch(doc_id)
    shards = {shard.shard for shard in opened.manifest.shards}
    if named is None or named[1] not in shards:
        example = f"{min(shards)}-0000000" if shards else "shard-00000-0000000"
        raise InputError(
            opened.folder, f"none of its shards holds {doc_id}", f"Ids look like {example}; see `cert-ray inspect`."
        )
    url = storage.join(opened.folder, f"{named[1]}.parquet")
    row = _find(url, doc_id)
    if row is not None:
        return _row_at(url, row, [*_FACTS, *(name for name in COLUMNS if name not in _FACTS)])
    dropped = _dropped_document(opened, named[1], doc_id)
    if dropped is None:
        raise InputError(
            opened.folder,
            f"{named[1]} holds no document {doc_id}",
            "Files dropped by cleaning have no id: see `--dropped REASON`.",
        )
    return dropped


def _find(url: str, doc_id: str) -> int | None:
    ids = storage.read_parquet(url, ["doc_id"]).column("doc_id")
    row = pc.index(ids, pa.scalar(doc_id)).as_py()
    return None if row < 0 else int(row)


def _dropped_document(opened: Opened, shard: str, doc_id: str) -> DroppedFile | None:
    """Why a cleaned document was dropped: a duplicate by its cluster, else what the drops say about its path."""
    if opened.run is None:
        return None
    documents = storage.join(opened.run, "documents", f"{shard}.parquet")
    clusters = storage.join(opened.run, "dedup", "clusters", f"{shard}.parquet")
    if not storage.exists(documents) or not storage.exists(clusters):
        return None
    row = _find(documents, doc_id)
    if row is None:
        return None
    document = _row_at(documents, row, ["path", "source"])
    verdict = _row_at(clusters, row, ["keep", "reason", "survivor"])
    if not verdict["keep"]:
        detail = str(verdict["survivor"])
        return DroppedFile(document["path"], document["source"], verdict["reason"], detail, _survivor(opened, detail))
    drops = storage.read_parquet(storage.join(opened.folder, "drops", f"{shard}.parquet"))
    same = pc.and_(pc.equal(drops["path"], document["path"]), pc.equal(drops["source"], document["source"]))
    for drop in drops.filter(same).slice(0, 1).to_pylist():
        return DroppedFile(drop["path"], drop["source"], drop["reason"], drop["detail"] or "")
    return None


def show_rows(console: Console, opened: Opened, rows: Sequence[dict[str, Any]]) -> None:
    """A line for each row."""
    shown = [
        [
            row["doc_id"],
            row["path"],
            row["repository"] or "",
            f"{row['size_bytes']:,}" if console.is_terminal else str(row["size_bytes"]),
            "" if row["stars"] is None else str(row["stars"]),
            str(row["cluster_size"]),
            f"{row['weight']:.3g}",
            " ".join(row["libraries"]),
        ]
        for row in rows
    ]
    headers = ["doc id", "path", "repository", "bytes", "stars", "stands for", "weight", "libraries"]
    manifest = opened.manifest
    title = f"{len(rows):,} of {manifest.rows_kept:,} files kept, of {manifest.rows_read:,} read"
    _show_table(console, title, headers, shown, right={3, 4, 5, 6})


def show_drops(console: Console, opened: Opened, drops: Sequence[DroppedFile]) -> None:
    """A line for each dropped file."""
    reason = drops[0].reason
    detail = "kept instead" if reason in _DUPLICATES else "detail"
    shown = [[drop.path, drop.source, drop.survivor or drop.detail] for drop in drops]
    title = f"{len(drops):,} of {opened.manifest.dropped[reason]:,} files dropped as {reason}"
    _show_table(console, title, ["path", "source", detail], shown)


def _show_table(
    console: Console, title: str, headers: list[str], rows: list[list[str]], right: set[int] | None = None
) -> None:
    if not console.is_terminal:
        for row in [headers, *rows]:
            _plain(console, "\t".join(cell.replace("\t", " ").replace("\n", " ") for cell in row))
        return
    table = Table(title=Text(title), title_justify="left", header_style="bold")
    for number, header in enumerate(headers):
        table.add_column(header, justify="right" if number in (right or ()) else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)


def show_document(console: Console, opened: Opened, document: dict[str, Any] | DroppedFile) -> None:
    """A document's facts and its text beside its sketch, or why it was dropped."""
    if isinstance(document, DroppedFile):
        _show_facts(console, {"path": document.path, "source": document.source, "dropped as": document.reason})
        if document.survivor or document.detail:
            name = "kept instead" if document.reason in _DUPLICATES else "detail"
            _show_facts(console, {name: document.survivor or document.detail})
        return
    _show_facts(console, {name: document[name] for name in _FACTS})
    kind = SketchKind(opened.manifest.config.get("sketch_kind", SketchKind.CONSTANTS))
    if not console.is_terminal:
        for side in ("content", "sketch"):
            _plain(console, f"\n--- {side}")
            _plain(console, document[side].rstrip("\n"))
        return
    console.print(_side_by_side(blocks_of(document, kind)))


def _show_facts(console: Console, facts: dict[str, Any]) -> None:
    width = max(map(len, facts))
    for name, value in facts.items():
        shown = " ".join(value) if isinstance(value, list) else "" if value is None else str(value)
        if console.is_terminal:
            console.print(Text.assemble((f"{name:{width}}  ", "bold"), shown))
        else:
            _plain(console, f"{name}\t{shown}")


def _plain(console: Console, line: str) -> None:
    console.file.write(line + "\n")  # `rich` would expand tabs and break lines


def _side_by_side(blocks: Sequence[Block]) -> Table:
    table = Table(expand=True, header_style="bold", show_lines=True)
    for name in ("code", "sketch"):
        table.add_column(name, ratio=1, overflow="fold")
    for block in blocks:
        table.add_row(_marked(block.code), _marked(block.sketch))
    return table


def _marked(pieces: Sequence[Piece]) -> Text:
    return Text.assemble(*((piece.text, _style(piece.kind)) for piece in pieces))


def _style(kind: str | None) -> str:
    if kind is None:
        return ""
    return _STYLES["string" if "string" in kind else "number" if kind in _NUMBERS else "name"]
