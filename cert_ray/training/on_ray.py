"""Training on a Ray cluster: places the workers, brings checkpoints to storage, starts again after a death.

In: a `TrainConfig`. Out: a `TrainResult`, and the folder of a finished model. `worker` does the work of a rank.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train
import ray.train.collective
from ray._private.state import state  # where alone Ray 2.60 tells of each node
from ray.train.torch import TorchConfig, TorchTrainer

from cert_ray import manifests, storage
from cert_ray.errors import (
    CertRayError,
    ConfigError,
    DiskFullError,
    InputError,
    NotFinishedError,
    NoWholeCheckpointError,
    StorageFullError,
    SupersededError,
    TokenizerMismatchError,
    TrainingDivergedError,
    TrainingFailedError,
    TrainingMemoryError,
)
from cert_ray.manifests import Manifest, ShardReport
from cert_ray.shards.units import attempt
from cert_ray.telemetry import logs
from cert_ray.telemetry.on_ray import count_step
from cert_ray.tokens.encoding import SKETCH_VIEWS
from cert_ray.tokens.shards import pack_digest
from cert_ray.training import checkpoints, inputs, records
from cert_ray.training.actors import Stopped, Verdict
from cert_ray.training.config import TrainConfig
from cert_ray.training.notices import Asked, Reason
from cert_ray.training.records import StepRecord
from cert_ray.training.room import Room
from cert_ray.training.stopping import Stop

_log = logging.getLogger(__name__)

_WATCHER = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
# What `worker` raises on every worker, and would again.
_LASTING = (
    TrainingDivergedError,
    ConfigError,
    InputError,
    TokenizerMismatchError,
    NotFinishedError,
    NoWholeCheckpointError,
    SupersededError,
)
# What it raises on one of them, while the others wait for it, and would again.
_LASTING_OF_ONE = (DiskFullError, StorageFullError, TrainingMemoryError)


@dataclass(frozen=True, slots=True)
class TrainResult:
    """A finished run. Losses are in nats per token."""

    folder: str  # of the exported Hugging Face model
    first_loss: float
    last_loss: float
    held_out_loss: float | None  # None: the pack holds nothing out
    steps: int
    tokens: int  # learned from, repeats counted
    parameters: int
    metrics: str  # URL of loss.jsonl: a records.StepRecord per step
    reused: bool  # finished before by an equal run


def train(config: TrainConfig, *, after_step: Any | None = None) -> TrainResult:
    """Train as `config` says on the connected Ray cluster, going on where an interrupted equal run stopped.

    A finished output of an equal run is returned as it is. `after_step(steps_done, rank)`, picklable, is called on
    every worker after each step.

    Raises:
        KeyboardInterrupt, SystemExit: after Ctrl-C and SIGTERM, with a checkpoint; after a second one at once.
        ConfigError, InputError, NotFinishedError, ...: before any worker starts, when an input cannot be used.
        CheckpointError: when every checkpoint is damaged, or they are another run's.
        TrainingDivergedError: when the loss stops being finite, or spikes for longer than `config.on_spike` allows.
        DiskFullError, StorageFullError: when a disk is full: nothing is tried again.
        TrainingMemoryError: when the memory of a worker does not suffice: nothing is tried again.
        TrainingFailedError: when workers died more than `config.max_failures` times.
        SupersededError: when another run has begun in the output.
    """
    checked = inputs.check(config)
    manifest = inputs.finished(checked)
    if manifest is not None:
        _log.info("%s is finished: nothing to train", checked.config.output)
        return _result(checked.config, manifest, reused=True)
    _check_base(checked.config.base)
    folder = checkpoints.folder_of(checked.config.output)
    checkpoints.check_run(folder, checked.run_digest)
    lacking = inputs.waits_for(checked.config, ray.cluster_resources())
    if lacking is not None:
        _log.warning("%s", lacking)
    several_nodes = lacking is not None or checked.config.min_workers is not None or len(ray.nodes()) > 1
    _log.info("%s: %d steps, workers are starting", checked.config.output, checked.config.steps)  # it takes a while
    begun = attempt(checked.config.output, inputs.STAGE, inputs.VERB, checked.run_digest)
    with begun as this, _RayStop() as stop:
        returned = _fit_to_the_end(checked, folder, {"after_step": after_step, "attempt": this}, several_nodes, stop)
        manifest = _finish(checked, returned)
        if stop.came:  # while the last steps were done
            raise stop.told()
    return _result(checked.config, manifest, reused=False)


def _check_base(base: str) -> None:
    from cert_ray.training.models import check_there  # which imports transformers
    from cert_ray.training.presets import PRESETS

    if base not in PRESETS:
        check_there(base, "base")


def _tidy(folder: str) -> None:
    """Remove unfinished checkpoints below `folder`; the workers check the contents of the others."""
    checkpoints.remove_incomplete(folder)
    if storage.exists(folder):
        # Ray Train's own list of checkpoints refuses to start when one of them was deleted; `worker` looks for itself.
        for entry in storage.list_files(folder):
            if storage.name_of(entry.url.rsplit("/", 1)[0]) == checkpoints.FOLDER_NAME:
                storage.remove(entry.url)


class _RayStop(Stop):
    """Asks by starting an actor: workers look for its name and need not call it. It ends with this object."""

    def __init__(self) -> None:
        super().__init__()
        self.name = f"cert-ray-stop-{uuid.uuid4().hex}"
        self._actor: Any | None = None

    def ask(self) -> None:
        self._actor = ray.remote(num_cpus=0)(Stopped).options(name=self.name).remote()


class _Trainer(TorchTrainer):  # type: ignore[misc]  # Ray Train tells no types
    """Ray Train's trainer, whose own handling of Ctrl-C (it ends the workers) comes second."""

    stop: _RayStop

    def _register_sigint_handler(self, controller: Any) -> None:
        super()._register_sigint_handler(controller)
        self.stop.take_over(signal.SIGINT)


