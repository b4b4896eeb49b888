"""One rank's work, from the first row to the exported model. In: a config, a started process group. Out: an `Outcome`.

Goes on from the newest checkpoint below the output; what a step reads and its learning rate follow from the step's
number alone, so an interrupted run gives the losses of an undisturbed one. How a checkpoint's parts reach the output's
storage is the caller's (`report`); placing ranks and starting again are `on_ray`'s.
"""

from __future__ import annotations

import logging
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
import torch

from cert_ray import storage
from cert_ray.errors import CheckpointError, InputError, TrainingDivergedError, TrainingMemoryError
from cert_ray.manifests import WrittenFile
from cert_ray.tokens.packing import plan_rows
from cert_ray.tokens.shards import PackedTokens
from cert_ray.training import checkpoints, export, memory, models
from cert_ray.training.config import TrainConfig
from cert_ray.training.deepspeed_engine import Engine
from cert_ray.training.loggers import Tell, step_loggers
from cert_ray.training.records import StepRecord, from_json_lines, progress_line, to_json_lines
from cert_ray.training.sampling import IntArray, Rows, RowStream, epoch_documents, shuffled_documents, step_positions
from cert_ray.training.schedule import learning_rate
from cert_ray.training.stability import spike_limit, spiking_steps

_log = logging.getLogger(__name__)

_T = TypeVar("_T")

Batch = tuple[torch.Tensor, torch.Tensor]  # ids and mask, [B, T + 1]
# Brings this rank's part (a local folder) of the checkpoint of that name to the output's storage; every rank calls it.
Report = Callable[[dict[str, Any], Path, str], None]
AfterStep = Callable[[int, int], None]  # (steps done, rank)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a finished run did; `files` are rank 0's alone."""

    records: tuple[StepRecord, ...]
    parameters: int
    files: tuple[WrittenFile, ...]


def run(
    config: TrainConfig,
    run_digest: str,
    rank: int,
    world_size: int,
    report: Report,
    after_step: AfterStep | None = None,
) -> Outcome:
    """Train to the last step, checkpoint, and let rank 0 export. Every rank of the process group calls this.

    Raises:
        TrainingDivergedError: on every rank, when a step's loss is not finite, or spikes past the policy's patience.
        TrainingMemoryError: on the rank whose memory does not suffice.
        CheckpointError: on every rank, when what was written cannot be read back, or cannot be gone on from.
    """
    torch.set_num_threads(config.cpus_per_worker)
    packed = PackedTokens.open(config.tokens, verify=False)  # the caller did, once
    loaded = models.load(config, packed)
    parameters = models.parameter_count(loaded.model)
    trainer = _Rank(config, run_digest, rank, world_size, packed, loaded, report)
    try:
        with _tells(config, run_digest, rank, len(trainer.records)) as tell:
            for record in trainer.steps():
                tell(record)
                if after_step is not None:
                    after_step(record.step, rank)
    except RuntimeError as error:  # of which torch.OutOfMemoryError is one
        if not _is_out_of_memory(error):
            raise
        size = memory.measure(loaded.model.config, config.precision, packed.context_tokens)
        step = f"step {len(trainer.records) + 1}: "
        raise TrainingMemoryError(step + memory.explain_shortage(size, config, _memory_bytes(config))) from error
    files: tuple[WrittenFile, ...] = ()
    if rank == 0:
        last = storage.join(checkpoints.folder_of(config.output), checkpoints.name_of_step(config.steps))
        files = export.export_checkpoint(last, config.output)
    return Outcome(tuple(trainer.records), parameters, files)


def _tells(config: TrainConfig, run_digest: str, rank: int, done: int) -> AbstractContextManager[Tell]:
    """The run's loggers, on rank 0."""
    if rank == 0 and config.loggers:
        return step_loggers(config, run_digest, done + 1)
    return nullcontext(lambda _: None)


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)  # GPU, CPU


