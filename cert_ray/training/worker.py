"""One rank's work, from the first row to the exported model. In: a config, a started process group. Out: an `Outcome`.

Goes on from the newest checkpoint below the output. What a step reads, and its learning rate, follow from the step's
number alone, so an interrupted run has the same losses as an undisturbed one. The caller brings a checkpoint's parts to
the output's storage (`report`); `on_ray` places the ranks and starts them again.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import socket
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch

from cert_ray import storage
from cert_ray.errors import CertRayError, TrainingDivergedError, TrainingMemoryError
from cert_ray.manifests import WrittenFile
from cert_ray.telemetry.machine import machine
from cert_ray.tokens.shards import PackedTokens
from cert_ray.training import checkpoints, cpu_speed, export, inputs, memory, models, resume
from cert_ray.training.batches import Batch, Batches
from cert_ray.training.compiled import Keep, compiled_code, kind_of
from cert_ray.training.config import TrainConfig
from cert_ray.training.determinism import deterministic_kernels
from cert_ray.training.loggers import Tell, step_loggers
from cert_ray.training.model_card import run_facts
from cert_ray.training.notices import Asked, Leaving, Notices, Reason
from cert_ray.training.records import (
    StepRecord,
    described,
    progress_line,
    steps_by_machines,
    to_json_lines,
    write_losses,
)
from cert_ray.training.schedule import learning_rate
from cert_ray.training.scratch import remove_left, scratch_folder
from cert_ray.training.stability import spike_limit, spiking_steps
from cert_ray.training.together import Together, Wait
from cert_ray.training.utilization import flops_per_token, peak_flops, utilization

_log = logging.getLogger(__name__)

_T = TypeVar("_T")

_NO_ROOM = (
    "Free some, set TMPDIR, or lower keep_checkpoints, and run the same again: it goes on from the checkpoint before."
)
_QUIET_S = 10.0  # after so long without a line, a step logs one, due or not; assumed to be a reader's patience

# Brings this rank's part of a checkpoint to the output's storage: (metrics, local folder, the checkpoint's name). Every
# rank calls it.
Report = Callable[[dict[str, Any], Path, str], None]
AfterStep = Callable[[int, int], None]  # (steps done, rank)
Check = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a finished run did; `files` and `records` are empty except on rank 0."""

    records: tuple[StepRecord, ...]
    parameters: int
    machines: dict[str, int]  # steps by the machines that did them, in the order in which these came
    files: tuple[WrittenFile, ...]


@dataclass(frozen=True, slots=True)
class Early:
    """A run that ended before its last step, with a checkpoint of the last step done."""

    step: int
    reason: Reason


def run(
    config: TrainConfig,
    run_digest: str,
    rank: int,
    world_size: int,
    report: Report,
    after_step: AfterStep | None = None,
    count: Tell | None = None,
    pack_digest: str | None = None,
    wait: Wait | None = None,
    leaving: Leaving | None = None,
    asked: Asked | None = None,
    check: Check = lambda: None,
) -> Outcome | Early:
    """Train to the last step, checkpoint, and let rank 0 export. Every rank of the process group calls this.

    Args:
        count: gets every record on rank 0, beside the loggers of `config`.
        pack_digest: of the pack that the run began with, which may have been replaced since; None: the present pack's.
        wait: as in `Together`.
        leaving, asked: called between steps. If a node leaves, or there is a reason, the run ends with a checkpoint.
        check: called by rank 0 at the start and before anything at the output changes; may raise `SupersededError`.

    Raises:
        SupersededError: on every rank, as `check` raises it.
        ConfigError, InputError, TokenizerMismatchError, NotFinishedError: on every rank, when what the run starts from
            cannot be used on one of them.
        ConfigError: on every rank, when the model cannot be trained as `config.deterministic` asks.
        TrainingDivergedError: on every rank, when a step's loss is not finite, or spikes past the policy's patience.
        TrainingMemoryError: on the rank whose memory does not suffice.
        CheckpointError: on every rank, when what was written cannot be read back, or is another run's.
        NoWholeCheckpointError: on every rank, when every checkpoint is damaged.
        DiskFullError, StorageFullError: on one rank at least, when its disk, or that of the output, is full.
    """
    torch.set_num_threads(config.cpus_per_worker)
    remove_left()
    if rank == 0 and config.precision == "bf16" and not config.use_gpu:
        _warn_of_slow_bf16()
    kernels = deterministic_kernels() if config.deterministic else nullcontext()
    with kernels, scratch_folder("base") as copies:  # gigabytes, where the base is a remote one
        together = Together(rank, world_size, wait)
        notices = Notices(leaving, asked, together)
        return _run(config, run_digest, together, report, after_step, count, pack_digest, notices, check, copies)


