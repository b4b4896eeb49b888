"""Tokenizer training, encoding and packing: MB per CPU-second beside plain `tokenizers`; rows used and pairs cut.

In: a finished annotated dataset (`cert-ray preprocess`). `train`: a vocabulary by `train_vocabulary` and by
the library's own trainer with the same settings. `encode`: a shard's documents, by `encode_shard` (arrays, pieces and
counts included) and by one `encode_batch_fast` call whose ids are read. Both on one thread. `scale`: a pack on Ray with
one worker and with two, start-up apart, and whose CPU seconds it takes; a shard is a unit, so give documents of many.
`packing`: per view and window, the share of row positions that hold tokens, pairs that lie in two rows, pairs too long
for a row; beside it concatenating the same pieces and cutting. Contenders take turns.

Example: python -m tests.bench.bench_tokens --dataset run/dataset --output results --work /tmp/tokens
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tests.bench.measuring import Spread, cpu_by_kind, markdown, publish

VIEWS = ("base", "sketcher", "generator", "context_first")


def main() -> None:
    """Measure what was asked for."""
    given = _arguments()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["RAYON_NUM_THREADS"] = "1"
    warnings.simplefilter("ignore")
    given.work.mkdir(parents=True, exist_ok=True)
    table = _documents(given)
    texts = table["content"].to_pylist()
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    tokenizer, tables, figures = _tokenizer(given, texts), [], {}
    for part in given.part:
        measured, found = PARTS[part](given, table, texts, megabytes, tokenizer)
        tables.append(measured)
        figures[part] = found
    sizes = f"{len(texts):,} documents, {megabytes:.1f} MB, {given.runs} runs, one thread."
    command = "python -m tests.bench.bench_tokens " + " ".join(sys.argv[1:])
    publish(given.output, "tokens", command, [*tables, sizes], figures)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="a finished annotated dataset")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--part", action="append", choices=list(PARTS), help="default: all")
    parser.add_argument("--documents", type=int, default=1_000, help="of the dataset, the first")
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--context", action="append", type=int, help="of the packing; default: 256 and 1,024")
    parser.add_argument("--shards", type=int, help="of `scale`: deal documents out to so many; default: as they are")
    parser.add_argument("--runs", type=int, default=3)
    given = parser.parse_args()
    given.part = given.part or list(PARTS)
    given.context = given.context or [256, 1_024]
    return given


def _documents(given: argparse.Namespace) -> pa.Table:
    from cert_ray import storage
    from cert_ray.tokens.dataset import open_dataset

    dataset, tables, left = open_dataset(given.dataset), [], given.documents
    for shard in dataset.shards:
        if left > 0:
            tables.append(storage.read_parquet(storage.join(dataset.url, shard.name)).slice(0, left))
            left -= tables[-1].num_rows
    return pa.concat_tables(tables)


def _config(given: argparse.Namespace) -> Any:
    from cert_ray.tokens.vocabulary import TokenizerConfig

    return TokenizerConfig(vocab_size=given.vocabulary)


def _tokenizer(given: argparse.Namespace, texts: list[str]) -> Any:
    from cert_ray.tokens.vocabulary import load_tokenizer, save_tokenizer, train_vocabulary

    folder = given.work / "tokenizer"
    if not folder.exists():
        save_tokenizer(train_vocabulary(texts, _config(given)), str(folder), 1_024)
    return load_tokenizer(str(folder))


def _turns(runs: int, megabytes: float, contenders: dict[str, Callable[[], Any]]) -> dict[str, Spread]:
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(runs):
        for name, work in contenders.items():
            started = time.process_time()
            work()
            rates[name].append(megabytes / (time.process_time() - started))
    return {name: Spread.of(found) for name, found in rates.items()}


def _compared(title: str, spreads: dict[str, Spread]) -> str:
    ours, plain = spreads.values()
    rows: list[tuple[str, object]] = list(spreads.items())
    rows.append(("of the library's rate (goal 0.95)", f"{ours.median / plain.median:.3f}"))
    return markdown([title, "MB per CPU-second"], rows)


def train(given: argparse.Namespace, _: pa.Table, texts: list[str], megabytes: float, __: Any) -> tuple[str, Any]:
    """Ours and the library's trainer with the same settings, which give the same vocabulary."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, trainers

    from cert_ray.sketching.prompt_format import SPECIAL_TOKENS
    from cert_ray.tokens.vocabulary import train_vocabulary

    config, made = _config(given), {}

    def plain() -> None:
        tokenizer = Tokenizer(models.BPE())
        split = pre_tokenizers.Split(Regex(config.pattern), behavior="isolated")
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
        trainer = trainers.BpeTrainer(
            vocab_size=config.vocab_size,
            min_frequency=config.min_frequency,
            max_token_length=config.max_token_length,
            special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        made["plain"] = tokenizer.get_vocab()

    def ours() -> None:
        made["ours"] = train_vocabulary(texts, config).get_vocab()

    spreads = _turns(given.runs, megabytes, {"`train_vocabulary`": ours, "`tokenizers`": plain})
    assert set(made["ours"]) == set(made["plain"]), "the same settings give the same vocabulary"
    return _compared("training the vocabulary", spreads), spreads


def encode(
    given: argparse.Namespace, table: pa.Table, texts: list[str], megabytes: float, tokenizer: Any
) -> tuple[str, Any]:
    """A shard to arrays, and the library's encodings alone."""
    from cert_ray.tokens.encoding import PackConfig, encode_shard

    config = PackConfig(view="base", held_out_fraction=0.0)
    made = {}

    def ours() -> None:
        made["ours"] = len(encode_shard(table, tokenizer, config).tokens)

    def plain() -> None:
        made["plain"] = sum(len(one.ids) for one in tokenizer.encode_batch_fast(texts, add_special_tokens=False))

    spreads = _turns(given.runs, megabytes, {"`encode_shard`, view base": ours, "`encode_batch_fast`": plain})
    assert made["ours"] - len(texts) == made["plain"], "the same tokens, and one end per document"
    return _compared("encoding", spreads), spreads


def scale(given: argparse.Namespace, table: pa.Table, texts: list[str], megabytes: float, *_: Any) -> tuple[str, Any]:
    """A pack on Ray with one worker and with two, by the clock and by whose CPU seconds; the first of each warms up."""
    import tempfile

    import ray

    from cert_ray.tokens.encoding import PackConfig
    from cert_ray.tokens.on_ray import pack_dataset

    dataset = given.dataset if given.shards is None else _dealt(table, given.shards, given.work / "dataset")
    rates: dict[int, list[float]] = {1: [], 2: []}
    used: dict[int, Counter[str]] = {workers: Counter() for workers in rates}
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 would be what is measured beside any other work
    with tempfile.TemporaryDirectory(prefix="cr", dir="/tmp") as folder:
        ray.init(address="local", num_cpus=2, include_dashboard=False, _temp_dir=folder, log_to_driver=False)
        for run in range(given.runs + 1):
            for workers in rates:
                output = given.work / "scaled"
                shutil.rmtree(output, ignore_errors=True)
                before, started = cpu_by_kind(os.getpid()), time.perf_counter()
                config = PackConfig(view="base", limit=given.documents)
                pack_dataset(dataset, str(given.work / "tokenizer"), str(output), config, workers)
                if run:
                    rates[workers].append(megabytes / (time.perf_counter() - started))
                    used[workers] += cpu_by_kind(os.getpid()) - before
        ray.shutdown()
    spreads = {workers: Spread.of(found) for workers, found in rates.items()}
    rows: list[tuple[object, ...]] = [
        (workers, spread, *_cpu_seconds(used[workers], given.runs)) for workers, spread in spreads.items()
    ]
    rows.append(("two are", f"{spreads[2].median / spreads[1].median:.2f}x one", "", "", ""))
    figures = {str(workers): {"rate": spread, "cpu_s": dict(used[workers])} for workers, spread in spreads.items()}
    headers = ["workers", "MB/s by the clock", "CPU-s of a pack: workers", "driver", "Ray's own"]
    return markdown(headers, rows), figures


def _dealt(table: pa.Table, shards: int, folder: Path) -> str:
    """A dataset of so many shards, every one with as many of the documents, one after the other."""
    from cert_ray import manifests
    from cert_ray.config import Config
    from cert_ray.manifests import ShardReport
    from cert_ray.shards.units import shard_name, write_table

    shutil.rmtree(folder, ignore_errors=True)
    reports = []
    for number in range(shards):
        rows = table.take(np.arange(number, table.num_rows, shards))
        files = (write_table(str(folder), f"{shard_name(number)}.parquet", rows),)
        kept = rows.num_rows
        reports.append(
            ShardReport(shard=shard_name(number), unit_digest="", files=files, rows_read=kept, rows_kept=kept)
        )
    manifests.write_manifest(str(folder), manifests.summarize("dataset", Config(), "bench", reports))
    return str(folder)


def _cpu_seconds(used: Counter[str], runs: int) -> tuple[str, str, str]:
    """Of a pack, in the mean: those of the workers, of the driver, of the rest."""
    rest = used.total() - used["workers"] - used["driver"]
    workers, driver, others = (f"{seconds / runs:.2f}" for seconds in (used["workers"], used["driver"], rest))
    return workers, driver, others


def packing(given: argparse.Namespace, *_: Any) -> tuple[str, Any]:
    """Tokens used and pairs cut, per view and window."""
    from cert_ray.tokens.encoding import PackConfig
    from cert_ray.tokens.pack import pack_in_process
    from cert_ray.tokens.packing import plan_rows
    from cert_ray.tokens.shards import PackedTokens

    rows, figures = [], {}
    for view in VIEWS:
        for context in given.context:
            output = str(given.work / f"{view}-{context}")
            config = PackConfig(view=view, context_tokens=context, held_out_fraction=0.0, limit=given.documents)
            pack_in_process(given.dataset, str(given.work / "tokenizer"), output, config)
            packed = PackedTokens.open(output)
            order = np.random.default_rng(0).permutation(len(packed)).astype(np.int64)
            started = time.process_time()
            plan = plan_rows(packed, order, context)
            seconds = time.process_time() - started
            counts = packed.manifest.counts
            pairs, stats = counts.get("pairs", 0), plan.stats
            figures[f"{view}-{context}"] = {"stats": stats, "pairs": pairs, "plan_s": seconds}
            rows.append(
                [
                    view,
                    f"{context:,}",
                    f"{stats.rows:,}",
                    f"{stats.used_share:.2%}",
                    f"{stats.cut_pairs}" if pairs else "-",
                    f"{stats.pairs_too_long / pairs:.1%}" if pairs else "-",
                    f"{_cut_when_concatenated(packed, order, context + 1):.1%}" if pairs else "-",
                    f"{seconds:.2f}",
                ]
            )
    headers = ["view", "window", "rows", "tokens used", "pairs cut", "pairs longer than a row, as code alone"]
    return markdown([*headers, "pairs cut by concatenating", "planning an epoch, CPU-s"], rows), figures


def _cut_when_concatenated(packed: Any, order: Any, row_tokens: int) -> float:
    """The share of the pairs that lie in two rows when pieces are laid end to end and cut."""
    first = packed.pieces.first
    pieces = np.concatenate([np.arange(first[document], first[document + 1]) for document in order])
    tokens, atomic = packed.pieces.tokens[pieces], packed.pieces.atomic[pieces]
    ends = np.cumsum(tokens)
    cut = (ends - tokens) // row_tokens != (ends - 1) // row_tokens
    return float(np.count_nonzero(cut & atomic) / max(1, np.count_nonzero(atomic)))


PARTS: dict[str, Callable[..., tuple[str, Any]]] = {
    "train": train,
    "encode": encode,
    "scale": scale,
    "packing": packing,
}


if __name__ == "__main__":
    main()
