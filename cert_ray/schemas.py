"""The Arrow schemas, in pipeline order, and the names of drops: reading this is reading the pipeline.

    inputs --clean--> DOCUMENTS (+ DROPS) --dedup--> BANDS, SIGNATURES, SURVIVORS --annotate--> ANNOTATED
    ANNOTATED --pack--> PIECES (+ token shards)

`SCHEMA_VERSION` goes into every manifest; a folder of another version is refused with a message that names both.
All offsets into text are in UTF-8 bytes, half open, so that any tool in any language can slice with them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import pyarrow as pa

SCHEMA_VERSION = 1


class DropReason(StrEnum):
    """Why a document left the pipeline. The values are the names in manifests, cards and metrics."""

    # Sources: the input could not be read as text.
    UNREADABLE = "unreadable"
    TOO_LARGE = "too_large"
    BINARY = "binary"
    UNDECODABLE = "undecodable"
    UNSAFE_MEMBER_PATH = "unsafe_member_path"
    DAMAGED_ARCHIVE = "damaged_archive"
    BAD_RECORD = "bad_record"
    # Licences: the file may not be used.
    LICENCE_NOT_ALLOWED = "licence_not_allowed"
    LICENCE_UNKNOWN = "licence_unknown"
    # Cleaning: the text is not worth training on.
    EMPTY = "empty"
    PATH_EXCLUDED = "path_excluded"
    GENERATED = "generated"
    LINES_TOO_LONG = "lines_too_long"
    TOO_FEW_LINES = "too_few_lines"
    TOO_LITTLE_CODE = "too_little_code"
    MOSTLY_DATA = "mostly_data"
    MOSTLY_NOT_ASCII = "mostly_not_ascii"
    # Parsing: the running interpreter refuses it.
    NOT_PYTHON_3 = "not_python_3"
    TOO_DEEPLY_NESTED = "too_deeply_nested"
    # Decontamination: it holds a problem of a benchmark.
    CONTAMINATED = "contaminated"
    # Dedup.
    EXACT_DUPLICATE = "exact_duplicate"
    NEAR_DUPLICATE = "near_duplicate"
    # Sketching.
    UNSKETCHABLE = "unsketchable"
    # After the fact: a takedown (`cert-ray remove`).
    REMOVED_ON_REQUEST = "removed_on_request"
    # Packing: the view is of files that use certain libraries.
    OTHER_LIBRARY = "other_library"


@dataclass(frozen=True, slots=True)
class Dropped:
    """The outcome of expected bad data: dropped for a named reason, and counted. `detail` is for people."""

    reason: DropReason
    detail: str = ""


class StatementKind(StrEnum):
    """How a top-level statement appears in the generator's text (in the paper, imports and `__name__` stand alone)."""

    IMPORT = "import"
    MAIN = "main"  # mentions __name__
    CODE = "code"


# A run of top-level statements: [start, end) in the UTF-8 bytes of `content`.
STATEMENT = pa.struct([("start", pa.int32()), ("end", pa.int32()), ("kind", pa.string())])

DOCUMENTS = pa.schema(
    [
        ("doc_id", pa.string()),  # "<shard>-<row>"; follows the input list, so independent of workers
        ("path", pa.string()),
        ("source", pa.string()),  # the input it was read from: a folder, an archive, a table
        ("repository", pa.string()),  # null when the input does not say
        ("stars", pa.int64()),  # null when the input does not say
        ("licence", pa.string()),  # of the repository, else of the SPDX header; null when neither says
        ("content", pa.string()),  # null after a removal on request
        ("size_bytes", pa.int32()),
        ("content_hash", pa.binary(16)),  # xxh3-128 of the normalised content
        ("libraries", pa.list_(pa.string())),  # top-level packages imported, sorted
        ("ut_score", pa.float64()),
        ("func_score", pa.float64()),
        ("statements", pa.list_(STATEMENT)),
    ]
)

DROPS = pa.schema([("path", pa.string()), ("source", pa.string()), ("reason", pa.string()), ("detail", pa.string())])

# Why files were dropped as contaminated: one row per file, matching problem, and way of matching.
CONTAMINATION = pa.schema(
    [
        ("path", pa.string()),
        ("source", pa.string()),
        ("problems", pa.string()),  # the problem file
        ("task_id", pa.string()),
        ("part", pa.string()),  # prompt or solution
        ("how", pa.string()),  # words or tree
        ("line", pa.int32()),  # of the first match in the cleaned file, from 1
        ("matches", pa.int32()),  # n-grams, or runs of statements
        ("text", pa.string()),  # the first match, as the document has it
    ]
)

# One row per surviving file. A placeholder is [start, end) in the UTF-8 bytes of `sketch`, and its kind.
PLACEHOLDER = pa.struct([("start", pa.int32()), ("end", pa.int32()), ("kind", pa.string())])
# Aligned blocks of code and sketch. `with_sketch` is false for imports and `__name__` blocks, which stand alone.
SEGMENT = pa.struct(
    [
        ("code_start", pa.int32()),
        ("code_end", pa.int32()),
        ("sketch_start", pa.int32()),
        ("sketch_end", pa.int32()),
        ("with_sketch", pa.bool_()),
    ]
)

ANNOTATED = pa.schema(
    [
        ("doc_id", pa.string()),
        ("path", pa.string()),
        ("source", pa.string()),
        ("repository", pa.string()),
        ("stars", pa.int64()),
        ("licence", pa.string()),
        ("content", pa.string()),
        ("size_bytes", pa.int32()),
        ("content_hash", pa.string()),  # hex
        ("libraries", pa.list_(pa.string())),
        ("ut_score", pa.float64()),
        ("func_score", pa.float64()),
        ("weight", pa.float64()),  # sampling weight, as in the paper
        ("cluster_size", pa.int32()),  # documents that this one stands for, itself included
        ("sketch", pa.string()),
        ("placeholders", pa.list_(PLACEHOLDER)),
        ("segments", pa.list_(SEGMENT)),
    ]
)

# One row per piece of a packed document, beside the shard's tokens. A document's pieces are adjacent.
PIECES = pa.schema(
    [
        ("document", pa.int32()),  # its row among the kept documents of the shard
        ("start", pa.int64()),  # of its first token in the shard's token file
        ("tokens", pa.int32()),
        ("weight", pa.float64()),  # of the document
        ("held_out", pa.bool_()),  # of the document
        ("atomic", pa.bool_()),  # a sketch and its code: never cut at the end of a row
    ]
)
