"""Training under Ray Train with two gloo workers, killed and resumed. Each fit takes some ten seconds to start."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray.train
import torch
from transformers import AutoModelForCausalLM

from cert_ray import manifests
from cert_ray.errors import (
    CheckpointError,
    ConfigError,
    DiskFullError,
    InputError,
    NotFinishedError,
    StorageFullError,
    SupersededError,
    TokenizerMismatchError,
    TrainingFailedError,
    TrainingMemoryError,
)
from cert_ray.operations.story import attempts, read_story
from cert_ray.shards.units import attempt
from cert_ray.telemetry import logs
from cert_ray.training import checkpoints, inputs, notices, on_ray, worker
from cert_ray.training.actors import Verdict
from cert_ray.training.on_ray import TrainResult, train

pytestmark = [
    pytest.mark.ray,
    # Ray 2.60's own DataContext warns while Ray Train makes one.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context"),
]

HANDLER = signal.getsignal(signal.SIGINT)  # before anything is trained

OPTIONS = {"workers": 2, "micro_batch": 2, "steps": 10, "checkpoint_every_steps": 3, "zero_stage": 2}


@pytest.fixture(scope="module")
def undisturbed(ray_cluster, make_config, tmp_path_factory) -> TrainResult:
    """A run of two workers that nothing disturbs, and that several tests read."""
    run = tmp_path_factory.mktemp("undisturbed")
    with logs.story(str(run), "train"):
        return train(make_config(**OPTIONS, output=str(run / "model")))


def _losses(result: TrainResult) -> list[float]:
    return [json.loads(line)["loss"] for line in Path(result.metrics).read_text().splitlines()]


class _KillOnce:
    """Kills worker 1 after each of `steps`, once each, as a machine that goes away would."""

    def __init__(self, folder: Path, steps: tuple[int, ...]) -> None:
        self._folder, self._steps = folder, steps

    def __call__(self, step: int, rank: int) -> None:
        mark = self._folder / f"killed-{step}"
        if rank == 1 and step in self._steps and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    "error", [ConfigError("c"), InputError("u", "p", "c"), TokenizerMismatchError("t"), NotFinishedError("u", "pack")]
)
def test_what_no_further_start_can_mend_is_not_tried_again(monkeypatch, make_config, error):
    """Ray Train starts the workers again when one raises: so it is returned, on each of them."""

    def refuses(*_, **__):
        raise error

    options = _options_of_a_worker(monkeypatch, make_config, 2)
    monkeypatch.setattr(worker, "run", refuses)
    assert on_ray._work(options) == {"error": error}


class _Verdict:
    """As the actor is asked."""

    def __init__(self) -> None:
        verdict = Verdict()
        self.passed, self.pass_on = SimpleNamespace(remote=verdict.passed), SimpleNamespace(remote=verdict.pass_on)


def _options_of_a_worker(monkeypatch, make_config, world_size):
    context = SimpleNamespace(get_world_rank=int, get_world_size=lambda: world_size)
    monkeypatch.setattr(ray.train, "get_context", lambda: context)
    monkeypatch.setattr(ray, "get", lambda answer: answer)
    options = {"config": make_config().model_dump(), "run_digest": "", "pack_digest": "", "after_step": None}
    options |= {"several_nodes": True, "stop": "name", "resources": {}, "look_s": 60.0}
    options |= {"attempt": SimpleNamespace(check=lambda: None)}
    return options | {"log": logs.inherited(), "verdict": _Verdict() if world_size > 1 else None}


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("error", [DiskFullError("full"), StorageFullError("u", 2, 1), TrainingMemoryError("m")])
def test_a_full_disk_or_memory_of_one_worker_ends_it_and_is_told_to_those_started_again(
    monkeypatch, make_config, error, world_size
):
    """Returned, it would leave the others waiting for this worker: so it is raised, but where there are none."""
    begun = []

    def fills(*_, **__):
        begun.append(1)
        raise error

    options = _options_of_a_worker(monkeypatch, make_config, world_size)
    monkeypatch.setattr(worker, "run", fills)
    if world_size > 1:
        with pytest.raises(type(error)):
            on_ray._work(options)
    assert on_ray._work(options) == {"error": error}
    assert len(begun) == 1


@pytest.mark.parametrize(
    ("nodes", "options", "cluster", "several"),
    [
        (1, {}, {"CPU": 8.0}, False),
        (2, {}, {"CPU": 8.0}, True),
        (1, {}, {"CPU": 0.0}, True),  # a head alone: an autoscaler will add some
        (1, {"workers": 2, "min_workers": 1}, {"CPU": 8.0}, True),
    ],
)
def test_nodes_that_may_leave_are_watched_and_one_that_has_all_is_not(
    monkeypatch, make_config, nodes, options, cluster, several
):
    fitted = []
    monkeypatch.setattr(ray, "nodes", lambda: [{}] * nodes)
    monkeypatch.setattr(ray, "cluster_resources", lambda: cluster)
    monkeypatch.setattr(on_ray, "_fit", lambda *given: fitted.append(given[3]) or {})
    monkeypatch.setattr(on_ray, "_finish", lambda *_: None)
    monkeypatch.setattr(on_ray, "_result", lambda *_, **__: None)
    train(make_config(**options))
    assert fitted == [several]


def test_room_that_was_none_is_looked_for_less_often(monkeypatch, make_config):
    """Workers that start again for room, and are as many as before, take it for another's; not those that are more."""
    looks = []
    early = [("growing", 2, 1), ("growing", 4, 1), ("growing", 5, 1), ("leaving", 6, 2), ("growing", 7, 1)]

    def fit(*given):
        looks.append(given[2]["look_s"])
        return {"early": early.pop(0)} if early else {}

    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0})
    monkeypatch.setattr(on_ray, "_fit", fit)
    monkeypatch.setattr(on_ray, "_finish", lambda *_: None)
    monkeypatch.setattr(on_ray, "_result", lambda *_, **__: None)
    train(make_config(workers=3, min_workers=1, resize_check_s=10.0))
    assert looks == [10.0, 10.0, 20.0, 40.0, 40.0, 10.0]