def _warn_of_slow_bf16() -> None:
    speed = cpu_speed.measure()
    if speed["bf16"] < speed["fp32"]:
        _log.warning(
            "precision bf16: this CPU multiplies %.0f GFLOP/s a thread in bf16 and %.0f in fp32, so fp32 trains faster",
            speed["bf16"] / 1e9,
            speed["fp32"] / 1e9,
        )


def _run(
    config: TrainConfig,
    run_digest: str,
    together: Together,
    report: Report,
    after_step: AfterStep | None,
    count: Tell | None,
    pack_digest: str | None,
    notices: Notices,
    check: Check,
    copies: Path,
) -> Outcome | Early:
    together.decide(check)
    workers_here = together.gathered(socket.gethostname()).count(socket.gethostname())
    packed = together.everywhere(lambda: _open(config, pack_digest))
    loaded = _load(config, packed, together, copies)
    parameters = models.parameter_count(loaded.model)
    trainer: _Rank | None = None
    try:
        with ExitStack() as stack:
            keep_compiled = stack.enter_context(_compiled(config, loaded.model, packed))
            trainer = _Rank(config, run_digest, together, packed, loaded, report, notices, check)
            first = len(trainer.records) + 1
            tells = _tells(config, run_digest, together.rank, first)
            tell = together.everywhere(lambda: stack.enter_context(tells))
            rows = stack.enter_context(closing(trainer.rows()))
            for record in trainer.steps(rows):
                if record.step == first or record.held_out_loss is not None:  # the steps that may compile
                    keep_compiled()
                tell(record)
                if count is not None and together.rank == 0:
                    count(record)
                if after_step is not None:
                    after_step(record.step, together.rank)
    except TrainingDivergedError:
        if together.rank == 0 and trainer is not None:
            try:
                trainer.write_losses()
            except (OSError, CertRayError) as error:  # what the run ends with is the divergence
                _log.warning("the losses cannot be written: %s", error)
        raise
    except RuntimeError as error:  # of which torch.OutOfMemoryError is one
        if not _is_out_of_memory(error):
            raise
        size = memory.measure(loaded.model.config, config.precision, packed.context_tokens)
        memory_bytes = _memory_bytes(config, workers_here)
        step = "before the first step: " if trainer is None else f"step {len(trainer.records) + 1}: "
        raise TrainingMemoryError(step + memory.explain_shortage(size, config, memory_bytes)) from error
    if trainer.early is not None:
        return trainer.early
    files: tuple[WrittenFile, ...] = ()
    if together.rank == 0:
        last = storage.join(checkpoints.folder_of(config.output), checkpoints.name_of_step(config.steps))
        check()
        _log.info("exporting %s", last)
        files = export.export_checkpoint(last, config.output)
    # Only rank 0's records: from 16 workers, those of 100,000 steps would reach the driver sixteen times.
    return Outcome(tuple(trainer.records) if together.rank == 0 else (), parameters, trainer.machines, files)


def _open(config: TrainConfig, pack_digest: str | None) -> PackedTokens:
    with checkpoints.full_disk_told(f"a copy of {config.tokens}", None, checkpoints.ROOM_FOR_COPIES):
        packed = PackedTokens.open(config.tokens, verify=False)  # the caller did, once
    if pack_digest is not None:
        inputs.check_same_pack(config, packed.manifest, pack_digest)
    return packed


def _load(config: TrainConfig, packed: PackedTokens, together: Together, own: Path) -> models.Loaded:
    """The model, on every rank. The first rank of each machine copies remote files of it into its `own` folder."""
    copies = together.first_here(own)

    def with_room(work: Callable[[], _T]) -> _T:
        what = f"a copy of {config.base} or its tokenizer"
        with checkpoints.full_disk_told(what, None, checkpoints.ROOM_FOR_COPIES):
            return work()

    together.everywhere(lambda: with_room(lambda: models.fetch(config, own)) if copies == own else None)
    return together.everywhere(lambda: with_room(lambda: models.load(config, packed, copies)))


def _tells(config: TrainConfig, run_digest: str, rank: int, first: int) -> AbstractContextManager[Tell]:
    """The run's loggers, on rank 0."""
    if rank == 0 and config.loggers:
        return step_loggers(config, run_digest, first)
    return nullcontext(lambda _: None)


def _compiled(config: TrainConfig, model: Any, packed: PackedTokens) -> AbstractContextManager[Keep]:
    if not config.compile:
        return nullcontext(lambda: None)
    return compiled_code(kind_of(config, model, packed.context_tokens))


def _is_out_of_memory(error: RuntimeError) -> bool:
    # By its message: torch.OutOfMemoryError is only torch's allocator's; the driver's and NCCL's have other types.
    return any(words in str(error) for words in ("out of memory", "can't allocate memory"))  # GPU, CPU


