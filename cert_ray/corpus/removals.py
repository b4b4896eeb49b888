"""Takedowns: which files a run must not hold, and what remains of them in the documents.

In: `RUN/removals.jsonl`, one `Removal` per line, written by `cert-ray remove` and read by preprocessing. Out: documents
whose removed rows keep their number, name and hashes, and lose everything that was read from the file. The row stays
because documents are numbered by row: no other file's number, cluster or shard changes. So a copy of a removed file,
exact or near, that was dropped as its duplicate stays dropped: a takedown lets no copy in. If dedup must run again,
after damage or for later inputs, it reads the text from the input (`dedup.contents`) and stores none of it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Self

import pyarrow as pa
import pyarrow.compute as pc
import pydantic

from cert_ray import storage
from cert_ray.config import Config
from cert_ray.errors import InputError

RECORD_NAME = "removals.jsonl"
SELECTORS = ("repository", "source", "path_prefix")
COLUMNS = ["repository", "source", "path"]  # that selecting rows of a table needs
_READ_FROM_FILE = ("content", "libraries", "statements")


class RewrittenFile(Config):
    """A shard that held rows to remove. Checksums are xxh3-128; `after` is None until it is rewritten."""

    file: str  # below the run
    rows: int
    before: str
    after: str | None = None


class Removal(Config):
    """A request, and what was done about it. It removes the files that match every field given."""

    repository: str | None = None  # in any case: forges ignore the case of names
    source: str | None = None  # the input, as given in the recipe
    path_prefix: str | None = None  # of the path inside the input
    asked: str = pydantic.Field(pattern=r"^\d{4}-\d\d-\d\d$")
    reason: str = ""
    files: tuple[RewrittenFile, ...] = ()
    finished: bool = False

    @pydantic.model_validator(mode="after")
    def _selects_something(self) -> Self:
        if not any(self.selector):
            raise ValueError(f"give one of {', '.join(SELECTORS)}, and not an empty one")
        return self

    @property
    def selector(self) -> tuple[str | None, ...]:
        """What distinguishes this request from others."""
        repository = self.repository.lower() if self.repository else None
        return repository, self.source or None, self.path_prefix or None

    def __str__(self) -> str:
        given = ((name, getattr(self, name)) for name in SELECTORS)
        return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in given if value)


def read_removals(run: str) -> tuple[Removal, ...]:
    """The requests recorded in `run`, oldest first.

    Raises:
        InputError: when a line is not a request.
    """
    url = storage.join(run, RECORD_NAME)
    if not storage.exists(url):
        return ()
    try:
        return tuple(Removal.model_validate_json(line) for line in storage.read_text(url).splitlines() if line.strip())
    except pydantic.ValidationError as error:
        problem = f"not a list of removals: {error.errors(include_url=False)[0]['msg']}"
        raise InputError(
            url, problem, "Correct the line by hand: it keeps out files that someone asked to remove."
        ) from error


def write_removals(run: str, removals: Iterable[Removal]) -> None:
    """Replace the whole record, or leave the old one as it is."""
    lines = (removal.model_dump_json() + "\n" for removal in removals)
    storage.write_text(storage.join(run, RECORD_NAME), "".join(lines))


def selected(table: pa.Table, removals: Sequence[Removal]) -> pa.ChunkedArray:
    """bool[rows]: which rows of `table` any of `removals` selects."""
    nothing = pa.chunked_array([pa.repeat(pa.scalar(False), len(table))])
    return functools.reduce(pc.or_, (_selected_by(table, removal) for removal in removals), nothing)


def _selected_by(table: pa.Table, removal: Removal) -> pa.ChunkedArray:
    repository, source, prefix = removal.selector
    masks = []
    if repository:
        masks.append(pc.equal(pc.utf8_lower(table.column("repository")), repository))
    if source:
        masks.append(pc.equal(table.column("source"), source))
    if prefix:
        masks.append(pc.starts_with(table.column("path"), prefix))
    return pc.fill_null(functools.reduce(pc.and_, masks), False)


def blank(documents: pa.Table, removals: Sequence[Removal]) -> pa.Table:
    """`documents` (DOCUMENTS) with null for everything read from the files that `removals` select."""
    mask = selected(documents, removals)
    if not pc.any(mask).as_py():
        return documents
    for name in _READ_FROM_FILE:
        column = documents.column(name)
        blanked = pc.if_else(mask, pa.scalar(None, column.type), column)
        documents = documents.set_column(documents.schema.get_field_index(name), documents.field(name), blanked)
    return documents.combine_chunks()  # the same bytes, however the table came to be


def holds_blanked(url: str) -> bool:
    """Whether the shard of documents at `url` has blanked rows. Reads only the smallest column that blanking clears."""
    return bool(storage.read_parquet(url, ["libraries"]).column("libraries").null_count)


def content_bytes(documents: pa.Table) -> int:
    """Total bytes of the texts that `documents` still hold."""
    present = pc.is_valid(documents.column("content"))
    return int(pc.sum(documents.column("size_bytes").filter(present), min_count=0).as_py())
