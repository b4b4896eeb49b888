"""Loggers: every step once, whatever was resumed; a package that is missing is named before anything starts."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from cert_ray.errors import ConfigError
from cert_ray.training import inputs, loggers
from cert_ray.training.records import StepRecord


def record(step: int, held_out_loss: float | None = None) -> StepRecord:
    return StepRecord(
        step=step, epoch=0, loss=5.0 - step, learning_rate=1e-3, gradient_norm=0.5, tokens=100 * step,
        tokens_per_s=50.0, held_out_loss=held_out_loss,
    )  # fmt: skip


def tell(config: Any, steps: range, digest: str = "abc") -> None:
    with loggers.step_loggers(config, digest, steps.start) as told:
        for step in steps:
            told(record(step, 2.0 if step == steps[-1] else None))


def test_tensorboard_has_every_step_once_after_a_resume(make_config: Any) -> None:
    config = make_config(loggers=["tensorboard"])
    tell(config, range(1, 5))
    tell(config, range(3, 6))  # from a checkpoint at step 2
    seen = _events(config)
    assert seen["loss_nats_per_token"] == {step: 5.0 - step for step in range(1, 6)}
    assert seen["held_out_loss_nats_per_token"] == {5: 2.0}
    assert set(seen) >= {"learning_rate", "tokens", "tokens_per_second", "gradient_norm"}


def _events(config: Any) -> dict[str, dict[int, float]]:
    """What TensorBoard shows: values by name and step."""
    from tensorboardX.proto.event_pb2 import Event

    seen: dict[str, dict[int, float]] = {}
    for file in sorted((Path(config.output) / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime_ns):
        for raw in _records(file.read_bytes()):
            event = Event.FromString(raw)
            if event.session_log.status == 1:  # a start: steps from here on are told anew
                for values in seen.values():
                    for step in [step for step in values if step >= event.step]:
                        del values[step]
            for value in event.summary.value:
                assert event.step not in seen.setdefault(value.tag, {})
                seen[value.tag][event.step] = value.simple_value
    return seen


def _records(data: bytes) -> list[bytes]:
    """TFRecord framing: length (8 bytes), its checksum (4), the record, its checksum (4)."""
    found, place = [], 0
    while place < len(data):
        size = int.from_bytes(data[place : place + 8], "little")
        found.append(data[place + 12 : place + 12 + size])
        place += 16 + size
    return found


@pytest.mark.slow
# MLflow's own use of SQLAlchemy 2.1.
@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")
def test_mlflow_goes_on_in_the_same_run_and_has_every_step_once(
    make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = make_config(loggers=["mlflow"])
    tell(config, range(1, 5))
    tell(config, range(3, 7))  # from a checkpoint at step 2
    (run,) = mlflow.search_runs(experiment_names=["cert-ray"], output_format="list")
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "loss_nats_per_token")
    assert [(entry.step, entry.value) for entry in history] == [(step, 5.0 - step) for step in range(1, 7)]
    assert run.data.params["steps"] == str(config.steps)


def test_wandb_offline_writes_a_run(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = make_config(loggers=["wandb"])
    tell(config, range(1, 4))
    assert list((Path(config.output) / "wandb").rglob("run-*.wandb"))


def test_wandb_is_not_told_again_what_a_resumed_run_knows(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its server is played: a run of this id has been told four steps, so its next one is the fifth."""
    wandb = pytest.importorskip("wandb")
    told: list[int] = []

    class Resumed:
        resumed, starting_step = True, 5

        def log(self, values: dict[str, float], step: int) -> None:
            assert values
            told.append(step)

    monkeypatch.setattr(wandb, "init", lambda **options: nullcontext(Resumed()))
    tell(make_config(loggers=["wandb"]), range(3, 7))
    assert told == [5, 6]


def test_a_logger_that_is_not_installed_is_named_before_anything_starts(
    make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else find(name))
    with pytest.raises(ConfigError, match=r"wandb named, but not installed: pip install 'cert-ray\[wandb\]'"):
        inputs.check(make_config(loggers=["tensorboard", "wandb"]))


def test_loggers_do_not_make_another_run(make_config: Any) -> None:
    plain, told = make_config(), make_config(loggers=["tensorboard"])
    assert plain.result_digest() == told.result_digest()
    with pytest.raises(ConfigError, match="loggers"):
        make_config(loggers=["tensorbord"])


