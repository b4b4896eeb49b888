"""Small annotated datasets for tests, written through the foundation as preprocessing writes them."""

from __future__ import annotations

import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import xxhash

from cert_ray import manifests, schemas
from cert_ray.config import Config
from cert_ray.manifests import ShardReport
from cert_ray.python_source import read_source
from cert_ray.schemas import Dropped
from cert_ray.shards.units import write_table
from cert_ray.sketching import SketchKind, sketch_source
from cert_ray.sketching.segments import align_segments

Row = dict[str, Any]
SOURCES = ("import numpy as np\n\n\ndef area(x):\n    return x * {n}.5\n", "import os\n\n\nprint(os.name, {n})\n")


def real_code(files: int = 40) -> list[str]:
    """Files of the standard library, the same ones each time."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:files]
    return [path.read_text(encoding="utf-8") for path in paths]


def utf8(text: str, code_point: int) -> int:
    """A code point offset as an offset into the UTF-8 bytes."""
    return len(text[:code_point].encode())


def document(
    content: str,
    sketch: str | None = None,
    placeholders: Sequence[tuple[str, str]] = (),
    segments: Sequence[tuple[str, str, bool]] = (),
    libraries: Sequence[str] = (),
    weight: float = 1.0,
) -> Row:
    """A row of ANNOTATED. Placeholders are (text found in the sketch, kind), each searched for after the one before;
    segments are (code, sketch, with_sketch), found likewise."""
    row: Row = dict.fromkeys(schemas.ANNOTATED.names)
    spans, at = [], 0
    for word, kind in placeholders:
        assert sketch is not None
        at = sketch.index(word, at)
        spans.append({"start": utf8(sketch, at), "end": utf8(sketch, at + len(word)), "kind": kind})
        at += len(word)
    blocks, code_at, sketch_at = [], 0, 0
    for code, anonymous, with_sketch in segments:
        assert sketch is not None
        code_at, sketch_at = content.index(code, code_at), sketch.index(anonymous, sketch_at)
        blocks.append(
            {
                "code_start": utf8(content, code_at),
                "code_end": utf8(content, code_at + len(code)),
                "sketch_start": utf8(sketch, sketch_at),
                "sketch_end": utf8(sketch, sketch_at + len(anonymous)),
                "with_sketch": with_sketch,
            }
        )
        code_at, sketch_at = code_at + len(code), sketch_at + len(anonymous)
    return row | {
        "content": content,
        "size_bytes": len(content.encode()),
        "content_hash": xxhash.xxh3_128_hexdigest(content.encode()),
        "libraries": list(libraries),
        "weight": weight,
        "sketch": sketch,
        "placeholders": spans,
        "segments": blocks,
    }


def sketched_document(content: str) -> Row:
    """A row of ANNOTATED whose sketch and segments are made as preprocessing makes them."""
    facts, sketched = read_source(content), sketch_source(content, SketchKind.CONSTANTS)
    assert not isinstance(facts, Dropped)
    assert not isinstance(sketched, Dropped)
    sides = {"code": content, "sketch": sketched.text}
    segments = [
        {
            f"{side}_{end}": utf8(text, getattr(segment, f"{side}_{end}"))
            for side, text in sides.items()
            for end in ("start", "end")
        }
        | {"with_sketch": segment.with_sketch}
        for segment in align_segments(content, sketched, facts.statements)
    ]
    placeholders = [
        {"start": utf8(sketched.text, spot.start), "end": utf8(sketched.text, spot.end), "kind": spot.kind}
        for spot in sketched.placeholders
    ]
    return document(content, sketched.text, libraries=facts.imports) | {
        "placeholders": placeholders,
        "segments": segments,
    }


def example(number: int) -> Row:
    """A small file, with a sketch of two segments; every other one uses NumPy."""
    content = SOURCES[number % 2].format(n=number)
    head, tail = content.split("\n\n\n")
    if number % 2:
        anonymous, placeholders = "print(os.name, number)\n", [("number", "number")]
    else:
        anonymous, placeholders = "def func(x):\n    return x * float\n", [("func", "func"), ("float", "float")]
    return document(
        content,
        f"{head}\n\n\n{anonymous}",
        placeholders,
        [(head, head, False), (tail, anonymous, True)],
        ["os"] if number % 2 else ["numpy"],
    )


def table_of(rows: Sequence[Row]) -> pa.Table:
    """The rows as a table of schemas.ANNOTATED."""
    return pa.Table.from_pylist(list(rows), schemas.ANNOTATED)


def write_dataset(folder: str, shards: Sequence[Sequence[Row]]) -> str:
    """Write `shards` as a finished dataset."""
    reports = []
    for number, rows in enumerate(shards):
        name = f"shard-{number:05d}"
        files = (write_table(folder, f"{name}.parquet", table_of(rows)),)
        reports.append(
            ShardReport(shard=name, unit_digest="test", files=files, rows_read=len(rows), rows_kept=len(rows))
        )
    manifests.write_manifest(folder, manifests.summarize("dataset", Config(), "test", reports))
    return folder
