"""The documents of a shard as dedup compares them: whole, whatever was taken down since.

In: the shards of the documents stage, where a removed file has a row without a text. Out: the same rows with all texts.
What was taken down is made again from the input, in memory, so that its copies are found whenever keys are made: before
the takedown or after it, the same documents are dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pyarrow as pa

from cert_ray import storage
from cert_ray.errors import InputError

Originals = Callable[[str], pa.Table]  # the documents of a shard as its input gives them


def read_contents(documents: str, shard: str, columns: Sequence[str], originals: Originals | None) -> pa.Table:
    """`columns`, with `content` and `content_hash` among them, of one shard of `documents`.

    Args:
        originals: where removed texts come from; may be None where no file was removed.

    Raises:
        InputError: when the input does not give the shard's documents any more.
    """
    url = storage.join(documents, f"{shard}.parquet")
    table = storage.read_parquet(url, list(columns))
    if not table.column("content").null_count:
        return table
    assert originals is not None, "documents without a text, and nothing to make it from"
    original = originals(shard)
    if not original.column("content_hash").equals(table.column("content_hash")):
        raise InputError(
            url,
            "its input gives other documents now, and texts that were taken down are needed to find their copies",
            f"Delete reports/{shard}.json beside it: the next run makes the shard again.",
        )
    return table.set_column(table.schema.get_field_index("content"), "content", original.column("content"))
