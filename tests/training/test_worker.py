"""One worker, in this process: it learns, resumes to the same losses, and exports what it trained."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import sysconfig
import tempfile
import threading
import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from cert_ray import manifests, storage
from cert_ray.errors import (
    CheckpointError,
    ConfigError,
    DamagedCheckpointError,
    DiskFullError,
    InputError,
    NoWholeCheckpointError,
    SupersededError,
    TrainingDivergedError,
    TrainingMemoryError,
)
from cert_ray.tokens import shards
from cert_ray.tokens.vocabulary import load_tokenizer
from cert_ray.training import batches, checkpoints, export, inputs, notices, resume, worker
from cert_ray.training.bases import Origin
from cert_ray.training.presets import preset_config
from cert_ray.training.records import StepRecord
from cert_ray.training.together import Together
from tests.training.conftest import CONTEXT_TOKENS, WORDS, write_pack, write_tokenizer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("process_group"),
    # DeepSpeed 0.19 calls collectives that torch 2.13 renamed.
    pytest.mark.filterwarnings("ignore:`torch.distributed.*deprecated:FutureWarning"),
]


class _KilledError(Exception):
    pass


def _run(config, copy_report, after_step=None):
    return worker.run(config, "digest", 0, 1, copy_report(config.output), after_step)


def _losses(outcome):
    return [record.loss for record in outcome.records]


def test_learns_what_can_be_learned(make_config, copy_report):
    """The next word of a document is the one after it 95 times of 100: far below log(62) = 4.1 nats."""
    outcome = _run(make_config(steps=60, warmup_steps=5, eval_every_steps=30, zero_stage=0), copy_report)
    assert 3.8 < outcome.records[0].loss < 4.6
    assert outcome.records[-1].loss < 1.5
    held_out = [record.held_out_loss for record in outcome.records]
    assert held_out[29] is not None
    assert held_out[59] < 1.5
    assert sum(loss is not None for loss in held_out) == 2


def test_a_llama_learns_it_too_with_the_other_schedule(make_config, copy_report):
    outcome = _run(make_config(base="modern-tiny", steps=60, warmup_steps=5, schedule="wsd", zero_stage=0), copy_report)
    assert outcome.records[-1].loss < 1.5
    rates = [record.learning_rate for record in outcome.records]
    assert rates[5:49] == [3e-3] * 44
    assert rates[49] > rates[50] > rates[59] > 0


def test_a_handful_of_documents_is_learned_by_heart(make_config, copy_report, tokenizer_folder, tmp_path):
    """Loss near zero, though every twentieth word is noise; which document comes next stays open: 0.02 nats of it."""
    write_pack(tmp_path / "pack", load_tokenizer(str(tokenizer_folder)), documents=4)
    options = {"tokens": str(tmp_path / "pack"), "resampling": "uniform", "steps": 120, "warmup_steps": 5}
    outcome = _run(make_config(**options, zero_stage=0), copy_report)
    assert outcome.records[0].loss > 3.8
    assert outcome.records[-1].loss < 0.15


@pytest.mark.skipif(
    os.environ.get("CI") != "true"
    and not (shutil.which(os.environ.get("CXX", "g++")) and Path(sysconfig.get_path("include"), "Python.h").is_file()),
    reason="torch.compile needs a C++ compiler and Python's headers: apt-get install g++ python3-dev",
)
def test_compiled_steps_give_the_same_losses_and_are_compiled_once(make_config, copy_report, tmp_path, monkeypatch):
    from torch._dynamo.utils import counters

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    options = {"steps": 3, "warmup_steps": 1, "base": "modern-tiny", "eval_every_steps": 9}
    eager = _run(make_config(**options, output=str(tmp_path / "eager")), copy_report)
    compiled, misses = [], []
    for name in ("compiled", "again"):
        counters.clear()
        with warnings.catch_warnings():  # torch's compiler uses what torch deprecates
            warnings.simplefilter("ignore")
            compiled.append(_run(make_config(**options, compile=True, output=str(tmp_path / name)), copy_report))
        misses.append(counters["inductor"]["fxgraph_cache_miss"])
        torch.compiler.reset()
    assert misses == [3, 0]  # a pass forward, one back, and an evaluation's
    assert _losses(compiled[0]) == pytest.approx(_losses(eager), abs=2e-5)
    assert compiled[0].records[-1].held_out_loss == pytest.approx(eager.records[-1].held_out_loss, abs=2e-5)
    assert _losses(compiled[1]) == _losses(compiled[0])
    assert (tmp_path / "compiled" / "config.json").read_text() == (tmp_path / "eager" / "config.json").read_text()


def test_every_zero_stage_gives_the_same_losses(make_config, copy_report, tmp_path):
    losses = [
        _losses(_run(make_config(steps=5, zero_stage=stage, output=str(tmp_path / f"zero{stage}")), copy_report))
        for stage in range(4)
    ]
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], abs=2e-5)


def test_without_zero_the_gradients_norm_is_told_as_with_it(make_config, copy_report, tmp_path):
    norms = [
        [record.gradient_norm for record in _run(make_config(**options), copy_report).records]
        for options in (
            {"steps": 3, "zero_stage": 1, "gradient_accumulation": 2, "output": str(tmp_path / "one")},
            {"steps": 3, "zero_stage": 0, "gradient_accumulation": 2, "output": str(tmp_path / "none")},
        )
    ]
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)


def test_losses_depend_on_the_rows_of_a_step_not_on_how_they_are_grouped(make_config, copy_report, tmp_path):
    one = make_config(steps=4, micro_batch=4, gradient_accumulation=1, output=str(tmp_path / "one"))
    two = make_config(steps=4, micro_batch=1, gradient_accumulation=4, output=str(tmp_path / "two"))
    assert _losses(_run(one, copy_report)) == pytest.approx(_losses(_run(two, copy_report)), abs=2e-5)


@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_a_run_cut_short_goes_on_to_the_same_losses(make_config, copy_report, tmp_path, zero_stage):
    options = {"zero_stage": zero_stage, "checkpoint_every_steps": 3, "steps": 8}
    undisturbed = _run(make_config(**options, output=str(tmp_path / "whole")), copy_report)

    def kill(step: int, rank: int) -> None:
        if step == 5:
            raise _KilledError

    config = make_config(**options, output=str(tmp_path / "cut"))
    with pytest.raises(_KilledError):
        _run(config, copy_report, kill)
    seen: list[int] = []
    resumed = _run(config, copy_report, lambda step, rank: seen.append(step))
    assert seen == [4, 5, 6, 7, 8]
    assert _losses(resumed) == _losses(undisturbed)
    assert [file.checksum for file in resumed.files] == [file.checksum for file in undisturbed.files]


def test_dropout_falls_alike_in_a_run_cut_short(make_config, copy_report, tmp_path):
    """What drops out follows from the step's number, not from what was drawn before it in this process."""
    shape = preset_config("tiny", WORDS + 2, CONTEXT_TOKENS, 0, 1)
    shape.embed_dropout = shape.resid_dropout = 0.3
    AutoModelForCausalLM.from_config(shape).save_pretrained(tmp_path / "base")
    write_tokenizer(tmp_path / "base")
    options = {"base": str(tmp_path / "base"), "tokenizer": None, "checkpoint_every_steps": 2, "steps": 5}
    undisturbed = _run(make_config(**options, output=str(tmp_path / "whole")), copy_report)

    def kill(step: int, rank: int) -> None:
        if step == 3:
            raise _KilledError

    config = make_config(**options, output=str(tmp_path / "cut"))
    with pytest.raises(_KilledError):
        _run(config, copy_report, kill)
    resumed = _run(config, copy_report)
    assert _losses(resumed) == _losses(undisturbed)
    assert [file.checksum for file in resumed.files] == [file.checksum for file in undisturbed.files]


