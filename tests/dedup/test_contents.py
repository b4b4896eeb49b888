"""Texts for dedup, of files that were taken down as well: from the input, where the shard has none any more."""

from __future__ import annotations

import errno
import functools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from cert_ray import retries, storage
from cert_ray.dedup.contents import read_contents, texts_at
from cert_ray.errors import InputError

SHARD = "shard-00000"


def table(texts: list[str | None]) -> pa.Table:
    hashes = [str(row).zfill(16).encode() for row in range(len(texts))]
    return pa.table({"content": pa.array(texts, pa.string()), "content_hash": hashes})


def test_removed_texts_come_from_the_input_which_must_be_the_same(tmp_path: Path) -> None:
    storage.write_parquet(table(["a", None]), str(tmp_path / f"{SHARD}.parquet"))
    whole = table(["a", "b"])
    read = functools.partial(read_contents, str(tmp_path), SHARD, ["content", "content_hash"])
    assert read(lambda shard: whole) == whole
    for other in (whole.slice(1), whole.set_column(1, "content_hash", pa.array([b"1" * 16, b"3" * 16]))):
        with pytest.raises(InputError, match=r"shard-00000\.parquet: .* reports/shard-00000\.json"):
            read(lambda shard, other=other: other)


def test_a_stream_that_breaks_off_while_a_text_is_made_again_is_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the driver does, which no task's policy covers."""
    monkeypatch.setattr(retries, "_wait", lambda seconds: None)
    storage.write_parquet(table(["a", None]), str(tmp_path / f"{SHARD}.parquet"))
    breaks = [OSError(errno.EIO, "the storage said so"), ConnectionResetError()]

    def originals(shard: str) -> pa.Table:
        if breaks:
            raise InputError("s3://bucket/x.tar", "reading failed", "Check the store.") from breaks.pop()
        return table(["a", "b"])

    assert texts_at(str(tmp_path), SHARD, np.array([0, 1]), originals) == ["a", "b"]
    assert breaks == []


def test_a_damaged_shard_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(retries, "_wait", waits.append)
    path = tmp_path / f"{SHARD}.parquet"
    storage.write_parquet(table([f"text {row}" for row in range(99)]), str(path))
    content = path.read_bytes()
    path.write_bytes(content[:-60] + b"\xff" * 40 + content[-20:])  # Arrow's error is an `OSError` without a number
    with pytest.raises(pa.ArrowException):
        texts_at(str(tmp_path), SHARD, np.array([0]), None)
    assert waits == []


def test_missing_texts_that_no_takedown_explains_are_refused(tmp_path: Path) -> None:
    storage.write_parquet(table(["a", None]), str(tmp_path / f"{SHARD}.parquet"))
    for originals in (None, lambda shard: None):
        with pytest.raises(InputError, match=r"shard-00000\.parquet: 1 of its files .* removals\.jsonl"):
            read_contents(str(tmp_path), SHARD, ["content", "content_hash"], originals)


def test_a_shard_without_removed_files_asks_for_no_input(tmp_path: Path) -> None:
    whole = table(["a", "b"])
    storage.write_parquet(whole, str(tmp_path / f"{SHARD}.parquet"))
    assert read_contents(str(tmp_path), SHARD, ["content", "content_hash"], None) == whole


@pytest.mark.parametrize("rows", [[], [0], [4_095, 4_096], [0, 17, 4_100, 9_999], [8_192]])
def test_texts_of_some_rows_are_those_of_the_whole_shard(rows: list[int], tmp_path: Path) -> None:
    """A row group has 4,096 rows."""
    whole = table([f"text {row}" for row in range(10_000)])
    holes = table([None if row == 17 else f"text {row}" for row in range(10_000)])
    storage.write_parquet(holes, str(tmp_path / f"{SHARD}.parquet"))
    asked = []

    def originals(shard: str) -> pa.Table:
        asked.append(shard)
        return whole

    assert texts_at(str(tmp_path), SHARD, np.array(rows, np.int64), originals) == [f"text {row}" for row in rows]
    assert asked == ([SHARD] if 17 in rows else [])
