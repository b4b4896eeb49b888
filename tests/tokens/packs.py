"""Small packs for tests: documents as lists of pieces, written through the real shard writer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from cert_ray import manifests, schemas
from cert_ray.config import Config
from cert_ray.manifests import ShardReport
from cert_ray.tokens.shards import STAGE, UNIGRAMS, PackedTokens, token_dtype, write_shard

PAD = 1
Piece = tuple[Sequence[int], bool]  # token ids, atomic


class PackOptions(Config):
    """The one option that `PackedTokens` reads."""

    context_tokens: int


def write_pack(
    folder: Path, shards: Sequence[Sequence[Sequence[Piece]]], context_tokens: int = 8, vocab_size: int = 500
) -> str:
    """Write documents (lists of pieces), grouped into shards, as a finished pack; weights are 1, 2, 3, ..."""
    reports = []
    for number, documents in enumerate(shards):
        name = f"shard-{number:05d}"
        ids = [token for document in documents for piece, _ in document for token in piece]
        rows, start = [], 0
        for ordinal, document in enumerate(documents):
            for piece, atomic in document:
                rows.append(
                    {
                        "document": ordinal,
                        "start": start,
                        "tokens": len(piece),
                        "weight": float(ordinal + 1),
                        "held_out": ordinal % 2 == 1,
                        "atomic": atomic,
                    }
                )
                start += len(piece)
        pieces = pa.Table.from_pylist(rows, schemas.PIECES)
        tokens = np.array(ids, token_dtype(vocab_size))
        files = write_shard(str(folder), name, tokens, pieces, UNIGRAMS.empty_table())
        kept = len(documents)
        reports.append(ShardReport(shard=name, unit_digest="test", files=files, rows_read=kept, rows_kept=kept))
    notes = {"vocab_size": vocab_size, "tokenizer_digest": "test", "pad_id": PAD, "end_id": 0}
    options = PackOptions(context_tokens=context_tokens)
    manifests.write_manifest(str(folder), manifests.summarize(STAGE, options, "test", reports, notes))
    return str(folder)


def open_pack(folder: Path, documents: Sequence[Sequence[Piece]], context_tokens: int = 8) -> PackedTokens:
    """A pack of one shard, opened."""
    return PackedTokens.open(write_pack(folder, [documents], context_tokens))
