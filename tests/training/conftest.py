"""A small pack whose next token is mostly predictable, its tokenizer, and a process group of one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tokenizers
import torch

from cert_ray import manifests, schemas
from cert_ray.config import Config
from cert_ray.manifests import ShardReport
from cert_ray.tokens.shards import UNIGRAMS, write_shard
from cert_ray.training import records
from cert_ray.training.config import TrainConfig
from cert_ray.training.models import tokenizer_digest

CONTEXT_TOKENS = 32
WORDS = 60
END, PAD = "<|endoftext|>", "<|pad|>"

Document = tuple[list[int], float, bool]  # token ids, weight, whether it is held out


class _PackConfig(Config):
    view: str = "base"
    context_tokens: int = CONTEXT_TOKENS


def write_tokenizer(folder: Path, words: int = WORDS, added: tuple[str, ...] = ()) -> tokenizers.Tokenizer:
    """A tokenizer of `words` words behind the two special ones, and `added` special ones behind those."""
    vocabulary = {END: 0, PAD: 1} | {f"w{index}": index + 2 for index in range(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=END))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([END, PAD, *added])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


def write_pack(folder: Path, tokenizer: tokenizers.Tokenizer, documents: int = 60, seed: int = 3) -> None:
    """Documents that mostly count upwards from a random word, every tenth held out, some with weight 0."""
    rng = np.random.default_rng(seed)
    made: list[Document] = []
    for document in range(documents):
        length = int(rng.integers(20, 90))
        words = (rng.integers(WORDS) + np.arange(length)) % WORDS + 2
        words[rng.random(length) < 0.05] = 2
        made.append((words.tolist(), 0.0 if document % 7 == 3 else 1.0, document % 10 == 0))
    write_documents(folder, tokenizer, made)


def write_documents(folder: Path, tokenizer: tokenizers.Tokenizer, documents: list[Document]) -> None:
    """A pack of these documents, an end token behind each."""
    tokens: list[int] = []
    rows: dict[str, list[Any]] = {name: [] for name in schemas.PIECES.names}
    for number, (words, weight, held_out) in enumerate(documents):
        piece = (number, len(tokens), len(words) + 1, weight, held_out, False)
        for name, entry in zip(schemas.PIECES.names, piece, strict=True):
            rows[name].append(entry)
        tokens += [*words, 0]
    pieces = pa.table(rows, schema=schemas.PIECES)
    unigrams = UNIGRAMS.empty_table()
    files = write_shard(str(folder), "shard-00000", np.array(tokens, "<u2"), pieces, unigrams)
    count = len(documents)
    report = ShardReport(shard="shard-00000", unit_digest="0", files=files, rows_read=count, rows_kept=count)
    notes = {
        "vocab_size": tokenizer.get_vocab_size(),
        "tokenizer_digest": tokenizer_digest(tokenizer),
        "pad_id": 1,
        "end_id": 0,
    }
    manifests.write_manifest(str(folder), manifests.summarize("tokens", _PackConfig(), "0", [report], notes))


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer of `pack_folder`."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def pack_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """A pack of 60 documents, 3,300 tokens in all, rows of 33."""
    folder = tmp_path_factory.mktemp("pack")
    write_pack(folder, tokenizers.Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json")))
    return folder


@pytest.fixture(scope="session")
def make_config(
    tmp_path_factory: pytest.TempPathFactory, pack_folder: Path, tokenizer_folder: Path
) -> Callable[..., TrainConfig]:
    """A config of a short run on the small pack; keyword arguments replace its options."""

    def make(**options: Any) -> TrainConfig:
        defaults: dict[str, Any] = {
            "base": "tiny",
            "tokenizer": str(tokenizer_folder),
            "tokens": str(pack_folder),
            "output": str(tmp_path_factory.mktemp("run") / "model"),
            "steps": 8,
            "warmup_steps": 2,
            "micro_batch": 4,
            "gradient_accumulation": 1,
            "learning_rate": 3e-3,
        }
        return TrainConfig.from_mapping(defaults | options, "test")

    return make


@pytest.fixture(scope="session")
def process_group() -> Iterator[None]:
    """A gloo group of this process alone, as DeepSpeed wants it."""
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    kept = {name: os.environ.get(name) for name in place}
    os.environ.update(place)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
    for name, value in kept.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value


@pytest.fixture(autouse=True)
def undrawn_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands for `loss.png` in this process: one takes 0.15 s to draw, and short runs have many checkpoints."""
    monkeypatch.setattr(records, "draw_losses", lambda steps, *_: b"\x89PNG" + repr(steps).encode())


@pytest.fixture
def copy_report() -> Callable[[str], Callable[[dict[str, Any], Path, str], None]]:
    """What Ray Train does with a checkpoint's part, for one worker: copy it below the output."""

    def report_to(output: str) -> Callable[[dict[str, Any], Path, str], None]:
        def report(metrics: dict[str, Any], part: Path, name: str) -> None:
            shutil.copytree(part, Path(output) / "checkpoints" / name, dirs_exist_ok=True)

        return report

    return report_to