def test_the_rows_of_the_next_step_are_read_while_a_step_runs(make_config, copy_report, monkeypatch):
    """Each step waits for them, but the last: nothing is read behind it. The thread ends with the run."""
    read, learn, arrived = worker.Batches.of_step, resume.Engine.train_step, [threading.Event() for _ in range(5)]
    learned = []

    def of_step(batches, step):
        arrived[step].set()
        return read(batches, step)

    def train_step(engine, batches, rate):
        learned.append(rate)
        if len(learned) < 4:
            assert arrived[len(learned)].wait(10), "read only after the step"
        return learn(engine, batches, rate)

    monkeypatch.setattr(worker.Batches, "of_step", of_step)
    monkeypatch.setattr(resume.Engine, "train_step", train_step)
    _run(make_config(steps=4), copy_report)
    assert not arrived[4].is_set()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("rows")]


def test_rows_that_cannot_be_read_end_the_run_at_their_own_step(make_config, copy_report, monkeypatch):
    read, seen = worker.Batches.of_step, []

    def of_step(batches, step):
        if step == 2:
            raise OSError("the disk is gone")
        return read(batches, step)

    monkeypatch.setattr(worker.Batches, "of_step", of_step)
    with pytest.raises(OSError, match="the disk is gone"):
        _run(make_config(steps=4), copy_report, lambda step, rank: seen.append(step))
    assert seen == [1, 2]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("rows")]


