"""Rows of tables as records: JSONL (plain, gzip, zstd) and Parquet, as The Stack, datatrove and dolma write them.

In: the URL of a table and `Columns`. Out: one record per row, in row order; all rows are read, whatever their path.
A row without text is a `BAD_RECORD` drop; a damaged file is one `DAMAGED_ARCHIVE` drop after the rows before the
damage. Held in memory: a line up to six times `max_file_bytes` (JSON may escape every character), or a batch of
Parquet rows.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import IO, Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from cert_ray import storage
from cert_ray.corpus.archives import DAMAGE, decompressed, open_bytes
from cert_ray.corpus.inputs import Columns, RawDocument, Record, SourceConfig
from cert_ray.errors import MissingColumnsError
from cert_ray.retries import tried_again
from cert_ray.schemas import Dropped, DropReason

_BATCH_ROWS = 256  # a few megabytes of source at a time; assumed


@tried_again
def check_jsonl(url: str, source: str, config: SourceConfig) -> None:
    """Check that the first line of a JSONL file has the columns to read.

    Raises:
        MissingColumnsError: when it is a record without them. A line that is not a record becomes a drop later.
    """
    try:
        with open_bytes(url) as stream:
            line = io.BufferedReader(cast(io.RawIOBase, decompressed(stream, url))).readline(_line_bytes(config))
            first = json.loads(line)
    except (*DAMAGE, RecursionError):
        return
    if isinstance(first, dict):
        _check_columns(list(_keys(first)), source, config.columns)


def _keys(row: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The keys of `row`; a key inside a nested mapping is prefixed by the mapping's key and a dot."""
    for key, value in row.items():
        if isinstance(value, dict):
            yield from _keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _leaves(fields: Iterable[pa.Field], prefix: str = "") -> Iterator[str]:
    """As `_keys`, for the fields of a table's schema."""
    for field in fields:
        if pa.types.is_struct(field.type):
            yield from _leaves(field.type, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}"


def _check_columns(found: list[str], source: str, columns: Columns) -> None:
    missing = {field: names for field, names in columns.required().items() if not set(names) & set(found)}
    if missing:
        raise MissingColumnsError(
            source,
            f"no column {', nor '.join(' or '.join(names) for names in missing.values())}; "
            f"its columns are {', '.join(map(str, found)) or 'none'}",
            "Name the right ones in "
            + ", ".join(f"preprocess.sources.columns.{field}" for field in missing)
            + (" (null where it has none)." if "content" not in missing else "."),
        )


def _line_bytes(config: SourceConfig) -> int:
    return 6 * config.max_file_bytes + (1 << 16)


def read_jsonl(url: str, source: str, config: SourceConfig) -> Iterator[Record]:
    """One record per line that is not blank."""
    try:
        with open_bytes(url) as stream:
            for number, line in _lines(io.BufferedReader(cast(io.RawIOBase, decompressed(stream, url))), config):
                yield _record_of_line(line, f"line {number}", source, config)
    except DAMAGE as error:
        yield storage.name_of(source), source, Dropped(DropReason.DAMAGED_ARCHIVE, str(error))


def _lines(stream: IO[bytes], config: SourceConfig) -> Iterator[tuple[int, bytes | None]]:
    """The lines that are not blank, with their numbers; None for a line longer than any record that could be kept."""
    most = _line_bytes(config)
    number = 0
    while line := stream.readline(most):
        number += 1
        if len(line) < most or line.endswith(b"\n"):
            if not line.isspace():
                yield number, line
            continue
        while line and not line.endswith(b"\n"):
            line = stream.readline(most)
        yield number, None


def _record_of_line(line: bytes | None, name: str, source: str, config: SourceConfig) -> Record:
    if line is None:
        return name, source, Dropped(DropReason.TOO_LARGE)
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return name, source, Dropped(DropReason.BAD_RECORD, str(error))
    if not isinstance(row, dict):
        return name, source, Dropped(DropReason.BAD_RECORD, f"a {type(row).__name__}, not an object")
    return _record(row, name, source, config)


