"""A small corpus with known duplicates, and preprocessing without Ray, for tests of what it leaves in its folders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import xxhash

from cert_ray.dataset.annotate import annotate
from cert_ray.manifests import ShardReport
from cert_ray.python_source import SourceFacts, read_source
from cert_ray.quality.weights import WeightConfig
from cert_ray.schemas import DOCUMENTS
from cert_ray.shards.units import Attempt, Work, WorkUnit, run_in_process
from cert_ray.sketching.anonymize import SketchKind
from tests.without_ray import Inline, without_ray

FILE = '''import numpy as np
from {library} import thing


def function_{index}(values, limit={index}):
    """Return what is below the limit, number {index}."""
    if limit > {index} + 1:
        return np.asarray(values) * 2.5
    for value in values:
        print("value {index}", value)
    return [value for value in values if value < limit]


class Holder{index}:
    name = "holder {index}"

    def méthode(self):
        return f"{{self.name}} and {index}"
'''


def write_corpus(folder: Path, files: int = 12) -> None:
    """`files` different files, one exact copy of the first, one near copy of a long one."""
    folder.mkdir(parents=True)
    for index in range(files):
        body = FILE.format(index=index, library="pandas" if index % 2 else "polars")
        names = "\n".join(f"name_{index}_{item} = {item * (index + 3)}" for item in range(120))
        (folder / f"file_{index:02d}.py").write_text(f"{body}\n\n{names}\n")
    first = (folder / "file_00.py").read_text()
    (folder / "copy.py").write_text(first)
    (folder / "nearly.py").write_text(first + "\nextra = 1\n")
    (folder / "broken.py").write_text("def f(:\n    if x:\n        return 1\n    for y in z:\n        return 2\n")


@contextmanager
def in_this_process() -> Iterator[None]:
    """`preprocess` without Ray: units and bands one after the other. That Ray gives the same is `test_on_ray`'s."""

    def run_units(units: Sequence[WorkUnit], work: Work, run: Attempt, **_: object) -> list[ShardReport]:
        return run_in_process(units, work, run)

    with without_ray(Inline(), run_units):
        yield


def annotated_rows(contents: list[str], cluster_size: list[int] | None = None) -> pa.Table:
    """ANNOTATED rows of `contents`, as `annotate` makes them, with the cluster sizes given (default: 1)."""
    sizes = cluster_size or [1] * len(contents)
    facts = [read_source(content) for content in contents]
    assert all(isinstance(fact, SourceFacts) for fact in facts)
    count = len(contents)
    documents = pa.table(
        {
            "doc_id": [f"shard-00000-{row:07d}" for row in range(count)],
            "path": [f"file_{row}.py" for row in range(count)],
            "source": ["corpus"] * count,
            "repository": pa.nulls(count, pa.string()),
            "stars": pa.nulls(count, pa.int64()),
            "licence": pa.nulls(count, pa.string()),
            "content": contents,
            "size_bytes": [len(content.encode()) for content in contents],
            "content_hash": [xxhash.xxh3_128_digest(content.encode()) for content in contents],
            "libraries": [list(fact.imports) for fact in facts if isinstance(fact, SourceFacts)],
            "ut_score": [0.0] * count,
            "func_score": [0.0] * count,
            "statements": [[{"start": 0, "end": len(content.encode()), "kind": "code"}] for content in contents],
        },
        schema=DOCUMENTS,
    )
    clusters = pa.table(
        {
            "keep": pa.array([True] * count, pa.bool_()),
            "reason": pa.nulls(count, pa.string()),
            "survivor": pa.array(range(count), pa.int64()),
            "cluster_size": pa.array(sizes, pa.int32()),
        }
    )
    return annotate(documents, clusters, WeightConfig(), SketchKind.CONSTANTS)[0]
