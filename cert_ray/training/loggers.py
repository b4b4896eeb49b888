"""Sends a run's steps to TensorBoard, Weights & Biases or MLflow, as the recipe says, besides the log.

In: a `TrainConfig` and `StepRecord`s, on worker 0. Out: events in the tools' own stores, by their own packages:

    tensorboard   OUTPUT/tensorboard, by tensorboardX, which Ray installs; needs a local or shared disk
    wandb         project "cert-ray"; WANDB_PROJECT, WANDB_MODE=offline etc. work as its documentation says
    mlflow        experiment "cert-ray"; MLFLOW_TRACKING_URI, else sqlite below OUTPUT/mlflow

A run that continues from a checkpoint continues in the same place. TensorBoard drops what came after the checkpoint.
The other two find their run by its digest, and are not sent again what they have: the same steps have the same losses.
Weights & Biases offline does not know earlier runs, and writes a file per start, all with one run id. There, equal
options are one run, whatever their output. `loss.jsonl` and `loss.png` are always written.

A logger must not cost a run: one that cannot begin ends a run only at its first step. Later, its errors become a
warning, and it gets nothing more until the run starts again.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import TracebackType
from typing import Any, Self

from cert_ray import storage
from cert_ray.errors import ConfigError
from cert_ray.training.config import LoggerName, TrainConfig
from cert_ray.training.records import StepRecord

_log = logging.getLogger(__name__)

Tell = Callable[[StepRecord], None]

_PACKAGES: dict[LoggerName, str] = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow"}
_UNITS = {
    "loss": "loss_nats_per_token",
    "held_out_loss": "held_out_loss_nats_per_token",
    "tokens_per_s": "tokens_per_second",
}
_PROJECT = "cert-ray"


def check_installed(names: Sequence[LoggerName]) -> None:
    """Raise `ConfigError` when the package of one of `names` is missing."""
    missing = [name for name in names if importlib.util.find_spec(_PACKAGES[name]) is None]
    if missing:
        extras = ",".join(missing)
        raise ConfigError(
            f"loggers: {', '.join(missing)} named, but not installed: pip install 'cert-ray[{extras}]' on every node, "
            "or take it out of the recipe"
        )


@contextmanager
def step_loggers(config: TrainConfig, run_digest: str, first_step: int) -> Iterator[Tell]:
    """Yield a function that sends a record to every logger of `config`; `first_step` is the step of the first record.

    Raises:
        ConfigError: when a logger's package is missing, or cannot write where the run writes, or `first_step` is 1 and
            a logger cannot begin.
    """
    check_installed(config.loggers)
    with ExitStack() as stack:
        tells = [
            stack.enter_context(_Expendable(name, _OPEN[name](config, run_digest, first_step), first_step > 1))
            for name in config.loggers
        ]

        def tell(record: StepRecord) -> None:
            for one in tells:
                one(record)

        yield tell


class _Expendable:
    """A logger that cannot end a run under way: its first error becomes a warning, and it is no longer used."""

    def __init__(self, name: LoggerName, opens: AbstractContextManager[Tell], under_way: bool) -> None:
        self._name, self._opens, self._under_way = name, opens, under_way
        self._tell: Tell | None = None

    def __enter__(self) -> Self:
        try:
            self._tell = self._opens.__enter__()
        except ConfigError:
            raise
        except Exception as error:  # from the tool or its server
            if not self._under_way:
                raise ConfigError(
                    f"loggers: {self._name} cannot begin: {_said(error)}. Set it up, or take it out of the recipe."
                ) from error
            self._let_go(error)
        return self

    def __call__(self, record: StepRecord) -> None:
        if self._tell is None:
            return
        try:
            self._tell(record)
        except Exception as error:  # noqa: BLE001 - as above
            self._let_go(error)

    def __exit__(
        self, kind: type[BaseException] | None, raised: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._opens.__exit__(kind, raised, trace)
        except Exception as error:  # noqa: BLE001 - as above
            if self._tell is not None:
                self._let_go(error)

    def _let_go(self, error: Exception) -> None:
        self._tell = None
        _log.warning(
            "loggers: %s failed and gets no more steps until the run starts again: %s. loss.jsonl has every step",
            self._name,
            _said(error),
        )


def _said(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def scalars(record: StepRecord) -> dict[str, float]:
    """The numbers of a record, each under a name with its unit; what was not measured is left out."""
    values = record.model_dump(exclude={"step"})
    return {_UNITS.get(name, name): float(value) for name, value in values.items() if value is not None}


@contextmanager
def _tensorboard(config: TrainConfig, run_digest: str, first_step: int) -> Iterator[Tell]:  # noqa: ARG001  as its kin
    from tensorboardX import SummaryWriter

    folder = storage.local_path(storage.join(config.output, "tensorboard"))
    own = f".step-{first_step}"  # files are named by the second: a quick restart must not overwrite the last one
    with SummaryWriter(str(folder), purge_step=first_step, filename_suffix=own) as writer:

        def tell(record: StepRecord) -> None:
            for name, value in scalars(record).items():
                writer.add_scalar(name, value, record.step)

        yield tell


@contextmanager
def _wandb(config: TrainConfig, run_digest: str, first_step: int) -> Iterator[Tell]:  # noqa: ARG001  as its kin
    import wandb

    options: dict[str, Any] = {"dir": str(_local(config, "wandb")), "config": config.model_dump(mode="json")}
    with wandb.init(
        project=_PROJECT, id=run_digest, name=storage.name_of(config.output), resume="allow", **options
    ) as run:
        known = run.starting_step - 1 if run.resumed else 0  # starting_step is the one after the last that it has

        def tell(record: StepRecord) -> None:
            if record.step > known:
                run.log(scalars(record), step=record.step)

        yield tell


@contextmanager
def _mlflow(config: TrainConfig, run_digest: str, first_step: int) -> Iterator[Tell]:  # noqa: ARG001  as its kin
    import os

    import mlflow

    if not os.environ.get("MLFLOW_TRACKING_URI"):
        mlflow.set_tracking_uri(f"sqlite:///{_local(config, 'mlflow') / 'mlflow.db'}")
    mlflow.set_experiment(_PROJECT)
    earlier = mlflow.search_runs(filter_string=f"tags.run_digest = '{run_digest}'", output_format="list")
    found = earlier[0].info.run_id if earlier else None
    known = _last_step(found) if found else 0
    with mlflow.start_run(run_id=found, run_name=None if found else storage.name_of(config.output)):
        if found is None:
            mlflow.set_tag("run_digest", run_digest)
            mlflow.log_params({name: str(value) for name, value in config.model_dump(mode="json").items()})

        def tell(record: StepRecord) -> None:
            if record.step > known:
                mlflow.log_metrics(scalars(record), step=record.step)

        yield tell


def _last_step(mlflow_run: str) -> int:
    """The last step of a run that MLflow has."""
    from mlflow import MlflowClient

    history = MlflowClient().get_metric_history(mlflow_run, _UNITS["loss"])
    return max((entry.step for entry in history), default=0)


def _local(config: TrainConfig, name: str) -> Any:
    folder = storage.local_path(storage.join(config.output, name))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


_OPEN = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}