def _record(row: Mapping[str, Any], name: str, source: str, config: SourceConfig) -> Record:
    """A row as a document; `name` is used if it has no path."""
    values = {field: _value(row, names) for field, names in config.columns.named().items()}
    path = _text(values.get("path")) or name
    content = values["content"]
    if not isinstance(content, str | bytes):
        column = " or ".join(config.columns.named()["content"])
        return path, source, Dropped(DropReason.BAD_RECORD, f"{column} is {type(content).__name__}, not text")
    if len(content) > config.max_file_bytes:
        return path, source, Dropped(DropReason.TOO_LARGE)
    return RawDocument(
        path,
        source,
        content,
        repository=_text(values.get("repository")),
        stars=_count(values.get("stars")),
        licence=_text(values.get("licence")),
    )


def _value(row: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    """The value of the first of `names` for which `row` has one; a dot leads into a nested mapping."""
    for name in names:
        value: Any = row.get(name)
        if value is None and "." in name:
            value = row
            for part in name.split("."):
                value = value.get(part) if isinstance(value, Mapping) else None
        if value is not None:
            return value
    return None


def _text(value: object) -> str | None:
    """`value` as text, or None if it is empty; the items of a list are joined by commas."""
    if isinstance(value, list):
        value = ", ".join(str(part) for part in value if part)
    return value.encode("utf-8", "replace").decode() or None if isinstance(value, str) else None


def _count(value: object) -> int | None:
    """`value` as a number of stars. Tables with missing values often store counts as floats."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return int(value) if 0 <= value < 1 << 62 else None


def row_groups(
    url: str, source: str, config: SourceConfig, unit_bytes: int
) -> Iterator[tuple[list[int] | None, int, int]]:
    """The row groups of a Parquet file in runs of about `unit_bytes`: their numbers, rows and uncompressed bytes.

    A file whose footer cannot be read is one run with None for the numbers; reading it later yields the drop.

    Raises:
        MissingColumnsError: when the file lacks the columns to read.
    """
    metadata = _footer(url)
    if metadata is None:
        yield None, 0, 0
        return
    _check_columns(list(_leaves(metadata.schema.to_arrow_schema())), source, config.columns)
    run: list[int] = []
    rows = size_bytes = 0
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        if run and size_bytes + group.total_byte_size > unit_bytes:
            yield run, rows, size_bytes
            run, rows, size_bytes = [], 0, 0
        run.append(index)
        rows += group.num_rows
        size_bytes += group.total_byte_size
    if run:
        yield run, rows, size_bytes


@tried_again
def _footer(url: str) -> pq.FileMetaData | None:
    """The footer of a Parquet file, or None if it is damaged, which retrying would not change."""
    try:
        with open_bytes(url) as stream:
            return pq.read_metadata(stream)
    except DAMAGE:
        return None


def read_parquet(url: str, source: str, groups: list[int] | None, config: SourceConfig) -> Iterator[Record]:
    """One record per row of the row groups `groups`."""
    try:
        with open_bytes(url) as stream:
            table = pq.ParquetFile(stream)
            present = set(_leaves(table.schema_arrow))
            wanted = (name for names in config.columns.named().values() for name in names if name in present)
            columns = list(dict.fromkeys(wanted))
            row = sum(table.metadata.row_group(index).num_rows for index in range(groups[0] if groups else 0))
            for batch in table.iter_batches(_BATCH_ROWS, row_groups=groups or [], columns=columns):
                for record in _rows(batch):
                    yield _record(record, f"row {row}", source, config)
                    row += 1
    except DAMAGE as error:
        detail = str(error).partition("\n")[0]
        yield storage.name_of(source), source, Dropped(DropReason.DAMAGED_ARCHIVE, detail)


def _rows(batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
    """The rows of `batch`. Text that is not UTF-8 stays bytes, for cleaning to judge."""
    texts = [pa.types.is_string(field.type) or pa.types.is_large_string(field.type) for field in batch.schema]
    values = []
    for column, is_text in zip(batch.columns, texts, strict=True):
        try:
            values.append(column.to_pylist())
        except UnicodeDecodeError:
            if not is_text:  # a list of licences, which must not be bytes
                raise
            binary = pa.large_binary() if pa.types.is_large_string(column.type) else pa.binary()
            values.append(column.cast(binary).to_pylist())
    for row in zip(*values, strict=True):
        yield dict(zip(batch.schema.names, row, strict=True))