def test_one_run_without_the_watcher_leaves_it_to_the_next(monkeypatch):
    monkeypatch.delenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", raising=False)
    with on_ray._unwatched():
        assert os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] == "0"
    assert "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER" not in os.environ
    monkeypatch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "1")
    with on_ray._unwatched():
        assert os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] == "1"


class _FillsUp:
    """The disk of worker 1 is full after step 2; `folder` holds a file for each time that it came there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, step: int, rank: int) -> None:
        if rank == 1 and step == 2:
            (self._folder / f"{time.monotonic_ns()}").touch()
            raise DiskFullError("step-000002 cannot be written, a disk is full")


def test_workers_are_not_trained_again_for_a_full_disk(ray_cluster, make_config, tmp_path):
    with pytest.raises(DiskFullError, match="step-000002 cannot be written"):
        train(make_config(**OPTIONS, max_failures=3), after_step=_FillsUp(tmp_path))
    assert len(list(tmp_path.iterdir())) == 1


def test_two_workers_learn_and_leave_a_model(undisturbed):
    assert undisturbed.last_loss < undisturbed.first_loss
    assert undisturbed.held_out_loss < undisturbed.first_loss
    assert not undisturbed.reused
    names = {path.name for path in Path(undisturbed.folder).iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "loss.jsonl", "loss.png", "manifest.json"} <= names
    manifest = manifests.read_manifest(undisturbed.folder, "model", "train")
    assert manifest.rows_read == 10 * 4
    assert manifest.counts["parameters"] == undisturbed.parameters
    kept = [step for step, _ in checkpoints.complete_checkpoints(checkpoints.folder_of(undisturbed.folder))]
    assert kept == [9, 10]
    model = AutoModelForCausalLM.from_pretrained(undisturbed.folder)
    assert torch.isfinite(model(torch.arange(10)[None]).logits).all()


class _Announces:
    """After step 4 Ray is said to announce that a node leaves, as its watcher tells each worker (ray 2.60)."""

    def __call__(self, step: int, rank: int) -> None:
        from ray.train.v2._internal.execution.context import get_train_context

        notices._LOOK_EVERY_S = 0.0  # after each step
        if step == 4:
            info = ray.train.PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={"node-a": [rank]})
            get_train_context().preemption_context.preemption_info = info


def test_nodes_that_leave_have_nothing_free_and_a_head_that_is_away_tells_nothing(monkeypatch):
    def fails(*_):
        raise ray.exceptions.RpcError("unavailable")

    monkeypatch.setattr(on_ray.state, "get_draining_nodes", lambda: {"a": 0})
    monkeypatch.setattr(on_ray.state, "available_resources_per_node", lambda: {"a": {"CPU": 8.0}, "b": {"CPU": 2.0}})
    assert on_ray._free_nodes() == [{"CPU": 2.0}]
    monkeypatch.setattr(on_ray.state, "get_draining_nodes", fails)
    assert on_ray._free_nodes() == []
    monkeypatch.setattr(ray, "get_actor", fails)
    assert not on_ray._is_there("name")


def test_ray_tells_what_its_node_has_free(ray_cluster):
    """Which is not among what Ray promises to keep."""
    assert [node.get("memory", 0) > 0 for node in on_ray._free_nodes()] == [True]


class _TakesOver:
    """After step 4 another run begins in the output."""

    def __init__(self, output: str) -> None:
        self._output = output

    def __call__(self, step: int, rank: int) -> None:
        if step == 4 and rank == 1:
            with attempt(self._output, inputs.STAGE, inputs.VERB, "digest"):
                pass


@pytest.mark.slow
def test_of_two_runs_into_one_output_the_earlier_one_ends(ray_cluster, make_config):
    config = make_config(**OPTIONS)
    with pytest.raises(SupersededError):
        train(config, after_step=_TakesOver(config.output))
    kept = [step for step, _ in checkpoints.complete_checkpoints(checkpoints.folder_of(config.output))]
    assert kept == [3]


class _Interrupts:
    """After step 3 the driver gets Ctrl-C, once; each step is followed by a look."""

    def __init__(self, mark: Path) -> None:
        self._mark, self._driver = mark, os.getpid()

    def __call__(self, step: int, rank: int) -> None:
        notices._LOOK_EVERY_S = 0.0
        if step == 3 and rank == 1 and not self._mark.exists():
            self._mark.touch()
            os.kill(self._driver, signal.SIGINT)
            time.sleep(1.0)  # the actor that tells of it is being made


@pytest.mark.slow
def test_ctrl_c_stops_with_a_checkpoint_from_which_the_run_goes_on(undisturbed, make_config, tmp_path, caplog):
    config = make_config(**OPTIONS | {"checkpoint_every_steps": None})
    with pytest.raises(KeyboardInterrupt), caplog.at_level(logging.WARNING):
        train(config, after_step=_Interrupts(tmp_path / "mark"))
    (step, _) = checkpoints.newest(checkpoints.folder_of(config.output))
    assert 3 < step < 10
    assert f"stopped after step {step}: run the same again to go on" in caplog.text
    assert signal.getsignal(signal.SIGINT) is HANDLER
    assert _losses(train(config)) == _losses(undisturbed)


@pytest.mark.slow
def test_a_node_that_ray_announces_to_leave_brings_a_checkpoint_and_a_start_at_once(ray_cluster, make_config):
    """With no failure allowed: it counts as none."""
    options = {"checkpoint_every_steps": None, "keep_checkpoints": 9, "min_workers": 1, "max_failures": 0}
    result = train(make_config(**OPTIONS | options), after_step=_Announces())
    kept = [step for step, _ in checkpoints.complete_checkpoints(checkpoints.folder_of(result.folder))]
    assert kept == [5, 10]


def test_ctrl_c_ends_the_program_once_training_is_over(undisturbed):
    assert signal.getsignal(signal.SIGINT) is HANDLER


def test_worker_0_tells_the_steps_in_a_story_of_its_own(undisturbed):
    lines = read_story(str(Path(undisturbed.folder).parent))
    told = [line for line in lines if line.verb == "train-model"]
    assert {attempt.verb: attempt.outcome for attempt in attempts(lines)} == {
        "train": "finished",
        "train-model": "finished",
    }
    assert told[0].fields["pid"] != lines[0].fields["pid"]
    assert [line.message for line in told if "step 10" in line.message]


def test_killed_twice_it_ends_with_the_losses_of_an_undisturbed_run(undisturbed, make_config, tmp_path):
    """The first death is recovered from within the call, the second ends it, and calling again goes on."""
    config = make_config(**OPTIONS, max_failures=1, output=str(tmp_path / "model"))
    kill = _KillOnce(tmp_path, (4, 8))
    with pytest.raises(TrainingFailedError, match="go on from step 6"):
        train(config, after_step=kill)
    result = train(config, after_step=kill)
    assert sorted(path.name for path in tmp_path.glob("killed-*")) == ["killed-4", "killed-8"]
    assert _losses(result) == _losses(undisturbed)
    assert dataclasses.replace(result, folder="", metrics="") == dataclasses.replace(undisturbed, folder="", metrics="")


def test_one_worker_goes_on_from_what_two_wrote(undisturbed, make_config, tmp_path):
    """Ten of its steps are there but the last; ZeRO 2's parts are converted where they are read."""
    shutil.copytree(
        undisturbed.folder, tmp_path / "model", ignore=shutil.ignore_patterns("manifest.json", "step-000010")
    )
    options = OPTIONS | {"workers": 1, "gradient_accumulation": 2}
    result = train(make_config(**options, output=str(tmp_path / "model")))
    assert _losses(result)[:9] == _losses(undisturbed)[:9]
    assert _losses(result) == pytest.approx(_losses(undisturbed), abs=2e-5)
    assert result.held_out_loss == pytest.approx(undisturbed.held_out_loss, abs=2e-5)