def _fit_to_the_end(
    checked: inputs.Checked, folder: str, options: dict[str, Any], several_nodes: bool, stop: _RayStop
) -> dict[str, Any]:
    """Run the workers, again each time they end early for other nodes; returns worker 0's final result.

    `options`: more of what `_work` takes.
    """
    look_s, workers = checked.config.resize_check_s, 0
    while True:
        _tidy(folder)
        returned = _fit(checked, folder, options | {"look_s": look_s}, several_nodes, stop)
        if "early" not in returned:
            return returned
        reason, step, ended = returned["early"]
        if stop.came:
            _log.warning("stopped after step %d: run the same again to go on", step)
            raise stop.told()
        _log.info("step %d: the %d workers start again, on the nodes that are there", step, ended)
        if reason == "growing":
            # Room that looked free may be promised to others: after a start in vain, look less often.
            look_s = 2 * look_s if ended == workers else checked.config.resize_check_s
        workers = ended if reason == "growing" else 0


def _fit(
    checked: inputs.Checked, folder: str, options: dict[str, Any], several_nodes: bool, stop: _RayStop
) -> dict[str, Any]:
    """Run the workers, possibly on `several_nodes`; returns worker 0's result."""
    config = checked.config
    resources: dict[str, float] = {"CPU": config.cpus_per_worker}
    if config.use_gpu:
        resources["GPU"] = 1
    storage.make_folder(config.output)
    path, filesystem = storage.for_arrow(config.output)
    # A single worker returns its own error, and needs no further process.
    verdict = ray.remote(num_cpus=0)(Verdict).remote() if config.workers > 1 else None
    trainer = _Trainer(
        _work,
        train_loop_config={
            "config": config.model_dump(),
            "run_digest": checked.run_digest,
            "pack_digest": pack_digest(checked.pack),
            "log": logs.inherited(),
            "verdict": verdict,
            "several_nodes": several_nodes,
            "stop": stop.name,
            "resources": resources,
            **options,
        },
        torch_config=TorchConfig(backend="nccl" if config.use_gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.workers if config.min_workers is None else (config.min_workers, config.workers),
            use_gpu=config.use_gpu,
            resources_per_worker=resources,
            elastic_resize_monitor_interval_s=math.inf,  # `Room` looks
        ),
        run_config=ray.train.RunConfig(
            name=storage.name_of(folder),
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=ray.train.FailureConfig(max_failures=config.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=None),  # `worker` removes, after verifying
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),  # our own lines say what happens
        ),
    )
    trainer.stop = stop
    try:
        with nullcontext() if several_nodes else _unwatched():
            returned: dict[str, Any] = trainer.fit().return_value
    except ray.train.TrainingFailedError as error:
        raise _explain(error, config, folder) from error
    if isinstance(returned.get("error"), CertRayError):
        raise returned["error"]
    return returned