def test_a_run_names_every_machine_that_trained_it_with_its_steps(make_config, copy_report, monkeypatch):
    """Step 5 was done on the first, lost with it, and done again on the second."""

    def kill(step: int, rank: int) -> None:
        if step == 5:
            raise _KilledError

    config = make_config(checkpoint_every_steps=3, steps=8)
    monkeypatch.setattr(worker, "machine", lambda: "one GPU")
    with pytest.raises(_KilledError):
        _run(config, copy_report, kill)
    monkeypatch.setattr(worker, "machine", lambda: "two cores")
    assert _run(config, copy_report).machines == {"one GPU": 3, "two cores": 5}
    assert _run(config, copy_report).machines == {"one GPU": 3, "two cores": 5}  # exported again, nothing trained
    for step in (6, 8):
        shutil.rmtree(Path(config.output) / "checkpoints" / checkpoints.name_of_step(step))
    Path(config.output, "checkpoints").mkdir(exist_ok=True)
    assert _run(config, copy_report).machines == {"two cores": 8}  # from the start again


def test_checkpoints_lie_wherever_a_url_reaches(make_config, tmp_path):
    """In memory, by fsspec: nothing of them is on this disk; the run goes on from there."""
    output = f"memory://training/{tmp_path.name}"
    config = make_config(steps=5, checkpoint_every_steps=2, keep_best_checkpoint=False).model_copy(
        update={"output": output}
    )

    def report(metrics, part, name):
        for file in (path for path in part.rglob("*") if path.is_file()):
            target = f"{output}/checkpoints/{name}/{file.relative_to(part).as_posix()}"
            storage.write_bytes(target, file.read_bytes())

    def kill(step: int, rank: int) -> None:
        if step == 3:
            raise _KilledError

    with pytest.raises(_KilledError):
        worker.run(config, "digest", 0, 1, report, kill)
    seen: list[int] = []
    worker.run(config, "digest", 0, 1, report, lambda step, rank: seen.append(step))
    assert seen == [3, 4, 5]
    assert [step for step, _ in checkpoints.complete_checkpoints(f"{output}/checkpoints")] == [4, 5]
    assert storage.exists(f"{output}/model.safetensors")
    assert storage.read_bytes(f"{output}/loss.png").startswith(b"\x89PNG")
    damaged = f"{output}/checkpoints/step-000005/records.jsonl"
    storage.write_bytes(damaged, b"{}")
    with pytest.raises(DamagedCheckpointError, match=r"step-000005/records\.jsonl has 2 bytes"):
        checkpoints.verify(f"{output}/checkpoints/step-000005")


def test_the_card_of_a_checkpoint_tells_base_licence_and_recipe(make_config, copy_report, tmp_path):
    base = make_config(steps=2, warmup_steps=1)
    _run(base, copy_report)
    origin = Origin(base="a-base", model="A", quantisation="Q4_1", licence="apache-2.0", file_sha256="")
    notes = {"base": "a-base", "dequantised_from": "Q4_1"}
    manifests.write_manifest(base.output, manifests.summarize("model", origin, "inputs", [], notes))
    config = make_config(base=base.output, steps=2, warmup_steps=1, learning_rate=0.00125)
    _run(config, copy_report)
    shutil.rmtree(base.output)
    export.export_checkpoint(f"{config.output}/checkpoints/step-000002", str(tmp_path / "exported"))
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "\nlicense: apache-2.0\n" in card
    assert "| started from | a-base |" in card
    assert "dequantised from Q4_1" in card
    assert "\nlearning_rate: 0.00125\n" in card