class _CutError(Exception):
    pass


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.distributed.*deprecated:FutureWarning")
@pytest.mark.parametrize("zero_stage", [1, 3])
def test_two_workers_go_on_from_what_one_wrote_and_one_from_theirs(
    undisturbed, make_config, process_group, copy_report, tmp_path, zero_stage
):
    """The one runs in this process. ZeRO 2 is what `undisturbed` has."""
    options = OPTIONS | {"zero_stage": zero_stage, "output": str(tmp_path / "model")}
    alone = make_config(**options | {"workers": 1, "gradient_accumulation": 2})
    digest, report = inputs.check(alone).run_digest, copy_report(alone.output)

    def cut(step: int, rank: int) -> None:
        if step == 4:
            raise _CutError

    with pytest.raises(_CutError):
        worker.run(alone, digest, 0, 1, report, cut)
    assert _losses(train(make_config(**options))) == pytest.approx(_losses(undisturbed), abs=2e-5)
    shutil.rmtree(Path(checkpoints.folder_of(alone.output)) / "step-000010")
    went_on = [record.loss for record in worker.run(alone, digest, 0, 1, report).records]
    assert went_on == pytest.approx(_losses(undisturbed), abs=2e-5)


def test_a_finished_output_is_reused_or_refused_but_never_replaced(undisturbed, make_config):
    same = make_config(**OPTIONS, output=undisturbed.folder, keep_checkpoints=5)
    assert train(same) == dataclasses.replace(undisturbed, reused=True)
    with pytest.raises(ConfigError, match="differs in learning_rate"):
        train(make_config(**OPTIONS, output=undisturbed.folder, learning_rate=1e-4))


