"""Packing on Ray: one work unit per shard of the dataset, then the manifest.

In: URLs of an annotated dataset and of a tokenizer's folder. Out: token shards (`shards`), the same bytes on any number
of workers. `pack_unit` does the work of a unit, without Ray; this module only places units.
"""

from __future__ import annotations

import os
from functools import partial

from cert_ray.manifests import Manifest, ShardReport
from cert_ray.shards.on_ray import run_units
from cert_ray.shards.units import Attempt, Work, WorkUnit
from cert_ray.tokens.encoding import PackConfig
from cert_ray.tokens.pack import pack_with


def pack_dataset(dataset: str, tokenizer: str, output: str, config: PackConfig, workers: int | None = None) -> Manifest:
    """Encode every document of the view and write the token shards into `output`, the manifest last.

    Only shards that are missing, or were made from other inputs or options, are made. `workers` limits how many tasks
    run at a time; None means as many as the cluster has CPUs. Ray must have been started.

    Raises:
        InputError: when the dataset holds no document of the view, or there is no tokenizer at `tokenizer`.
        TokenizerMismatchError: when the tokenizer lacks special tokens that the view needs.
        ShardCorruptError: when a shard of the dataset disagrees with its manifest.
        NotFinishedError, SchemaVersionError: when `dataset` is no finished dataset of this version.
    """

    def on_ray(units: list[WorkUnit], work: Work, run: Attempt) -> list[ShardReport]:
        return run_units(units, partial(_on_one_cpu, work), run, workers=workers)

    return pack_with(on_ray, dataset, tokenizer, output, config)


def _on_one_cpu(work: Work, unit: WorkUnit) -> ShardReport:
    """Do `unit` with one tokenizer thread; otherwise each task would start one per core of the node."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return work(unit)
