"""One work unit to documents: read, clean, parse once, score, hash.

In: a `WorkUnit` of `sources.plan_units`. Out: `schemas.DOCUMENTS` and `schemas.DROPS`, both in input order, and the
number of records read, which is always the sum of their rows. Memory is bounded by the unit's kept content.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import xxhash

from cert_ray.corpus.cleaning import CleaningConfig, clean
from cert_ray.corpus.inputs import RawDocument
from cert_ray.corpus.sources import SourceConfig, read_unit
from cert_ray.errors import ConservationError
from cert_ray.python_source import SourceFacts, byte_offsets, read_source
from cert_ray.quality.features import func_score, ut_score
from cert_ray.schemas import DOCUMENTS, DROPS, Dropped
from cert_ray.shards.units import WorkUnit


@dataclass
class _Columns:
    """The columns of one table, filled row by row."""

    schema: pa.Schema
    values: dict[str, list[Any]] = field(init=False)

    def __post_init__(self) -> None:
        self.values = {name: [] for name in self.schema.names}

    def append(self, *row: object) -> None:
        for column, value in zip(self.values.values(), row, strict=True):
            column.append(value)

    def table(self) -> pa.Table:
        return pa.table(self.values, schema=self.schema)


def documents_of_unit(
    unit: WorkUnit, sources: SourceConfig, cleaning: CleaningConfig
) -> tuple[pa.Table, pa.Table, int]:
    """Documents, drops and records read of `unit`.

    A `doc_id` is the unit's name and the record's number in the unit, so it does not depend on what else was dropped.

    Raises:
        InputError: when the disk or store fails while reading.
    """
    documents, drops = _Columns(DOCUMENTS), _Columns(DROPS)
    rows_read = 0
    for row, record in enumerate(read_unit(unit, sources)):
        rows_read += 1
        if not isinstance(record, RawDocument):
            path, source, dropped = record
            drops.append(path, source, dropped.reason.value, dropped.detail)
            continue
        outcome = _document(record, f"{unit.name}-{row:07d}", cleaning)
        if isinstance(outcome, Dropped):
            drops.append(record.path, record.source, outcome.reason.value, outcome.detail)
        else:
            documents.append(*outcome)
    kept, dropped_rows = documents.table(), drops.table()
    if rows_read != len(kept) + len(dropped_rows):
        raise ConservationError(unit.name, rows_read, len(kept), len(dropped_rows))
    return kept, dropped_rows, rows_read


def _document(record: RawDocument, doc_id: str, cleaning: CleaningConfig) -> tuple[object, ...] | Dropped:
    """The row of `record` in the order of `schemas.DOCUMENTS`, or why there is none."""
    cleaned = clean(record, cleaning)
    if isinstance(cleaned, Dropped):
        return cleaned
    text = cleaned.text
    facts = read_source(text)
    if isinstance(facts, Dropped):
        return facts
    encoded = text.encode()
    return (
        doc_id,
        record.path,
        record.source,
        record.repository,
        record.stars,
        record.licence,
        text,
        len(encoded),
        xxhash.xxh3_128_digest(encoded),
        facts.imports,
        ut_score(record.path, facts.functions),
        func_score(facts.functions),
        _statements(text, facts),
    )


def _statements(text: str, facts: SourceFacts) -> list[dict[str, object]]:
    """The blocks of `text` with offsets in UTF-8 bytes."""
    ends = byte_offsets(text, [offset for block in facts.statements for offset in (block.start, block.end)])
    return [
        {"start": start, "end": end, "kind": block.kind.value}
        for start, end, block in zip(ends[::2], ends[1::2], facts.statements, strict=True)
    ]
