"""The documents of a shard as dedup compares them: with all texts, even those taken down since.

In: the shards of the documents stage, where a removed file has a row without a text. Out: the same rows with all texts.
Texts that were taken down are made again from the input, in memory only. So their copies are found whether keys are
made before the takedown or after it: the same documents are dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pyarrow as pa

from cert_ray import storage
from cert_ray.dedup.minhash import I64
from cert_ray.errors import InputError
from cert_ray.retries import tried_again
from cert_ray.shards.units import damage_named

VERB = "preprocess"  # the verb that makes the documents

# Returns the documents of a shard, made again from the input; None if no takedown in that shard is known.
Originals = Callable[[str], pa.Table | None]


def read_contents(documents: str, shard: str, columns: Sequence[str], originals: Originals | None) -> pa.Table:
    """`columns` of one shard of `documents`; they must include `content` and `content_hash`.

    Args:
        originals: where removed texts come from; may be None if no file was removed.

    Raises:
        InputError: when the input no longer gives the shard's documents, or texts are missing without a known takedown.
        ShardCorruptError: when the shard is damaged.
    """
    url = storage.join(documents, f"{shard}.parquet")
    with damage_named(documents, shard, VERB):
        table = storage.read_parquet(url, list(columns))
    if not table.column("content").null_count:
        return table
    original = originals(shard) if originals is not None else None
    if original is None:
        raise InputError(
            url,
            f"{table.column('content').null_count} of its files have no text, and no record of a takedown explains it",
            "Put the run's removals.jsonl back: without it, files that someone asked to remove would come in again.",
        )
    if not original.column("content_hash").equals(table.column("content_hash")):
        raise InputError(
            url,
            "its input has changed, and the texts of its removed files are needed to find their copies",
            f"Delete reports/{shard}.json beside it: the next run makes the shard again.",
        )
    return table.set_column(table.schema.get_field_index("content"), "content", original.column("content"))


def texts_at(documents: str, shard: str, rows: I64, originals: Originals | None) -> list[str]:
    """The texts of some `rows` (ascending) of one shard of `documents`, with a few rows in memory at a time.

    If any of the rows was removed, the whole shard is made again from its input. That is retried when a stream breaks
    off. (`read_contents` does not retry: it runs in a task, and whatever runs the task's unit retries.)

    Args, raises: as `read_contents`.
    """
    with damage_named(documents, shard, VERB):
        content = storage.read_rows(storage.join(documents, f"{shard}.parquet"), rows.tolist(), ["content"])
        texts = content.column("content").to_pylist()
    if None in texts:
        whole = tried_again(read_contents)(documents, shard, ["content", "content_hash"], originals)
        texts = whole.column("content").take(pa.array(rows)).to_pylist()
    return [str(text) for text in texts]
