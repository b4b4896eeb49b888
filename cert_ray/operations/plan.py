"""`cert-ray plan corpus`: what preprocessing a corpus would take, stage by stage, before a cluster is paid for.

In: the size of the corpus and of the cluster, and `Costs`: what a document and a byte cost each stage, as data measured
by `tests/bench/bench_growth.py --write-costs`. Out: time, memory, bytes moved and disk. Nothing is read or started.

A stage takes its fixed seconds, plus its core-seconds divided by the cores it can use: all for work units, at most one
per band for near edges, and only the driver's for clusters. No stage is faster than storage moves its bytes.
"""

from __future__ import annotations

import importlib.resources
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import pydantic
import yaml

from cert_ray import storage
from cert_ray.config import Config
from cert_ray.corpus.inputs import SourceConfig
from cert_ray.dedup.minhash import MinHashConfig
from cert_ray.dedup.survivors import band_tasks
from cert_ray.errors import InputError

_SHIPPED = "corpus_costs.yaml"
# The driver lists every loose file: name, size and version, then its unit. Measured for paths of 80 characters by
# `python -m tests.bench.bench_driver_memory --loose-files 500000` (444), CPython 3.11, 2026-11-26.
LOOSE_FILE_BYTES = 450


class Cost(Config):
    """An amount that grows with the corpus: `fixed + per_document * documents + per_byte * bytes`."""

    fixed: float = pydantic.Field(default=0.0, ge=0)
    per_document: float = pydantic.Field(default=0.0, ge=0)
    per_byte: float = pydantic.Field(default=0.0, ge=0)

    def growing(self, documents: float, size_bytes: float) -> float:
        """What the corpus adds to the fixed part."""
        return self.per_document * documents + self.per_byte * size_bytes

    def of(self, documents: float, size_bytes: float) -> float:
        """The whole amount."""
        return self.fixed + self.growing(documents, size_bytes)


class StageCost(Config):
    """What one stage costs. Documents and bytes are those of the raw input, so costs include what cleaning drops."""

    name: str
    shared_by: Literal["units", "bands", "driver"]  # decides how many cores the stage can use
    seconds: Cost  # fixed: wall seconds, whatever the cluster; the others: core-seconds
    read_bytes: Cost
    written_bytes: Cost
    worker_memory_bytes: Cost  # the largest process beside the driver, at its peak
    driver_memory_bytes: Cost


class Costs(Config):
    """A measurement: every stage's costs, and where, when, on what and with which command they were taken."""

    machine: str
    cores: int = pydantic.Field(ge=1)
    date: str
    command: str
    corpus: str
    runs: int = pydantic.Field(ge=1)
    versions: dict[str, str]
    stages: tuple[StageCost, ...] = pydantic.Field(min_length=1)


class PlanConfig(Config):
    """What to plan: a corpus and a cluster of equal nodes."""

    files: float = pydantic.Field(gt=0)
    size_bytes: float = pydantic.Field(gt=0)
    nodes: int = pydantic.Field(default=1, ge=1)
    cores: int = pydantic.Field(ge=1)  # of each node
    storage_bytes_per_s: float = pydantic.Field(default=200e6, gt=0)  # each node's, reads and writes; assumed
    node_hour_price: float | None = pydantic.Field(default=None, gt=0)  # in any currency


@dataclass(frozen=True, slots=True)
class StagePlan:
    """The prediction for one stage. Memory is that of one worker and of the driver, at their peaks."""

    name: str
    seconds: float
    core_hours: float
    cores_used: int
    bound_by_storage: bool
    read_bytes: float
    written_bytes: float
    worker_memory_bytes: float
    driver_memory_bytes: float


@dataclass(frozen=True, slots=True)
class Plan:
    """The prediction for a whole run; stages follow each other."""

    config: PlanConfig
    costs: Costs
    stages: tuple[StagePlan, ...]

    @property
    def seconds(self) -> float:
        """From start to end."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def node_hours(self) -> float:
        """The hours of all nodes, from start to end."""
        return self.config.nodes * self.seconds / 3600

    @property
    def disk_bytes(self) -> float:
        """On storage at the end, including intermediates but not the input."""
        return sum(stage.written_bytes for stage in self.stages)

    @property
    def moved_bytes(self) -> float:
        """Read from and written to storage."""
        return sum(stage.read_bytes + stage.written_bytes for stage in self.stages)

    @property
    def node_memory_bytes(self) -> float:
        """What the fullest node needs: the driver and a worker on each core, in the worst stage."""
        cores = self.config.cores
        return max(
            stage.driver_memory_bytes + min(cores, stage.cores_used) * stage.worker_memory_bytes
            for stage in self.stages
        )


def load_costs(url: str | None = None) -> Costs:
    """The costs at `url`, or those that come with cert-ray.

    Raises:
        InputError: when there is no such file, or it is not YAML.
        ConfigError: naming each field that cannot be used.
    """
    if url is None:
        shipped = importlib.resources.files("cert_ray.operations") / _SHIPPED
        return Costs.from_mapping(yaml.safe_load(shipped.read_text(encoding="utf-8")), _SHIPPED)
    cure = "Write one with `python -m tests.bench.bench_growth --write-costs FILE`."
    if not storage.exists(url) or storage.is_folder(url):
        raise InputError(url, "no such file with costs", cure)
    try:
        loaded = yaml.safe_load(storage.read_text(url))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(url, f"not YAML: {error}", cure) from error
    if not isinstance(loaded, dict):
        raise InputError(url, "not a YAML mapping", cure)
    return Costs.from_mapping(loaded, url)


def make_plan(config: PlanConfig, costs: Costs) -> Plan:
    """Predict every stage."""
    return Plan(config, costs, tuple(_plan_stage(stage, config) for stage in costs.stages))


def cores_used(shared_by: str, cores: int, files: float, size_bytes: float) -> int:
    """How many of `cores` a stage can use: one per work unit, one per task of dedup's bands, or only the driver's."""
    unit_bytes = SourceConfig(inputs=("planned",)).unit_bytes_of(round(size_bytes))
    bands = len(band_tasks(MinHashConfig(), round(files)))
    limits = {"units": math.ceil(size_bytes / unit_bytes), "bands": bands, "driver": 1}
    return max(1, min(cores, limits[shared_by]))


def _keys_in_a_task(files: float) -> float:
    """Keys in the largest task of dedup's bands, which `minhash.keys_in_memory` bounds."""
    tasks = band_tasks(MinHashConfig(), round(files))
    return max(len(bands) * files / parts for bands, (_, parts) in tasks)


