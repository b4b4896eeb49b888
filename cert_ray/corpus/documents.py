"""From a work unit to documents: read, judge licences, clean, redact secrets, parse once, decontaminate, score, hash.

In: a `WorkUnit` of `sources.plan_units`. Out: `UnitDocuments`, whose tables are in input order, and whose rows add up
to the number of records read. Secrets are redacted before parsing, so every fact describes the text that is kept. If
redaction broke a file, it would be dropped as `not_python_3`, never kept unredacted. Memory is bounded by the unit's
kept content and a batch of raw files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import xxhash

from cert_ray.config import Config
from cert_ray.corpus.cleaning import CleaningConfig, CleanText, clean
from cert_ray.corpus.decontamination import DecontaminationConfig, Match, ProblemIndex
from cert_ray.corpus.inputs import RawDocument, Record
from cert_ray.corpus.licences import AllowedLicences, judge_licence, spdx_header
from cert_ray.corpus.secrets import Redacted, SecretsConfig, redact
from cert_ray.corpus.sources import SourceConfig, read_unit
from cert_ray.errors import ConservationError
from cert_ray.python_source import SourceFacts, byte_offsets, collector_paused, facts_of, parse
from cert_ray.quality.features import func_score, ut_score
from cert_ray.schemas import CONTAMINATION, DOCUMENTS, DROPS, Dropped, DropReason
from cert_ray.shards.units import WorkUnit

_BATCH_CHARS = 4 << 20  # searched for secrets and problems at a time: a few hundred files; assumed


class DocumentsConfig(Config):
    """What is read, and what of it is kept."""

    sources: SourceConfig
    appended: tuple[tuple[str, ...], ...] = ()  # the inputs of each later generation
    cleaning: CleaningConfig = CleaningConfig()
    secrets: SecretsConfig | None = SecretsConfig()
    licences: AllowedLicences = None
    decontaminate: DecontaminationConfig = DecontaminationConfig()


@dataclass(frozen=True, slots=True)
class UnitDocuments:
    """What a unit yields: DOCUMENTS, DROPS, CONTAMINATION, and how many secrets were redacted, by kind."""

    documents: pa.Table
    drops: pa.Table
    contamination: pa.Table
    redacted: Counter[str]
    rows_read: int


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


def documents_of_unit(unit: WorkUnit, config: DocumentsConfig, problems: ProblemIndex | None = None) -> UnitDocuments:
    """Documents and drops of `unit`; `problems` are those of `config.decontaminate`.

    A `doc_id` is the unit's name and the record's number in the unit, so drops do not change it.

    Raises:
        InputError: when the disk or store fails while reading.
    """
    documents, drops, contamination = _Columns(DOCUMENTS), _Columns(DROPS), _Columns(CONTAMINATION)
    redacted: Counter[str] = Counter()
    rows_read = 0
    for batch in _batches(read_unit(unit, config.sources), config):
        for path, source, outcome in _outcomes(batch, config, problems):
            if isinstance(outcome, Dropped):
                drops.append(path, source, outcome.reason.value, outcome.detail)
            elif isinstance(outcome, _Document):
                redacted += outcome.redacted
                documents.append(f"{unit.name}-{rows_read:07d}", path, source, *outcome.columns)
            else:
                drops.append(path, source, DropReason.CONTAMINATED.value, _shown(outcome))
                for match in outcome:
                    contamination.append(path, source, *match.row())
            rows_read += 1
    result = UnitDocuments(documents.table(), drops.table(), contamination.table(), redacted, rows_read)
    if rows_read != len(result.documents) + len(result.drops):
        raise ConservationError(unit.name, rows_read, len(result.documents), len(result.drops))
    return result


@dataclass(frozen=True, slots=True)
class _Document:
    """The columns of a document after its source, in the order of `schemas.DOCUMENTS`."""

    columns: tuple[object, ...]
    redacted: Counter[str]


@dataclass(frozen=True, slots=True)
class _Cleaned:
    """A file that no rule has dropped yet."""

    record: RawDocument
    licence: str | None
    text: str


_Rejected = tuple[str, str, Dropped]
_Outcome = _Document | Dropped | list[Match]


def _batches(records: Iterator[Record], config: DocumentsConfig) -> Iterator[list[_Cleaned | _Rejected]]:
    """`records` cleaned, in runs of about `_BATCH_CHARS`."""
    batch: list[_Cleaned | _Rejected] = []
    characters = 0
    for record in records:
        item = _cleaned(record, config) if isinstance(record, RawDocument) else record
        batch.append(item)
        characters += len(item.text) if isinstance(item, _Cleaned) else 0
        if characters >= _BATCH_CHARS:
            yield batch
            batch, characters = [], 0
    yield batch


def _cleaned(record: RawDocument, config: DocumentsConfig) -> _Cleaned | _Rejected:
    header = spdx_header(record)  # before cleaning, which removes licence headers
    outcome = judge_licence(record, header, config.licences) if config.licences is not None else None
    cleaned = outcome or clean(record, config.cleaning)
    if isinstance(cleaned, CleanText):
        return _Cleaned(record, record.licence or header, cleaned.text)
    return record.path, record.source, cleaned


def _outcomes(
    batch: list[_Cleaned | _Rejected], config: DocumentsConfig, problems: ProblemIndex | None
) -> Iterator[tuple[str, str, _Outcome]]:
    """Path, source and outcome of each item of `batch`, in order."""
    texts = [item.text for item in batch if isinstance(item, _Cleaned)]
    redacted = redact(texts, config.secrets or SecretsConfig(kinds=()))
    matches = problems.word_matches([result.text for result in redacted]) if problems else [[] for _ in texts]
    found = zip(redacted, matches, strict=True)
    for item in batch:
        if isinstance(item, _Cleaned):
            with collector_paused():  # the tree is freed when the block ends
                outcome = _document(item, *next(found), problems)
            yield item.record.path, item.record.source, outcome
        else:
            yield item


def _document(item: _Cleaned, redacted: Redacted, matches: list[Match], problems: ProblemIndex | None) -> _Outcome:
    """The document, why there is none, or the problems that it holds."""
    text, record = redacted.text, item.record
    tree = parse(text)
    if isinstance(tree, Dropped):
        return tree
    if problems:
        matches = [*matches, *problems.tree_matches(text, tree)]
    if matches:
        return matches
    facts = facts_of(text, tree)
    encoded = text.encode()
    columns = (
        record.repository,
        record.stars,
        item.licence,
        text,
        len(encoded),
        xxhash.xxh3_128_digest(encoded),
        facts.imports,
        ut_score(record.path, facts.functions),
        func_score(facts.functions),
        _statements(text, facts),
    )
    return _Document(columns, redacted.counts)


def _shown(matches: list[Match]) -> str:
    """The problems of `matches`, for people."""
    return ", ".join(dict.fromkeys(f"{match.owner.task_id} ({match.owner.part}, {match.how})" for match in matches))


def _statements(text: str, facts: SourceFacts) -> list[dict[str, object]]:
    """The blocks of `text` with offsets in UTF-8 bytes."""
    ends = byte_offsets(text, [offset for block in facts.statements for offset in (block.start, block.end)])
    return [
        {"start": start, "end": end, "kind": block.kind.value}
        for start, end, block in zip(ends[::2], ends[1::2], facts.statements, strict=True)
    ]