def _memory_bytes(config: TrainConfig) -> float:
    """What a worker has: its GPU's memory, or its share of this machine's."""
    if config.use_gpu:
        return float(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    return psutil.virtual_memory().total / config.workers


class _Rank:
    """The state of one rank: its engine, its rows, and the records so far."""

    def __init__(
        self,
        config: TrainConfig,
        run_digest: str,
        rank: int,
        world_size: int,
        packed: PackedTokens,
        loaded: models.Loaded,
        report: Report,
    ) -> None:
        self._config, self._run_digest, self._rank, self._world_size = config, run_digest, rank, world_size
        self._loaded, self._report = loaded, report
        self._rows = training_rows(packed, config)
        self._held_out = held_out_rows(packed)
        self._engine = Engine(loaded.model, config)
        self.records: list[StepRecord] = []
        self._resume()

    def steps(self) -> Iterator[StepRecord]:
        """Train to the last step; a record per step, after its checkpoint where it has one."""
        config = self._config
        lines = _Lines(config, self.records[-1].tokens if self.records else 0)
        owed = False  # a checkpoint that a spike put off
        for step in range(len(self.records), config.steps):
            record = self._step(step)
            done = step + 1
            if done == config.steps or (config.eval_every_steps and done % config.eval_every_steps == 0):
                record = record.model_copy(update={"held_out_loss": self._held_out_loss()})
            self.records.append(record)
            if self._rank == 0:
                lines.show(record)
            every = config.checkpoint_every_steps
            owed = owed or bool(every and done % every == 0)
            if (not self._spikes() and owed) or done == config.steps:
                self._save(done)
                owed = False
            yield record

    def _spikes(self) -> bool:
        """Whether the last step's loss is part of a spike; raises once the policy's patience is over."""
        policy = self._config.on_spike
        if policy is None:
            return False
        losses = [record.loss for record in self.records[-(policy.window_steps + policy.patience_steps) :]]
        count = spiking_steps(losses, policy)
        if count == 0:
            return False
        step = len(self.records)
        limit = spike_limit(losses[:-1], policy)
        if count == policy.patience_steps and policy.action == "stop":
            raise self._diverged(
                f"step {step}: the losses of {count} steps in a row, the last {losses[-1]:.4f} nats/token, are above "
                f"the limit ({limit:.4f}) that the {policy.window_steps} steps before set",
                "To let the run go on from there as it is, set on_spike.action to warn.",
            )
        if self._rank == 0 and count in (1, policy.patience_steps):
            _log.warning(
                "step %d: the loss spikes, %.4f nats/token (limit %.4f); no checkpoint is written until it has fallen",
                step,
                losses[-1],
                limit,
            )
        return True

    def _diverged(self, what: str, more: str) -> TrainingDivergedError:
        config = self._config
        found = checkpoints.newest(checkpoints.folder_of(config.output))
        last = "There is no checkpoint." if found is None else f"The last good checkpoint is {found[1]}: export it and "
        if found is not None:
            last += "start from that folder, into another output, with a lower rate."
        return TrainingDivergedError(
            f"{what}. Lower learning_rate ({config.learning_rate}), raise warmup_steps ({config.warmup_steps}), or use "
            f"precision fp32 or bf16 (now {config.precision}). {last} {more}".rstrip()
        )

    def _step(self, step: int) -> StepRecord:
        config = self._config
        started = time.perf_counter()
        positions = step_positions(step, self._rank, self._world_size, config.micro_batch, config.gradient_accumulation)
        rate = learning_rate(
            step,
            config.steps,
            config.warmup_steps,
            config.learning_rate,
            config.final_learning_rate_share,
            config.schedule,
            config.decay_share,
        )
        torch.manual_seed((config.seed << 40) ^ (step * self._world_size + self._rank))  # dropout, where a base has it
        loss, tokens, norm = self._engine.train_step([_tensors(*self._rows.read(row)) for row in positions], rate)
        if not math.isfinite(loss):
            raise self._diverged(f"step {step + 1}: the loss is {loss}", "")
        # In fp16 a step whose gradients overflow is left out, and the next one is scaled down.
        if norm is not None and not math.isfinite(norm) and config.precision != "fp16":
            raise self._diverged(f"step {step + 1}: the gradient's norm is {norm}", "")
        epoch, _ = self._rows.locate(step * config.rows_per_step)
        before = self.records[-1].tokens if self.records else 0
        return StepRecord(
            step=step + 1,
            epoch=epoch,
            loss=loss,
            learning_rate=rate,
            gradient_norm=norm,
            tokens=before + tokens,
            tokens_per_s=round(tokens / (time.perf_counter() - started), 1),
        )

    def _held_out_loss(self) -> float | None:
        """Mean nats per token over the held-out rows, or `None` where there are none."""
        if len(self._held_out) == 0:
            return None
        count = min(len(self._held_out), self._config.eval_rows or len(self._held_out))
        nats, tokens = self._engine.summed_eval_loss(self._eval_batches(count))
        return nats / tokens if tokens else None

    def _eval_batches(self, count: int) -> list[Batch]:
        """This rank's share of the first `count` held-out rows; all ranks have as many batches, some masked."""
        size = self._config.micro_batch
        batches = []
        for first in range(self._rank * size, _round_up(count, size * self._world_size), size * self._world_size):
            indices = np.arange(first, first + size)
            ids, mask = _read(self._held_out, np.minimum(indices, count - 1))
            mask[indices >= count] = False
            batches.append(_tensors(ids, mask))
        return batches

    def _save(self, done: int) -> None:
        config = self._config
        name = checkpoints.name_of_step(done)
        with tempfile.TemporaryDirectory(prefix="cert-ray-checkpoint-") as temporary:
            folder = Path(temporary)
            self._engine.save(folder / export.ENGINE_FOLDER)
            if self._rank == 0:
                self._save_shared(folder)
            checkpoints.seal_part(
                folder,
                step=done,
                rank=self._rank,
                world_size=self._world_size,
                zero_stage=config.zero_stage,
                run_digest=self._run_digest,
            )
            self._report(self.records[-1].model_dump(), folder, name)
        self._engine.barrier()  # every part has arrived
        self._decide(lambda: self._complete(name))

    def _complete(self, name: str) -> None:
        """Read the checkpoint back; only then it counts, and only then older ones go."""
        config = self._config
        folder = checkpoints.folder_of(config.output)
        checkpoint = storage.join(folder, name)
        checkpoints.verify(checkpoint)
        checkpoints.mark_complete(checkpoint, self._world_size)
        losses = {record.step: record.held_out_loss for record in self.records if record.held_out_loss is not None}
        checkpoints.prune(folder, config.keep_checkpoints, losses if config.keep_best_checkpoint else None)

    def _decide(self, decision: Callable[[], _T]) -> _T:
        """What rank 0 finds by `decision`, on every rank; its error is raised on every rank too."""
        answer: list[Any] = [None]
        if self._rank == 0:
            try:
                answer = [decision()]
            except CheckpointError as error:
                answer = [error]
        torch.distributed.broadcast_object_list(answer, src=0)
        if isinstance(answer[0], CheckpointError):
            raise answer[0]
        found: _T = answer[0]
        return found

    def _save_shared(self, folder: Path) -> None:
        self._loaded.model.config.save_pretrained(folder / export.MODEL_FOLDER)
        (folder / export.TOKENIZER_FOLDER).mkdir()
        for name in models.TOKENIZER_FILES:
            source = self._loaded.tokenizer_folder / name
            if source.is_file():
                shutil.copyfile(source, folder / export.TOKENIZER_FOLDER / name)
        (folder / export.RECORDS_NAME).write_text(to_json_lines(self.records))

    def _resume(self) -> None:
        folder_url = checkpoints.folder_of(self._config.output)
        found = self._decide(lambda: checkpoints.newest_whole(folder_url, self._run_digest))
        if found is None:
            return
        step, url = found
        checkpoints.verify(url, self._run_digest, only_rank=self._rank)
        with tempfile.TemporaryDirectory(prefix="cert-ray-resume-") as temporary:
            folder = export.local_copy(url, Path(temporary) / "checkpoint")
            self._engine.load(folder / export.ENGINE_FOLDER)
            self.records = from_json_lines((folder / export.RECORDS_NAME).read_text(), url)
        assert len(self.records) == step, f"{url} holds the records of {len(self.records)} steps"
        if self._rank == 0:
            _log.info("going on from %s, step %d of %d", url, step, self._config.steps)


class _Lines:
    """Log lines every `log_every_steps`, with the speed since the line before."""

    def __init__(self, config: TrainConfig, tokens: int) -> None:
        self._config, self._tokens, self._since = config, tokens, time.perf_counter()

    def show(self, record: StepRecord) -> None:
        """Log `record` when a line is due."""
        due = record.step % self._config.log_every_steps == 0 or record.step in (1, self._config.steps)
        if not due and record.held_out_loss is None:
            return
        now = time.perf_counter()
        speed = (record.tokens - self._tokens) / (now - self._since)
        _log.info("%s", progress_line(record, self._config.steps, speed))
        self._since, self._tokens = now, record.tokens


def training_rows(packed: PackedTokens, config: TrainConfig) -> RowStream:
    """The rows to train on, of the documents that are not held out.

    Raises:
        InputError: when there is no such document, or none with a positive weight.
    """
    ordinals = np.flatnonzero(~packed.documents.held_out)
    weights = packed.documents.weight[ordinals]
    if len(ordinals) == 0 or (config.resampling == "weighted" and not np.any(weights > 0)):
        raise InputError(
            config.tokens,
            f"none of its {len(packed)} documents can be trained on (held out, or without weight)",
            "Pack more documents, or lower the held-out fraction.",
        )

    def plan_epoch(epoch: int) -> Rows:
        if config.resampling == "weighted":
            drawn = epoch_documents(weights, config.seed, epoch)
        else:
            drawn = shuffled_documents(len(ordinals), config.seed, epoch)
        return plan_rows(packed, ordinals[drawn], packed.context_tokens)

    return RowStream(plan_epoch, config.seed)


def held_out_rows(packed: PackedTokens) -> Rows:
    """The rows of the held-out documents, each document once, in order."""
    return plan_rows(packed, np.flatnonzero(packed.documents.held_out), packed.context_tokens)


def _read(rows: Rows, indices: IntArray) -> tuple[IntArray, Any]:
    found = [rows.row(int(index)) for index in indices]
    return np.stack([ids for ids, _ in found]), np.stack([mask for _, mask in found])


def _tensors(ids: Any, mask: Any) -> Batch:
    return torch.from_numpy(ids), torch.from_numpy(mask)


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