def _passed(verdict: Any | None) -> CertRayError | None:
    if verdict is None:
        return None
    try:
        found: CertRayError | None = ray.get(verdict.passed.remote())
    except ray.exceptions.RayActorError:  # gone with its node
        return None
    return found


@contextmanager
def _unwatched() -> Iterator[None]:
    """Saves a process, unless the user wants it: on one node, a departure takes everything along anyway."""
    if _WATCHER in os.environ:
        yield
        return
    os.environ[_WATCHER] = "0"  # Ray Train takes it along when it starts
    try:
        yield
    finally:
        del os.environ[_WATCHER]


def _explain(error: Exception, config: TrainConfig, folder: str) -> CertRayError:
    """A worker's own error if it is one of ours, else what to do about its death."""
    failures = getattr(error, "worker_failures", {})
    for failure in failures.values():
        cause: BaseException | None = failure
        while cause is not None:
            if isinstance(cause, CertRayError):
                return cause
            cause = cause.__cause__ or cause.__context__
    found = checkpoints.newest(folder)
    where = f"step {found[0]}" if found else "the start"
    reason = "; ".join(f"worker {rank}: {_last_line(failure)}" for rank, failure in failures.items())
    return TrainingFailedError(
        f"training stopped after more than {config.max_failures} worker failures: {reason or _last_line(error)}. "
        f"Run the same again to go on from {where}; workers killed for memory want a smaller micro_batch."
    )


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__


def _work(options: dict[str, Any]) -> dict[str, Any]:
    """Entry point of a worker process. Torch and DeepSpeed are imported here, after the device has been chosen."""
    config = TrainConfig.model_validate(options["config"])
    if (passed := _passed(options["verdict"])) is not None:
        return {"error": passed}
    if not config.use_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    # DeepSpeed 0.19 calls collectives that torch 2.13 renamed: nothing that a user can change.
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
    from transformers.utils.logging import disable_progress_bar

    from cert_ray.training import worker

    disable_progress_bar()

    context = ray.train.get_context()
    # Worker 0 tells the steps, and keeps what it tells beside what the driver keeps.
    kept_as = f"train-{storage.name_of(config.output)}" if context.get_world_rank() == 0 else None
    try:
        # Ray Train logs each report at the root logger, under a name that its log level does not cover.
        with logs.warnings_alone(""), logs.taken_over(options["log"], kept_as):
            outcome = worker.run(
                config,
                options["run_digest"],
                rank=context.get_world_rank(),
                world_size=context.get_world_size(),
                report=_report,
                after_step=options["after_step"],
                count=_counter(config),
                pack_digest=options["pack_digest"],
                wait=ray.train.collective.barrier if context.get_world_size() > 1 else None,
                leaving=_leaving if options["several_nodes"] else None,
                asked=_asked(options, config, context.get_world_size()),
                check=options["attempt"].check,
            )
    except _LASTING as error:  # the same on every worker; another start would end the same way
        return {"error": error}
    except _LASTING_OF_ONE as error:
        if context.get_world_size() == 1:
            return {"error": error}
        # Raised, or the others would wait for ever. Ray Train then starts all of them again, and they ask the verdict.
        ray.get(options["verdict"].pass_on.remote(error))
        raise
    if isinstance(outcome, worker.Early):
        # Plain values: for a class of `worker` the driver would have to import torch.
        return {"early": (outcome.reason, outcome.step, context.get_world_size())}
    return {
        "records": outcome.records,
        "parameters": outcome.parameters,
        "files": outcome.files,
        "machines": outcome.machines,
    }


