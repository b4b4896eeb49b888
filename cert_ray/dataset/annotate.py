"""From documents and clusters to the annotated dataset's rows: weights, sketches, aligned segments.

In: one documents shard and its clusters shard. Out: `schemas.ANNOTATED` rows, in document order, and `schemas.DROPS`
for the rest. Offsets in the rows are UTF-8 bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cert_ray.python_source import Statement, byte_offsets, code_points, collector_paused
from cert_ray.quality.weights import WeightConfig, sampling_weights
from cert_ray.schemas import ANNOTATED, DROPS, PLACEHOLDER, SEGMENT, Dropped, DropReason, StatementKind
from cert_ray.sketching.anonymize import Sketched, SketchKind, sketch_source
from cert_ray.sketching.segments import align_segments


def annotate(
    documents: pa.Table, clusters: pa.Table, weights: WeightConfig, kind: SketchKind
) -> tuple[pa.Table, pa.Table]:
    """The survivors of `documents` as ANNOTATED, and the others as DROPS."""
    keep = clusters.column("keep").combine_chunks()
    duplicates = documents.filter(pc.invert(keep)).select(["path", "source"])
    duplicate_reasons = clusters.filter(pc.invert(keep))
    present = pc.is_valid(documents.column("content")).combine_chunks()
    removed = documents.filter(pc.and_not(keep, present)).select(["path", "source"])
    keep = pc.and_(keep, present)
    survivors = documents.filter(keep)
    with collector_paused():
        sketched = [sketch_source(content, kind) for content in survivors.column("content").to_pylist()]
    fine = pa.array([not isinstance(result, Dropped) for result in sketched], pa.bool_())
    rejected = survivors.filter(pc.invert(fine)).select(["path", "source"])
    reasons = [result for result in sketched if isinstance(result, Dropped)]
    survivors = survivors.filter(fine)
    cluster_size = clusters.column("cluster_size").filter(keep).filter(fine)
    columns = _columns(survivors, [result for result in sketched if isinstance(result, Sketched)])
    annotated = survivors.set_column(
        survivors.schema.get_field_index("content_hash"),
        "content_hash",
        pa.array([digest.hex() for digest in survivors.column("content_hash").to_pylist()], pa.string()),
    )
    annotated = annotated.append_column("weight", pa.array(_weights(survivors, weights)))
    annotated = annotated.append_column("cluster_size", cluster_size)
    for name, values in columns.items():
        annotated = annotated.append_column(name, values)
    drops = pa.concat_tables(
        [
            duplicates.append_column("reason", duplicate_reasons.column("reason")).append_column(
                "detail", pc.cast(duplicate_reasons.column("survivor"), pa.string())
            ),
            rejected.append_column("reason", pa.array([str(r.reason) for r in reasons], pa.string())).append_column(
                "detail", pa.array([r.detail for r in reasons], pa.string())
            ),
        ]
    )
    annotated, drops = annotated.select(ANNOTATED.names).cast(ANNOTATED), drops.select(DROPS.names).cast(DROPS)
    return annotated.combine_chunks(), with_removed(drops, removed)


def with_removed(drops: pa.Table, removed: pa.Table) -> pa.Table:
    """`drops` with a row for each of `removed`. All rows removed on request come last, sorted by source and path.

    So the table is the same whether one request named the files, several did, or they were removed from the start.
    """
    count = len(removed)
    added = removed.select(["path", "source"])
    added = added.append_column("reason", pa.array([str(DropReason.REMOVED_ON_REQUEST)] * count, pa.string()))
    added = added.append_column("detail", pa.array([""] * count, pa.string()))
    before = pc.equal(drops.column("reason"), DropReason.REMOVED_ON_REQUEST)
    all_removed = pa.concat_tables([drops.filter(before), added.select(DROPS.names).cast(DROPS)])
    ordered = all_removed.sort_by([("source", "ascending"), ("path", "ascending")])
    return pa.concat_tables([drops.filter(pc.invert(before)), ordered]).combine_chunks()


def row_counts(rows: pa.Table) -> dict[str, int]:
    """What a shard's report counts of its `rows` (ANNOTATED), besides how many there are."""
    return {
        "content_bytes": pc.sum(rows.column("size_bytes"), min_count=0).as_py(),
        "placeholders": pc.sum(pc.list_value_length(rows.column("placeholders")), min_count=0).as_py(),
    }


def _weights(survivors: pa.Table, config: WeightConfig) -> np.ndarray[Any, np.dtype[np.float64]]:
    stars = survivors.column("stars").fill_null(0).to_numpy()
    return sampling_weights(
        stars, survivors.column("ut_score").to_numpy(), survivors.column("func_score").to_numpy(), config
    )


def _columns(survivors: pa.Table, sketches: list[Sketched]) -> dict[str, pa.Array]:
    placeholders = _StructLists(PLACEHOLDER)
    segments = _StructLists(SEGMENT)
    contents = survivors.column("content").to_pylist()
    statements = survivors.column("statements").to_pylist()
    for content, stored, sketched in zip(contents, statements, sketches, strict=True):
        placeholders.append(*_placeholder_columns(sketched))
        segments.append(*_segment_columns(content, stored, sketched))
    texts = pa.array([sketched.text for sketched in sketches], pa.string())
    return {"sketch": texts, "placeholders": placeholders.array(), "segments": segments.array()}


class _StructLists:
    """A column of lists of structs. Lists are added one at a time, as columns, which avoids a dict per struct."""

    def __init__(self, struct: pa.StructType) -> None:
        self._struct = struct
        self._fields: list[list[Any]] = [[] for _ in struct]
        self._offsets = [0]

    def append(self, *columns: Sequence[Any]) -> None:
        for field, column in zip(self._fields, columns, strict=True):
            field += column
        self._offsets.append(len(self._fields[0]))

    def array(self) -> pa.ListArray:
        columns = [pa.array(values, field.type) for values, field in zip(self._fields, self._struct, strict=True)]
        structs = pa.StructArray.from_arrays(columns, fields=list(self._struct))
        return pa.ListArray.from_arrays(pa.array(self._offsets, pa.int32()), structs)


def _placeholder_columns(sketched: Sketched) -> tuple[Sequence[int], Sequence[int], Sequence[str]]:
    if not sketched.placeholders:
        return (), (), ()
    starts, ends, kinds = zip(*sketched.placeholders, strict=True)
    if not sketched.text.isascii():
        flat = byte_offsets(sketched.text, [offset for pair in zip(starts, ends, strict=True) for offset in pair])
        starts, ends = tuple(flat[::2]), tuple(flat[1::2])
    return starts, ends, kinds


def _segment_columns(
    content: str, stored: list[dict[str, Any]], sketched: Sketched
) -> tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[int], Sequence[bool]]:
    """The columns of the segments, in bytes; `stored` are the document's blocks, also in bytes."""
    borders = code_points(content, [offset for row in stored for offset in (row["start"], row["end"])])
    blocks = [
        Statement(start, end, StatementKind(row["kind"]))
        for row, start, end in zip(stored, borders[::2], borders[1::2], strict=True)
    ]
    segments = align_segments(content, sketched, blocks)
    code = byte_offsets(content, [offset for s in segments for offset in (s.code_start, s.code_end)])
    sketch = byte_offsets(sketched.text, [offset for s in segments for offset in (s.sketch_start, s.sketch_end)])
    return code[::2], code[1::2], sketch[::2], sketch[1::2], [segment.with_sketch for segment in segments]