def test_bad_inputs_end_before_a_worker_starts(undisturbed, make_config, tmp_path):
    with pytest.raises(NotFinishedError, match="cert-ray pack"):
        train(make_config(tokens=str(tmp_path)))
    for base, problem in ((str(tmp_path / "absent"), "is not a folder"), ("modern-1", "give a preset .*modern-tiny")):
        with pytest.raises(ConfigError, match=f"base: .*{problem}"):
            train(make_config(base=base))
    (Path(undisturbed.folder) / "manifest.json").rename(tmp_path / "manifest.json")
    folder = Path(checkpoints.folder_of(undisturbed.folder))
    whole = [next((folder / name).glob("engine/engine/*optim_states.pt")) for name in ("step-000009", "step-000010")]
    try:
        with pytest.raises(CheckpointError, match="other options"):
            train(make_config(**OPTIONS, output=undisturbed.folder, seed=9))
        for state in whole:
            state.rename(state.with_suffix(".away"))
        with pytest.raises(CheckpointError, match="is missing"):
            train(make_config(**OPTIONS, output=undisturbed.folder))
    finally:
        for state in whole:
            if not state.exists():
                state.with_suffix(".away").rename(state)
        (tmp_path / "manifest.json").rename(Path(undisturbed.folder) / "manifest.json")


@pytest.mark.filterwarnings("ignore:`torch.distributed.*deprecated:FutureWarning")
def test_losses_depend_neither_on_the_workers_nor_on_the_stage(undisturbed, make_config, process_group, copy_report):
    """Two workers with ZeRO 2 against one in this process with ZeRO 0, which reads the same four rows per step."""
    config = make_config(**OPTIONS | {"workers": 1, "micro_batch": 4, "zero_stage": 0})
    alone = worker.run(config, "digest", 0, 1, copy_report(config.output))
    assert [record.loss for record in alone.records] == pytest.approx(_losses(undisturbed), abs=2e-5)
    assert alone.records[-1].held_out_loss == pytest.approx(undisturbed.held_out_loss, abs=2e-5)