def _counter(config: TrainConfig) -> Callable[[StepRecord], None]:
    """Passes each record to Ray's metrics. The first step after a resume counts no tokens: its record has their sum."""
    model, before = storage.name_of(config.output), None

    def count(record: StepRecord) -> None:
        nonlocal before
        tokens = record.tokens - before if before is not None else record.tokens if record.step == 1 else 0
        before = record.tokens
        count_step(
            model, record.step, config.steps, tokens, record.loss, record.held_out_loss, record.mfu, record.memory_bytes
        )

    return count


def _asked(options: dict[str, Any], config: TrainConfig, world_size: int) -> Asked:
    """Whether the run is to stop, or has room to grow."""
    room = Room(_free_nodes, options["resources"], options["look_s"])
    may_grow = config.min_workers is not None and world_size < config.workers

    def reason() -> Reason | None:
        if _is_there(options["stop"]):
            return "stopped"
        return "growing" if may_grow and room.came() else None

    return reason


def _is_there(actor: str) -> bool:
    try:
        ray.get_actor(actor)
    except (ValueError, ray.exceptions.RayError):  # no such actor; a head that is away, and stops nothing
        return False
    return True


def _free_nodes() -> list[dict[str, float]]:
    """What each node that stays has free; nothing while the head is away."""
    try:
        leaving, free = state.get_draining_nodes(), state.available_resources_per_node()
    except ray.exceptions.RayError:
        return []
    return [resources for node, resources in free.items() if node not in leaving]


def _leaving() -> list[str]:
    info = ray.train.get_preemption_info()
    return [] if info is None else info.preempted_node_ids


def _report(metrics: dict[str, Any], part: Path, name: str) -> None:
    ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(str(part)), checkpoint_dir_name=name)


def _finish(checked: inputs.Checked, returned: dict[str, Any]) -> Manifest:
    """Write the losses, and last the manifest."""
    config, steps = checked.config, list(returned["records"])
    records.write_losses(config, checked.pack, steps)
    view = checked.pack.config.get("view")
    rows = config.steps * config.rows_per_step
    shard = ShardReport(
        shard="model",
        unit_digest=checked.run_digest,
        files=returned["files"],
        rows_read=rows,
        rows_kept=rows,
        counts={"tokens": steps[-1].tokens, "parameters": returned["parameters"]},
    )
    manifest = manifests.summarize(
        inputs.STAGE,
        config,
        checked.inputs_digest,
        [shard],
        notes=_notes(checked, steps, str(view), returned["machines"]),
    )
    manifests.write_manifest(config.output, manifest)
    return manifest


def _notes(checked: inputs.Checked, steps: list[StepRecord], view: str, machines: dict[str, int]) -> dict[str, Any]:
    return {
        "run_digest": checked.run_digest,
        "machines": machines,  # of all workers, with the steps that they did
        "base": checked.config.base,
        **checked.origin,
        "view": view,
        "placeholders": view in SKETCH_VIEWS,  # whether it has met sketches
        "context_tokens": checked.pack.config["context_tokens"],
        "tokenizer_digest": checked.pack.notes["tokenizer_digest"],
        "first_loss": steps[0].loss,
        "last_loss": steps[-1].loss,
        "held_out_loss": steps[-1].held_out_loss,
    }


def _result(config: TrainConfig, manifest: Manifest, *, reused: bool) -> TrainResult:
    return TrainResult(
        folder=config.output,
        first_loss=manifest.notes["first_loss"],
        last_loss=manifest.notes["last_loss"],
        held_out_loss=manifest.notes["held_out_loss"],
        steps=config.steps,
        tokens=manifest.counts["tokens"],
        parameters=manifest.counts["parameters"],
        metrics=storage.join(config.output, records.METRICS_NAME),
        reused=reused,
    )
