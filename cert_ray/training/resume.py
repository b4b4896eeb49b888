"""Where a run begins: anew, or from its newest intact checkpoint, written by any number of workers.

In: the checkpoints below a run's output. Out: a `Start` on every rank. A rank reads only what it needs of a checkpoint
(once, if remote), and verifies it on the way: worker 0's part and its own. If another number of workers wrote it, one
rank of each machine reads all parts.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

import torch

from cert_ray.training import checkpoints, export
from cert_ray.training.config import TrainConfig
from cert_ray.training.deepspeed_engine import Engine, universal_state
from cert_ray.training.records import StepRecord, from_json_lines
from cert_ray.training.scratch import scratch_folder
from cert_ray.training.together import Together

_log = logging.getLogger(__name__)

EPOCHS_NAME = "epochs.json"  # where in the run's rows each segment ends
MACHINES_NAME = "machines.json"  # how many of the steps so far each set of machines did


@dataclass(frozen=True, slots=True)
class Start:
    """The state that a rank continues from."""

    engine: Engine
    records: list[StepRecord] = field(default_factory=list)  # of the steps so far
    ends: list[int] = field(default_factory=list)  # as `Batches` expects them
    machines: dict[str, int] = field(default_factory=dict)  # steps so far by machines


def start(config: TrainConfig, run_digest: str, together: Together, model: torch.nn.Module) -> Start:
    """Every rank calls this with the same model, which becomes the engine's.

    Damaged checkpoints newer than the newest intact one are logged and removed.

    Raises:
        CheckpointError: on every rank, when the newest belongs to another run.
        NoWholeCheckpointError: on every rank, when there are checkpoints and all are damaged.
        DiskFullError: on every rank, when there is no room for a copy of a remote one.
    """
    found = together.decide(lambda: checkpoints.complete_checkpoints(checkpoints.folder_of(config.output)))
    with scratch_folder("resume") as temporary:
        reader = _Reader(config, run_digest, together, temporary)
        newest = checkpoints.newest_readable(found, lambda url: together.everywhere(lambda: reader.fetch(url)))
        if newest is None:
            return Start(Engine(model, config))
        step, checkpoint, damaged = newest
        together.decide(lambda: checkpoints.remove_damaged(damaged))
        engine = reader.engine(checkpoint, model)
        folder, url = checkpoint.folder, checkpoint.url
        records = from_json_lines((folder / export.RECORDS_NAME).read_text(), url)
        ends = json.loads((folder / EPOCHS_NAME).read_text())
        noted = folder / MACHINES_NAME
        machines = json.loads(noted.read_text()) if noted.is_file() else {}  # earlier versions wrote none
    assert len(records) == step, f"{url} holds the records of {len(records)} steps"
    if together.rank == 0:
        _log.info(
            "going on from %s, step %d of %d, written by %d workers, with %d",
            url,
            step,
            config.steps,
            checkpoint.first.world_size,
            together.world_size,
        )
    return Start(engine, records, ends, machines)


@dataclass(frozen=True, slots=True)
class _Fetched:
    """A checkpoint on a local disk, with everything that this rank needs of it."""

    url: str
    first: checkpoints.Part  # worker 0's
    folder: Path


class _Reader:
    """Fetches checkpoints for this rank, and loads them into its engine."""

    def __init__(self, config: TrainConfig, run_digest: str, together: Together, temporary: Path) -> None:
        self._config, self._run_digest, self._together, self._temporary = config, run_digest, together, temporary
        self._shared = together.first_here(temporary)

    def fetch(self, url: str) -> _Fetched:
        """Fetch what this rank needs of the checkpoint at `url`."""
        first, rank = checkpoints.first_part(url, self._run_digest), self._together.rank
        if self._fits(first):
            return self._fetched(url, first, {0, rank} if first.world_size == self._together.world_size else {0})
        return self._fetched(url, first, None if self._is_first_here() else {0})

    def _fits(self, first: checkpoints.Part) -> bool:
        """Whether its state can be loaded without conversion; without ZeRO, all workers have the same state."""
        return first.world_size == self._together.world_size or self._config.zero_stage == 0

    def _is_first_here(self) -> bool:
        return self._shared == self._temporary

    def _fetched(self, url: str, first: checkpoints.Part, ranks: Collection[int] | None) -> _Fetched:
        with checkpoints.full_disk_told(f"a copy of {url}", None, checkpoints.ROOM_FOR_COPIES):
            folder = checkpoints.fetch(url, first, ranks, self._temporary / checkpoints.name_of_step(first.step))
        return _Fetched(url, first, folder)

    def engine(self, checkpoint: _Fetched, model: torch.nn.Module) -> Engine:
        """An engine in the state of `checkpoint`, which another number of workers may have written."""
        if self._fits(checkpoint.first):
            engine = Engine(model, self._config)
            engine.load(checkpoint.folder / export.ENGINE_FOLDER)
            return engine
        converted = self._shared / "universal"
        if self._is_first_here():  # once per machine
            self._convert(checkpoint.folder, converted)
        self._together.wait()
        engine = Engine(model, self._config, universal=True)
        engine.load(converted)
        self._together.wait()  # it is in the folder of the first rank here
        return engine

    def _convert(self, checkpoint: Path, converted: Path) -> None:
        what = f"the checkpoint of another number of workers than {self._together.world_size}, converted,"
        with checkpoints.full_disk_told(what, None, checkpoints.ROOM_FOR_COPIES):
            universal_state(checkpoint / export.ENGINE_FOLDER, converted)