def _memory_bytes(config: TrainConfig, workers_here: int) -> float:
    """The memory of a worker: its GPU's, or its share of this machine's."""
    if config.use_gpu:
        return float(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    return psutil.virtual_memory().total / workers_here


def _memory_in_use(config: TrainConfig) -> int:
    """The most ever allocated on this worker's GPU; without a GPU, what the process holds now."""
    return torch.cuda.max_memory_allocated() if config.use_gpu else psutil.Process().memory_info().rss


class _Rank:
    """The state of one rank: its engine, its rows, and the records so far."""

    def __init__(
        self,
        config: TrainConfig,
        run_digest: str,
        together: Together,
        packed: PackedTokens,
        loaded: models.Loaded,
        report: Report,
        notices: Notices,
        check: Check,
    ) -> None:
        self._config, self._run_digest, self._together = config, run_digest, together
        self._rank, self._world_size = together.rank, together.world_size
        self._loaded, self._report, self._check = loaded, report, check
        self._packed = packed
        # Read now, because a base may be gone when a checkpoint is due.
        self._facts = together.everywhere(lambda: run_facts(config, packed.manifest))
        self._token_flops = flops_per_token(loaded.model, packed.context_tokens)  # before ZeRO 3 splits the weights
        self._peak_flops = peak_flops(config.precision) if config.use_gpu else None
        start = resume.start(config, run_digest, together, loaded.model)
        self._engine, self.records = start.engine, start.records
        self._earlier, self._started_at = start.machines, len(start.records)
        self._batches = Batches(packed, config, together.rank, together.world_size, start.ends)
        if self._rank == 0:
            self._tell_epochs()
        self._here = described(together.gathered(machine()))
        self._notices = notices
        self.early: Early | None = None

    @property
    def machines(self) -> dict[str, int]:
        """Steps by the machines that did them. A step done again counts for the machine that redid it."""
        return steps_by_machines(self._earlier, self._here, len(self.records) - self._started_at)

    def rows(self) -> Generator[tuple[int, list[Batch]]]:
        """The rows of the steps up to the last one, with their epochs. Close it after use."""
        return self._batches.read_ahead(len(self.records), self._config.steps)

    def steps(self, rows: Iterator[tuple[int, list[Batch]]]) -> Iterator[StepRecord]:
        """Train on `rows` to the last step, or end `early`. Gives a record per step, after the step's checkpoint."""
        config = self._config
        lines = _Lines(config, self.records[-1].tokens if self.records else 0, self._utilization)
        reason: Reason | None = None  # to end early
        owed = False  # a checkpoint that a spike put off
        for step in range(len(self.records), config.steps):
            record = self._step(step, rows)
            done = step + 1
            if done == config.steps or (config.eval_every_steps and done % config.eval_every_steps == 0):
                record = record.model_copy(update={"held_out_loss": self._held_out_loss()})
            self.records.append(record)
            if self._rank == 0:
                lines.show(record)
            every = config.checkpoint_every_steps
            reason = reason or self._notices.came(done)
            owed = owed or bool(every and done % every == 0) or reason is not None
            saves = (not self._spikes() and owed) or done == config.steps
            if saves:
                self._save(done)
                owed = False
            yield record
            if saves and reason is not None and done < config.steps:
                self.early = Early(done, reason)
                return

    def write_losses(self) -> None:
        """Write the records so far to the output, as a finished run does."""
        write_losses(self._config, self._packed.manifest, self.records)

    def _tell_epochs(self) -> None:
        config, epoch = self._config, self._batches.rows_of_an_epoch
        told = f"a step reads {config.rows_per_step} rows, an epoch has {epoch}: {config.steps} steps are "
        told += f"{config.steps * config.rows_per_step / epoch:.1f} epochs"
        if config.rows_per_step <= epoch:
            _log.info("%s", told)
        else:
            _log.warning("%s, and each reads rows again: lower micro_batch, or pack more documents", told)

    def _spikes(self) -> bool:
        """Whether the last step's loss is part of a spike. Raises when the policy's patience, or the run, is over."""
        policy = self._config.on_spike
        if policy is None:
            return False
        losses = [record.loss for record in self.records[-(policy.window_steps + policy.patience_steps + 1) :]]
        count = spiking_steps(losses, policy)
        if count == 0:
            return False
        step = len(self.records)
        limit = spike_limit(losses[:-1], policy)
        if policy.action == "stop" and (count == policy.patience_steps or step == self._config.steps):
            spiking = f"losses of {count} steps in a row, the last" if count > 1 else "loss of the run's last step,"
            raise self._diverged(
                f"step {step}: the {spiking} {losses[-1]:.4f} nats/token, {'are' if count > 1 else 'is'} above the "
                f"limit ({limit:.4f}) that the {policy.window_steps} steps before set",
                "To let the run go on from there as it is, set on_spike.action to warn.",
            )
        reached = count == policy.patience_steps and spiking_steps(losses[:-1], policy) < count  # it counts no further
        if self._rank == 0 and (count == 1 or reached):
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

    def _step(self, step: int, rows: Iterator[tuple[int, list[Batch]]]) -> StepRecord:
        config = self._config
        started = time.perf_counter()
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
        epoch, batches = next(rows)
        loss, tokens, norm = self._engine.train_step(batches, rate)
        if not math.isfinite(loss):
            raise self._diverged(f"step {step + 1}: the loss is {loss}", "")
        # In fp16, DeepSpeed skips a step whose gradients overflow, and lowers the scale for the next.
        if norm is not None and not math.isfinite(norm) and config.precision != "fp16":
            raise self._diverged(f"step {step + 1}: the gradient's norm is {norm}", "")
        before = self.records[-1].tokens if self.records else 0
        speed = tokens / (time.perf_counter() - started)
        return StepRecord(
            step=step + 1,
            epoch=epoch,
            loss=loss,
            learning_rate=rate,
            gradient_norm=norm,
            tokens=before + tokens,
            tokens_per_s=round(speed, 1),
            mfu=self._utilization(speed),
            memory_bytes=_memory_in_use(config),
        )

    def _utilization(self, tokens_per_s: float) -> float | None:
        return utilization(tokens_per_s, self._token_flops, self._peak_flops, self._world_size)

    def _held_out_loss(self) -> float | None:
        """Mean nats per token over the held-out rows, or `None` where there are none."""
        nats, tokens = self._engine.summed_eval_loss(self._batches.held_out())
        return nats / tokens if tokens else None

    def _save(self, done: int) -> None:
        config = self._config
        name = checkpoints.name_of_step(done)
        folder_url = storage.join(checkpoints.folder_of(config.output), name)
        self._together.decide(lambda: self._clear(folder_url))
        if self._rank == 0:
            _log.info("writing %s, and reading it back", folder_url)
        with checkpoints.full_disk_told(name, config.output, _NO_ROOM), scratch_folder("checkpoint") as folder:
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
        self._together.wait()  # every part has arrived
        # All read back at once, each another's part: with two machines the other's, which is not in this one's cache.
        other = (self._rank + self._world_size // 2) % self._world_size
        self._together.everywhere(lambda: checkpoints.verify(folder_url, only_rank=other))
        self._together.decide(lambda: self._complete(name))

    def _clear(self, folder_url: str) -> None:
        """Remove what a kill left at the checkpoint's place: it may hold parts of more workers than there are now."""
        self._check()
        if storage.exists(folder_url):
            storage.remove(folder_url)

    def _complete(self, name: str) -> None:
        """Mark a checkpoint that was read back as complete, and remove older ones."""
        self._check()
        config = self._config
        folder = checkpoints.folder_of(config.output)
        checkpoint = storage.join(folder, name)
        checkpoints.mark_complete(checkpoint, self._world_size)
        self.write_losses()
        losses = {record.step: record.held_out_loss for record in self.records if record.held_out_loss is not None}
        checkpoints.prune(folder, config.keep_checkpoints, losses if config.keep_best_checkpoint else None)

    def _save_shared(self, folder: Path) -> None:
        self._loaded.model.config.save_pretrained(folder / export.MODEL_FOLDER)
        (folder / export.TOKENIZER_FOLDER).mkdir()
        for name in models.TOKENIZER_FILES:
            source = self._loaded.tokenizer_folder / name
            if source.is_file():
                shutil.copyfile(source, folder / export.TOKENIZER_FOLDER / name)
        (folder / export.RECORDS_NAME).write_text(to_json_lines(self.records))
        (folder / export.FACTS_NAME).write_text(self._facts.model_dump_json())
        (folder / resume.EPOCHS_NAME).write_text(json.dumps(self._batches.ends))
        (folder / resume.MACHINES_NAME).write_text(json.dumps(self.machines))


class _Lines:
    """Logs a line every `log_every_steps`, more often if steps are slow, with the speed since the previous line."""

    def __init__(self, config: TrainConfig, tokens: int, mfu: Callable[[float], float | None]) -> None:
        self._config, self._tokens, self._since, self._mfu = config, tokens, time.perf_counter(), mfu

    def show(self, record: StepRecord) -> None:
        """Log `record` when a line is due."""
        due = record.step % self._config.log_every_steps == 0 or record.step in (1, self._config.steps)
        now = time.perf_counter()
        if not due and record.held_out_loss is None and now - self._since < _QUIET_S:
            return
        speed = (record.tokens - self._tokens) / (now - self._since)
        _log.info("%s", progress_line(record, self._config.steps, speed, self._mfu(speed)))
        self._since, self._tokens = now, record.tokens
