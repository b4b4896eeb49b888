"""`cert-ray status` says of a folder what is finished, how much of the rest is done, and what to run next."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from cert_ray import cli, manifests, retries, storage
from cert_ray.cli import operations
from cert_ray.config import Config
from cert_ray.errors import InputError
from cert_ray.manifests import ShardReport
from cert_ray.operations.recipe import Recipe, load_recipe
from cert_ray.operations.status import State, next_verb, render_status, run_status
from cert_ray.training import checkpoints

SHARDS = 3


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    train = {"steps": 40, "warmup_steps": 4, "micro_batch": 1}
    options = {
        "run": str(tmp_path / "run"),
        "libraries": ["numpy"],
        "preprocess": {"sources": {"inputs": ["corpus"]}},
        "models": {
            "base": {"start": "tiny", "view": "base", "train": train},
            "sketcher": {"start": "base", "view": "sketcher", "train": train},
        },
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(options))
    return load_recipe(str(tmp_path / "recipe.yaml"))


def reports(folder: str, count: int) -> list[ShardReport]:
    found = [
        ShardReport(
            shard=f"shard-{n:05d}", unit_digest="d", files=(), rows_read=4, rows_kept=3, dropped={"too_short": 1}
        )
        for n in range(count)
    ]
    for report in found:
        storage.write_text(storage.join(folder, "reports", f"{report.shard}.json"), report.model_dump_json())
    return found


def finish(folder: str, stage: str, count: int = SHARDS, **notes: float) -> None:
    manifests.write_manifest(folder, manifests.summarize(stage, Config(), "inputs", reports(folder, count), notes))


def test_an_empty_run_waits_for_preprocessing(recipe: Recipe) -> None:
    stages = run_status(recipe)
    preprocessing = ["documents", "dedup", "dataset"]
    training = ["tokenizer", "tokens/base", "tokens/sketcher", "models/base", "models/sketcher"]
    assert [stage.stage for stage in stages] == preprocessing + training
    assert {stage.state for stage in stages} == {State.WAITING}
    assert next_verb(stages) == "preprocess"


def test_each_stage_is_told_by_what_it_left(recipe: Recipe) -> None:
    run = recipe.run
    finish(f"{run}/documents", "documents")
    reports(f"{run}/dedup", 2)
    by_name = {stage.stage: stage for stage in run_status(recipe)}
    assert (by_name["documents"].state, by_name["documents"].detail) == (State.FINISHED, "9 of 12 rows kept")
    assert (by_name["dedup"].state, by_name["dedup"].done, by_name["dedup"].total) == (State.STARTED, 2, SHARDS)
    assert (by_name["dataset"].state, by_name["dataset"].total) == (State.WAITING, SHARDS)
    assert next_verb(list(by_name.values())) == "preprocess"

    for stage in ("dedup", "dataset", "tokenizer"):
        finish(f"{run}/{stage}", stage)
    for view in ("base", "sketcher"):
        finish(f"{run}/tokens/{view}", "tokens")
    folder = checkpoints.folder_of(f"{run}/models/base")
    for step in (10, 20):
        storage.write_text(storage.join(folder, checkpoints.name_of_step(step), "part-00000.json"), "{}")
        checkpoints.mark_complete(storage.join(folder, checkpoints.name_of_step(step)), 1)
    storage.write_text(storage.join(folder, checkpoints.name_of_step(30), "part-00000.json"), "{}")  # cut short
    by_name = {stage.stage: stage for stage in run_status(recipe)}
    base = by_name["models/base"]
    assert (base.state, base.done, base.total, base.unit) == (State.STARTED, 20, 40, "steps")
    assert next_verb(list(by_name.values())) == "train"

    for name in ("base", "sketcher"):
        finish(f"{run}/models/{name}", "model", 1, last_loss=2.5, held_out_loss=2.25)
    stages = run_status(recipe)
    assert {stage.state for stage in stages} == {State.FINISHED}
    assert "loss 2.5000, held out 2.2500 nats/token" in render_status(stages, "recipe.yaml")
    assert render_status(stages, "recipe.yaml").endswith("everything is finished")


def test_another_versions_stage_is_named_not_hidden(recipe: Recipe) -> None:
    finish(f"{recipe.run}/documents", "documents")
    manifest = Path(recipe.run) / "documents" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"schema_version": ', '"schema_version": 9'))
    stages = run_status(recipe)
    assert stages[0].state == State.UNUSABLE
    assert "schema_version" in render_status(stages, "recipe.yaml")


def test_the_verb_prints_the_table_and_the_next_command(recipe: Recipe, tmp_path: Path) -> None:
    finish(f"{recipe.run}/documents", "documents")
    result = CliRunner().invoke(cli.app, ["status", str(tmp_path / "recipe.yaml")])
    assert result.exit_code == 0, result.output
    assert "documents        finished  3 of 3 shards" in result.output
    assert result.output.rstrip().endswith(f"next: cert-ray preprocess {tmp_path / 'recipe.yaml'}")


def test_the_next_command_names_the_run_as_it_was_asked_for(recipe: Recipe, tmp_path: Path) -> None:
    other = tmp_path / "another run"
    result = CliRunner().invoke(cli.app, ["status", str(tmp_path / "recipe.yaml"), "--set", f"run={other}"])
    assert result.output.rstrip().endswith(f"next: cert-ray preprocess {tmp_path / 'recipe.yaml'} --set 'run={other}'")


def test_storage_that_does_not_answer_is_one_line_and_a_failure(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(url: str) -> bool:
        raise ConnectionRefusedError("could not connect\nto the endpoint")

    monkeypatch.setattr(manifests, "is_finished", retries.tried_again(refuse))
    monkeypatch.setattr(retries, "_wait", lambda _: pytest.fail("somebody waits"))
    result = CliRunner().invoke(cli.app, ["status", str(tmp_path / "recipe.yaml")])
    assert isinstance(result.exception, InputError)
    told = str(result.exception)
    assert told.startswith(f"{recipe.run}: ConnectionRefusedError: could not connect to the endpoint. Can its storage")


def test_storage_that_takes_the_question_and_says_nothing_is_not_waited_for(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    released, exists = threading.Event(), storage.exists
    monkeypatch.setattr(operations, "_STORE_ANSWERS_S", 0.2)
    monkeypatch.setattr(storage, "exists", lambda url: released.wait(60) if url == recipe.run else exists(url))
    monkeypatch.setattr(manifests, "is_finished", lambda _: pytest.fail("it is asked further"))
    try:
        result = CliRunner().invoke(cli.app, ["status", str(tmp_path / "recipe.yaml")])
    finally:
        released.set()
    assert isinstance(result.exception, InputError)
    assert str(result.exception).startswith(
        f"{recipe.run}: TimeoutError: it does not answer within 0 s. Can its storage be"
    )


def test_a_fault_of_ours_is_not_told_as_the_storages(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(url: str) -> bool:
        raise KeyError("a fault")

    monkeypatch.setattr(manifests, "is_finished", fail)
    result = CliRunner().invoke(cli.app, ["status", str(tmp_path / "recipe.yaml")])
    assert isinstance(result.exception, KeyError)


def test_the_last_job_stands_above_what_is_next(recipe: Recipe) -> None:
    *_, last, what_next = render_status(run_status(recipe), "recipe.yaml", "pack on h, failed").splitlines()
    assert (last, what_next) == ("last job: pack on h, failed", "next: cert-ray preprocess recipe.yaml")