def _damage(checkpoint: Path) -> str:
    """Flip one bit of the optimizer's state; returns the file's name."""
    damaged = next((checkpoint / "engine" / "engine").glob("*optim_states.pt"))
    payload = bytearray(damaged.read_bytes())
    payload[len(payload) // 2] ^= 1
    damaged.write_bytes(payload)
    return damaged.name


def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_it_used(make_config, copy_report, caplog):
    config = make_config(steps=4, checkpoint_every_steps=2)
    undisturbed = _run(config, copy_report)
    folder = Path(config.output) / "checkpoints"
    name = _damage(folder / "step-000004")
    seen: list[int] = []
    resumed = _run(config, copy_report, lambda step, rank: seen.append(step))
    assert seen == [3, 4]
    assert f"step-000004/engine/engine/{name} has" in caplog.text
    assert _losses(resumed) == _losses(undisturbed)
    for checkpoint in folder.iterdir():
        _damage(checkpoint)
    with pytest.raises(NoWholeCheckpointError, match=name):
        _run(config, copy_report)
    shutil.rmtree(folder)  # the cure that the message names
    assert len(_run(config, copy_report).records) == 4


def test_the_newest_and_the_best_checkpoint_are_kept(make_config, copy_report, monkeypatch):
    """The rate becomes absurd after step 8, so the held-out loss is lowest there."""
    monkeypatch.setattr(worker, "learning_rate", lambda step, *_: 3e-3 if step < 8 else 3.0)
    config = make_config(steps=16, checkpoint_every_steps=4, eval_every_steps=4, keep_checkpoints=1, on_spike=None)
    outcome = _run(config, copy_report)
    losses = {record.step: record.held_out_loss for record in outcome.records if record.held_out_loss is not None}
    assert min(losses, key=losses.__getitem__) == 8
    kept = [step for step, _ in checkpoints.complete_checkpoints(checkpoints.folder_of(config.output))]
    assert kept == [8, 16]


def test_what_cannot_be_read_back_does_not_count_and_removes_nothing(make_config, copy_report):
    config = make_config(steps=4, checkpoint_every_steps=2, keep_checkpoints=1)

    def report(metrics, part, name):
        copy_report(config.output)(metrics, part, name)
        if name == "step-000004":
            _damage(Path(config.output) / "checkpoints" / name)

    with pytest.raises(DamagedCheckpointError, match="step-000004"):
        worker.run(config, "digest", 0, 1, report)
    assert checkpoints.newest(checkpoints.folder_of(config.output))[0] == 2


@pytest.mark.parametrize(
    ("rank", "machines", "folders", "fetches", "used"),
    [
        (0, ["a", "a", "b"], ["0", "1", "2"], True, "0"),
        (1, ["a", "a", "b"], ["0", "1", "2"], False, "0"),
        (2, ["a", "a", "b"], ["0", "1", "2"], True, "2"),
        (1, ["a", "a"], ["elsewhere", "1"], True, "1"),  # two machines of one name
    ],
)
def test_the_first_worker_of_a_machine_copies_a_remote_base_for_all(
    tmp_path, monkeypatch, make_config, rank, machines, folders, fetches, used
):
    paths = [tmp_path / folder for folder in folders]
    for path in paths:
        if path.name != "elsewhere":
            path.mkdir()
    done = []
    together = Together(rank, len(machines))
    monkeypatch.setattr(together, "gathered", lambda _: list(zip(machines, map(str, paths), strict=True)))
    monkeypatch.setattr(together, "everywhere", lambda work: work())
    monkeypatch.setattr(socket, "gethostname", lambda: machines[rank])
    monkeypatch.setattr(worker.models, "fetch", lambda _, copies: done.append(copies))
    monkeypatch.setattr(worker.models, "load", lambda _, __, copies: copies)
    assert worker._load(make_config(), None, together, paths[rank]) == tmp_path / used
    assert done == ([paths[rank]] if fetches else [])


def test_a_run_that_another_took_over_writes_nothing_more(make_config, copy_report):
    config = make_config(steps=6, checkpoint_every_steps=2, keep_checkpoints=9)
    folder = checkpoints.folder_of(config.output)
    taken: list[int] = []

    def check() -> None:
        if taken:
            raise SupersededError(config.output)

    def run() -> None:
        def after(step: int, rank: int) -> None:
            taken.extend([step] * (step == 3))

        worker.run(config, "digest", 0, 1, copy_report(config.output), after, check=check)

    with pytest.raises(SupersededError):
        run()
    assert [step for step, _ in checkpoints.complete_checkpoints(folder)] == [2]
    with pytest.raises(SupersededError):  # as its workers that are started again
        run()
    taken.clear()
    _run(config, copy_report)
    assert [step for step, _ in checkpoints.complete_checkpoints(folder)] == [2, 4, 6]


@pytest.mark.parametrize("reason", ["leaving", "growing", "stopped"])
def test_nodes_that_come_and_go_and_a_stop_end_the_run_with_a_checkpoint_from_which_it_goes_on(
    make_config, copy_report, monkeypatch, reason
):
    """One that comes while the loss spikes ends it once the loss has fallen."""
    news: list[str] = []
    monkeypatch.setattr(notices, "_LOOK_EVERY_S", 0.0)
    monkeypatch.setattr(worker._Rank, "_spikes", lambda rank: len(rank.records) in (5, 6))
    config = make_config(steps=9, keep_checkpoints=9)
    whole = _run(make_config(steps=9), copy_report)

    def run(news_after: int) -> worker.Outcome | worker.Early:
        of = {"leaving": lambda: news} if reason == "leaving" else {"asked": lambda: reason if news else None}

        def after(step: int, rank: int) -> None:
            if step == news_after:
                news.append("node-a")

        news.clear()
        return worker.run(config, "digest", 0, 1, copy_report(config.output), after, **of)

    assert run(1) == worker.Early(2, reason)
    assert run(4) == worker.Early(7, reason)
    done = run(8)  # whose notice comes with the last step: nothing is left to end
    assert [record.loss for record in done.records] == [record.loss for record in whole.records]
    folder = checkpoints.folder_of(config.output)
    assert [step for step, _ in checkpoints.complete_checkpoints(folder)] == [2, 7, 9]


def test_a_spike_that_stays_stops_the_run_and_names_the_last_good_checkpoint(
    make_config, copy_report, caplog, monkeypatch
):
    """From step 15 on, the rate is a thousand times what it was: the loss of step 16 is the first to show it."""
    monkeypatch.setattr(worker, "learning_rate", lambda step, *_: 3e-3 if step < 14 else 3.0)
    policy = {"window_steps": 8, "patience_steps": 3, "minimum_rise_nats": 1.0}
    config = make_config(steps=22, checkpoint_every_steps=5, keep_checkpoints=9, on_spike=policy)
    with pytest.raises(TrainingDivergedError, match="step 18: the losses of 3 steps in a row") as raised:
        _run(config, copy_report)
    folder = checkpoints.folder_of(config.output)
    assert [step for step, _ in checkpoints.complete_checkpoints(folder)] == [5, 10, 15]
    assert "The last good checkpoint is " + checkpoints.newest(folder)[1] in str(raised.value)
    with pytest.raises(TrainingDivergedError, match="step 18: "):  # resumed, it decides alike
        _run(config, copy_report)
    warned = config.model_copy(update={"on_spike": config.on_spike.model_copy(update={"action": "warn"})})
    caplog.clear()
    assert len(_run(warned, copy_report).records) == 22
    told = [message.split(":")[0] for message in caplog.messages if "the loss spikes" in message]
    assert told == ["step 16", "step 18"]  # when it begins, and when the patience ends
    assert 20 not in [step for step, _ in checkpoints.complete_checkpoints(folder)]


@pytest.mark.parametrize(
    ("steps", "told"), [(16, "step 16: the loss of the run's last"), (17, "step 17: the losses of 2")]
)
def test_a_run_that_ends_in_a_spike_exports_nothing_and_keeps_the_last_good_checkpoint(
    make_config, copy_report, monkeypatch, steps, told
):
    """As above, but the run ends before the patience does."""
    monkeypatch.setattr(worker, "learning_rate", lambda step, *_: 3e-3 if step < 14 else 3.0)
    policy = {"window_steps": 8, "patience_steps": 3, "minimum_rise_nats": 1.0}
    kept = {"checkpoint_every_steps": 5, "keep_checkpoints": 1, "keep_best_checkpoint": False}
    config = make_config(steps=steps, on_spike=policy, **kept)
    folder = checkpoints.folder_of(config.output)
    for _ in range(2):  # resumed, it decides alike
        with pytest.raises(TrainingDivergedError, match=rf"{told} .*checkpoints/step-000015"):
            _run(config, copy_report)
        assert [step for step, _ in checkpoints.complete_checkpoints(folder)] == [15]
        assert not Path(config.output, "model.safetensors").exists()
    warned = config.model_copy(update={"on_spike": config.on_spike.model_copy(update={"action": "warn"})})
    assert len(_run(warned, copy_report).records) == steps
    assert Path(config.output, "model.safetensors").exists()


def test_a_checkpoint_that_a_spike_put_off_is_written_when_the_loss_has_fallen(make_config, copy_report, monkeypatch):
    found = iter([0] * 3 + [1, 2] + [0] * 3)
    monkeypatch.setattr(worker, "spiking_steps", lambda losses, policy: next(found))
    config = make_config(steps=8, checkpoint_every_steps=4, keep_checkpoints=9)
    _run(config, copy_report)
    steps = [step for step, _ in checkpoints.complete_checkpoints(checkpoints.folder_of(config.output))]
    assert steps == [6, 8]  # due after step 4, which spiked, as did step 5


@pytest.mark.parametrize(("loss", "norm"), [(float("nan"), 1.0), (2.0, float("inf"))])
def test_what_is_not_finite_stops_the_run_before_it_is_kept(make_config, copy_report, monkeypatch, loss, norm):
    taken = resume.Engine.train_step

    def train_step(engine, batches, rate):
        return (loss, 100, norm) if rate == 6.0 else taken(engine, batches, rate)

    monkeypatch.setattr(worker, "learning_rate", lambda step, *_: float(step + 1) if step == 5 else 1e-3)
    monkeypatch.setattr(resume.Engine, "train_step", train_step)
    config = make_config(steps=8, checkpoint_every_steps=2, on_spike=None)
    with pytest.raises(TrainingDivergedError, match=r"step 6: the .* is (nan|inf)\. .*checkpoints/step-000004"):
        _run(config, copy_report)


def test_a_full_disk_is_told_by_name_and_the_run_goes_on_once_there_is_room(make_config, copy_report, monkeypatch):
    config = make_config(steps=6, checkpoint_every_steps=2)
    written = resume.Engine.save

    def full(engine, folder):
        written(engine, folder)
        if len(checkpoints.complete_checkpoints(checkpoints.folder_of(config.output))) == 1:
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")  # torch 2.13's

    monkeypatch.setattr(resume.Engine, "save", full)
    with pytest.raises(DiskFullError, match=r"step-000004 .* full: .*TMPDIR\) has .* run the same again"):
        _run(config, copy_report)
    monkeypatch.setattr(resume.Engine, "save", written)

    def report_into_full(metrics, part, name):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(DiskFullError, match=r"step-000004 cannot be written"):
        worker.run(config, "digest", 0, 1, report_into_full)
    seen: list[int] = []
    assert len(_run(config, copy_report, lambda step, rank: seen.append(step)).records) == 6
    assert seen == [3, 4, 5, 6]


@pytest.mark.parametrize("remote", ["tokens", "tokenizer", "output"])
def test_a_disk_that_fills_under_a_copy_of_what_is_remote_is_told_as_one(make_config, tmp_path, monkeypatch, remote):
    """The last one stands for its checkpoint."""
    url = f"memory://full/{tmp_path.name}"

    def upload(folder, target):
        for file in (path for path in Path(folder).rglob("*") if path.is_file()):
            storage.write_bytes(f"{target}/{file.relative_to(folder).as_posix()}", file.read_bytes())

    def full(url, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    config = make_config(steps=2, warmup_steps=1)
    if remote == "output":
        config = config.model_copy(update={"output": url})
        worker.run(config, "digest", 0, 1, lambda metrics, part, name: upload(part, f"{url}/checkpoints/{name}"))
        copied = f"{url}/checkpoints/step-000002"
    else:
        copied = url if remote == "tokens" else "tiny or its tokenizer"
        upload(getattr(config, remote), url)
        config = config.model_copy(update={remote: url})
    monkeypatch.setattr(storage, "copy_files_to_local", full)
    monkeypatch.setattr(storage, "copy_to_local", full)  # each file of a pack,
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # which no earlier start has copied here
    with pytest.raises(
        DiskFullError, match=rf"a copy of {copied} cannot be .* has [\d,]+ MB left\. Free some, or set TMP"
    ):
        worker.run(config, "digest", 0, 1, lambda *_: None)


@pytest.mark.parametrize(("zero_stage", "clipped"), [(0, 1.0), (0, None), (1, None), (2, 1.0)])
def test_weights_that_a_broken_gradient_spoiled_are_never_a_checkpoint(
    make_config, copy_report, monkeypatch, zero_stage, clipped
):
    """The loss of the step is finite: it was taken before the update."""
    learn, steps = resume.Engine.train_step, []

    def spoiled(engine, batches, rate):
        steps.append(rate)
        parameter = next(iter(engine._engine.module.parameters()))
        hook = parameter.register_hook(lambda gradient: gradient * (float("nan") if len(steps) == 2 else 1))
        found = learn(engine, batches, rate)
        hook.remove()
        return found

    monkeypatch.setattr(resume.Engine, "train_step", spoiled)
    config = make_config(zero_stage=zero_stage, max_gradient_norm=clipped, checkpoint_every_steps=1)
    with pytest.raises(TrainingDivergedError, match=r"step 2: the gradient's norm .* checkpoint is .*step-000001"):
        _run(config, copy_report)
    assert [step for step, _ in checkpoints.complete_checkpoints(checkpoints.folder_of(config.output))] == [1]


def test_the_losses_so_far_are_written_at_a_checkpoint_and_when_the_run_diverges(make_config, copy_report, monkeypatch):
    monkeypatch.setattr(worker, "learning_rate", lambda step, *_: float("nan") if step == 4 else 1e-3)
    config, lines = make_config(steps=8, checkpoint_every_steps=2, on_spike=None), []
    losses, picture = Path(config.output) / "loss.jsonl", Path(config.output) / "loss.png"
    pictures = []

    def after(step, rank):
        lines.append(len(losses.read_text().splitlines()) if losses.exists() else 0)
        pictures.append(picture.read_bytes() if picture.exists() else b"")

    with pytest.raises(TrainingDivergedError, match="step 6: "):
        _run(config, copy_report, after)
    assert lines == [0, 2, 2, 4, 4]
    assert len(losses.read_text().splitlines()) == 5  # written again at the end
    assert [drawn[1:4] for drawn in pictures] == [b"", b"PNG", b"PNG", b"PNG", b"PNG"]
    assert pictures[1] == pictures[2] != pictures[3] == pictures[4] != picture.read_bytes()


def test_slow_steps_have_a_line_each(make_config, caplog, monkeypatch):
    caplog.set_level("INFO")
    now = [0.0]
    monkeypatch.setattr(worker.time, "perf_counter", lambda: now[0])
    for pace_s, told in ((1.0, [1, 10, 20]), (6.0, [1, 3, 5, 7, 9, 10, 12, 14, 16, 18, 20]), (11.0, [*range(1, 21)])):
        caplog.clear()
        lines = worker._Lines(make_config(steps=20, log_every_steps=10), 0, lambda _: None)
        for step in range(1, 21):
            now[0] += pace_s
            lines.show(
                StepRecord(
                    step=step, epoch=0, loss=1.0, learning_rate=0.1, gradient_norm=None, tokens=step, tokens_per_s=1.0
                )
            )
        assert [int(line.split()[1].partition("/")[0]) for line in caplog.messages] == told


def test_a_step_of_more_rows_than_there_are_is_told(make_config, copy_report, caplog):
    with caplog.at_level("INFO", logger=worker.__name__):
        _run(make_config(steps=3), copy_report)
        _run(make_config(steps=3, micro_batch=300), copy_report)
    told = [record for record in caplog.records if "rows, an epoch has" in record.message]
    assert [record.levelname for record in told] == ["INFO", "WARNING"]
    assert "lower micro_batch" in told[1].message


def test_running_out_of_memory_says_what_to_lower(make_config, copy_report, monkeypatch):
    def train_step(engine, batches, rate):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(resume.Engine, "train_step", train_step)
    monkeypatch.setattr(worker, "_memory_bytes", lambda *_: 2.07e9)
    with pytest.raises(TrainingMemoryError, match=r"step 1: out of memory: .* Set .*micro_batch: ") as raised:
        _run(make_config(micro_batch=64), copy_report)
    assert "CUDA out of memory" in str(raised.value.__cause__)


def test_a_run_is_deterministic_from_its_first_step_to_its_last_where_asked_for(make_config, copy_report, monkeypatch):
    """And ends with what to change where the model has an operation that cannot be."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    seen = []

    def after(step, rank):
        seen.append((torch.are_deterministic_algorithms_enabled(), os.environ.get("CUBLAS_WORKSPACE_CONFIG")))

    _run(make_config(steps=3, deterministic=True), copy_report, after)
    assert seen == [(True, ":4096:8")] * 3
    _run(make_config(steps=3), copy_report, after)
    assert seen[3:] == [(False, None)] * 3
    place = torch.zeros(1, dtype=torch.long)
    monkeypatch.setattr(resume.Engine, "train_step", lambda *_: torch.zeros(3).put_(place, torch.ones(1)))
    with pytest.raises(ConfigError, match=r"deterministic: .* put_ does not have a .*out of the recipe"):
        _run(make_config(steps=3, deterministic=True), copy_report)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        torch.AcceleratorError("CUDA error: out of memory"),
        torch.distributed.DistBackendError("NCCL error: unhandled cuda error: Cuda failure 2 'out of memory'"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8000000000 bytes."),
    ],
)
def test_running_out_of_memory_is_known_whoever_tells_it(error):
    assert worker._is_out_of_memory(error)
    assert not worker._is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))


def test_activation_checkpointing_gives_the_same_losses(make_config, copy_report, tmp_path):
    options = {"steps": 4, "base": "modern-tiny"}
    plain = _run(make_config(**options, output=str(tmp_path / "plain")), copy_report)
    again = make_config(**options, activation_checkpointing=True, output=str(tmp_path / "again"))
    assert _losses(_run(again, copy_report)) == _losses(plain)


def test_a_pack_made_anew_half_way_is_never_mixed_with_the_one_before(
    make_config, copy_report, tokenizer_folder, tmp_path
):
    """Neither by workers that start again within a run, nor by the same command again. As it was, it goes on."""
    tokenizer, folder = load_tokenizer(str(tokenizer_folder)), tmp_path / "pack"
    write_pack(folder, tokenizer)
    config = make_config(tokens=str(folder), steps=4, checkpoint_every_steps=2)
    began = inputs.check(config)

    def start(checked, after_step=None):
        digest = shards.pack_digest(began.pack)
        return worker.run(config, checked.run_digest, 0, 1, copy_report(config.output), after_step, pack_digest=digest)

    def kill(step: int, rank: int) -> None:
        if step == 3:
            raise _KilledError

    with pytest.raises(_KilledError):
        start(began, kill)
    write_pack(folder, tokenizer, seed=4)
    with pytest.raises(InputError, match="no longer the pack that this run began with"):
        start(began)
    again = inputs.check(config)
    with pytest.raises(CheckpointError, match="other options or inputs"):
        checkpoints.check_run(checkpoints.folder_of(config.output), again.run_digest)
    write_pack(folder, tokenizer)
    assert [record.step for record in start(inputs.check(config)).records] == [1, 2, 3, 4]


def test_another_runs_checkpoint_is_refused(make_config, copy_report):
    config = make_config(steps=3)
    _run(config, copy_report)
    with pytest.raises(CheckpointError, match="other options or inputs"):
        worker.run(config, "another", 0, 1, copy_report(config.output))


def test_a_checkpoint_without_its_last_file_counts_as_absent(make_config, copy_report):
    config = make_config(steps=4, checkpoint_every_steps=2)
    _run(config, copy_report)
    folder = checkpoints.folder_of(config.output)
    (Path(folder) / "step-000004" / "complete.json").unlink()
    assert checkpoints.newest(folder)[0] == 2
    checkpoints.remove_incomplete(folder)
    assert sorted(path.name for path in Path(folder).iterdir()) == ["step-000002"]


def test_a_pack_of_held_out_documents_only_is_refused(make_config, tmp_path, tokenizer_folder):
    from cert_ray.tokens.shards import PackedTokens
    from cert_ray.training.models import load_tokenizer
    from tests.training.conftest import write_pack

    write_pack(tmp_path / "pack", load_tokenizer(str(tokenizer_folder)), documents=1)
    config = make_config(tokens=str(tmp_path / "pack"))
    with pytest.raises(InputError, match="none of its 1 documents"):
        batches.training_rows(PackedTokens.open(config.tokens), config)


def test_what_a_killed_worker_left_below_tmpdir_is_removed_first(make_config, monkeypatch, tmp_path):
    left = tmp_path / "cert-ray-training-checkpoint-x"
    (left / "files").mkdir(parents=True)
    (left / "lock").touch()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(worker, "_run", lambda *_: list(tmp_path.iterdir()))
    (own,) = worker.run(make_config(), "digest", 0, 1, lambda *_: None)
    assert own.name.startswith("cert-ray-training-base-")
    assert not list(tmp_path.iterdir())