def _plan_stage(stage: StageCost, config: PlanConfig) -> StagePlan:
    size = (config.files, config.size_bytes)
    used = cores_used(stage.shared_by, config.nodes * config.cores, *size)
    core_seconds = stage.seconds.growing(*size)
    read_bytes, written_bytes = stage.read_bytes.of(*size), stage.written_bytes.of(*size)
    nodes_used = min(config.nodes, used)
    compute_s = core_seconds / used
    worker_files = config.files
    if stage.shared_by == "bands":  # the fewest files with that many keys in a task, which then holds more bands
        worker_files = _keys_in_a_task(config.files) / _keys_in_a_task(1)
    storage_s = (read_bytes + written_bytes) / (nodes_used * config.storage_bytes_per_s)
    return StagePlan(
        name=stage.name,
        seconds=stage.seconds.fixed + max(compute_s, storage_s),
        core_hours=core_seconds / 3600,
        cores_used=used,
        bound_by_storage=storage_s > compute_s,
        read_bytes=read_bytes,
        written_bytes=written_bytes,
        worker_memory_bytes=stage.worker_memory_bytes.of(worker_files, config.size_bytes),
        driver_memory_bytes=stage.driver_memory_bytes.of(*size),
    )


_HEADERS = ("stage", "time", "core-hours", "cores", "read", "written", "worker memory", "driver memory")


def render_plan(plan: Plan) -> str:
    """The plan as an aligned table, its sums, and what it assumes."""
    config, costs = plan.config, plan.costs
    rows = [
        (
            stage.name,
            _duration(stage.seconds) + (" (storage)" if stage.bound_by_storage else ""),
            f"{stage.core_hours:,.1f}",
            str(stage.cores_used),
            _size(stage.read_bytes),
            _size(stage.written_bytes),
            _size(stage.worker_memory_bytes),
            _size(stage.driver_memory_bytes),
        )
        for stage in plan.stages
    ]
    lines = [
        f"{config.files:,.0f} files, {_size(config.size_bytes)}, on {config.nodes} x {config.cores} cores",
        "",
        *_aligned([_HEADERS, *rows]),
        "",
        f"time {_duration(plan.seconds)}; disk {_size(plan.disk_bytes)} beside the input, intermediates included; "
        f"moved {_size(plan.moved_bytes)}; memory of the fullest node {_size(plan.node_memory_bytes)}",
        *_price(plan),
        f"As loose files, which the driver lists, these would take {_size(config.files * LOOSE_FILE_BYTES)} more of "
        "its memory (paths of 80 characters); as tables or archives, next to nothing.",
        "",
        "Assumed: every core is as fast as the measured ones, and none waits for another; "
        f"storage moves {_size(config.storage_bytes_per_s)}/s per node, reads and writes together; "
        "the corpus is cleaned and deduplicated at the measured corpus's rates.",
        f"Measured: {costs.date}, {costs.machine}, {costs.cores} cores, {costs.corpus}, "
        f"{costs.runs} run{'s' if costs.runs > 1 else ''}: {costs.command}",
    ]
    return "\n".join(lines)


def _price(plan: Plan) -> Iterator[str]:
    if (price := plan.config.node_hour_price) is not None:
        yield (
            f"{plan.node_hours:,.1f} node-hours at {price:g}: {plan.node_hours * price:,.2f}, not counting the head, "
            "starting and storage; less with an autoscaler that removes idle nodes"
        )


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) if place == 0 else cell.rjust(width) for place, (cell, width) in enumerate(cells))
        for cells in (list(zip(row, widths, strict=True)) for row in rows)
    ]


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:,.1f} h"


def _size(size_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size_bytes < 1000:
            return f"{size_bytes:.3g} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:,.2f} TB"