def test_scalars_leave_out_what_was_not_measured() -> None:
    assert "held_out_loss_nats_per_token" not in loggers.scalars(record(1))
    assert loggers.scalars(record(1))["loss_nats_per_token"] == 4.0


class _Fails:
    """A logger whose server is gone at `when`: as it opens, is told step 2 for the first time, or closes."""

    def __init__(self, when: str) -> None:
        self.when, self.told = when, list[int]()

    @contextmanager
    def __call__(self, config: Any, run_digest: str, first_step: int) -> Iterator[loggers.Tell]:
        self._gone_at("opens")

        def tell(record: StepRecord) -> None:
            self.told.append(record.step)
            if record.step >= 2:
                self._gone_at("is told")

        yield tell
        self._gone_at("closes")

    def _gone_at(self, when: str) -> None:
        if when == self.when:
            raise ConnectionError("the server\nis gone")


@pytest.mark.parametrize(("when", "told"), [("opens", []), ("is told", [2]), ("closes", [2, 3, 4])])
def test_a_logger_that_fails_under_way_is_told_of_once_and_let_go(
    make_config: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, when: str, told: list[int]
) -> None:
    failing, whole = _Fails(when), _Fails("never")
    monkeypatch.setattr(loggers, "_OPEN", {"mlflow": failing, "tensorboard": whole})
    tell(make_config(loggers=["mlflow", "tensorboard"]), range(2, 5))
    assert (failing.told, whole.told) == (told, [2, 3, 4])
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning.startswith("loggers: mlflow failed")
    assert "ConnectionError: the server is gone" in warning


def test_a_logger_that_cannot_begin_ends_a_run_before_its_first_step(
    make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loggers, "_OPEN", {"wandb": _Fails("opens")})
    with pytest.raises(
        ConfigError, match=r"wandb cannot begin: ConnectionError: the server is gone\. .*out of the recipe"
    ):
        tell(make_config(loggers=["wandb"]), range(1, 3))


class _CutError(Exception):
    pass


TRAINS = [
    pytest.mark.slow,
    pytest.mark.usefixtures("process_group"),
    # DeepSpeed 0.19 calls collectives that torch 2.13 renamed; MLflow's own use of SQLAlchemy 2.1.
    pytest.mark.filterwarnings("ignore:`torch.distributed.*deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy"),
]


class TestTraining:
    """Real runs, of five steps."""

    pytestmark = TRAINS

    def test_a_run_cut_short_is_told_to_every_logger_that_is_installed(
        self, make_config: Any, copy_report: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from cert_ray.training import worker

        monkeypatch.setenv("WANDB_MODE", "offline")
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
        packages = loggers._PACKAGES.items()
        installed = [name for name, package in packages if importlib.util.find_spec(package) is not None]
        config = make_config(loggers=installed, steps=5, checkpoint_every_steps=2)

        def cut(step: int, rank: int) -> None:
            if step == 3:
                raise _CutError

        with pytest.raises(_CutError):
            worker.run(config, "abc", 0, 1, copy_report(config.output), cut)
        records = worker.run(config, "abc", 0, 1, copy_report(config.output)).records
        losses = {record.step: record.loss for record in records}
        assert list(losses) == [1, 2, 3, 4, 5]
        assert _events(config)["loss_nats_per_token"] == pytest.approx(losses)
        if "mlflow" in installed:
            import mlflow

            (run,) = mlflow.search_runs(experiment_names=["cert-ray"], output_format="list")
            history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "loss_nats_per_token")
            assert {entry.step: entry.value for entry in history} == losses
            assert run.info.status == "FINISHED"
        if "wandb" in installed:
            assert len(list((Path(config.output) / "wandb").rglob("run-abc.wandb"))) == 2  # offline: one a start

    def test_a_logger_that_fails_ends_no_run(
        self, make_config: Any, copy_report: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        from cert_ray.training import worker

        monkeypatch.setitem(loggers._OPEN, "tensorboard", _Fails("is told"))
        config = make_config(loggers=["tensorboard"], steps=5)
        assert len(worker.run(config, "abc", 0, 1, copy_report(config.output)).records) == 5
        assert caplog.text.count("tensorboard failed") == 1
        assert (Path(config.output) / "model.safetensors").exists()
