"""The recipes in jobs/ are what their comments say, and every verb would take them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from cert_ray import cli
from cert_ray.operations.claim import check_claim, models_to_train, seeded
from cert_ray.operations.recipe import load_recipe
from cert_ray.training.presets import PRESETS
from cert_ray.training.sampling import micro_batches

JOBS = Path(__file__).resolve().parents[2] / "jobs"
RECIPES = sorted(path.name for path in JOBS.glob("*.yaml"))


def test_every_recipe_stands_in_the_table() -> None:
    table = (JOBS / "README.md").read_text()
    assert [name for name in RECIPES if f"`{name}`" not in table] == []


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("verb", ["preprocess", "tokenizer", "pack", "train"])
def test_a_dry_run_takes_it(name: str, verb: str) -> None:
    result = CliRunner().invoke(cli.app, [verb, str(JOBS / name), "--dry-run"])
    assert result.exit_code == 0, result.output
    assert yaml.safe_load(result.output)["models"]


@pytest.mark.parametrize("name", RECIPES)
def test_what_a_recipe_has_beside_the_code_is_not_sent_with_jobs(name: str) -> None:
    recipe = load_recipe(str(JOBS / name))
    named = [recipe.run, *recipe.preprocess.sources.inputs, *recipe.outside_bases]
    beside = {f"/{path.split('/')[0]}" for path in named if not path.startswith("/")}
    sent = yaml.safe_load((JOBS.parent / "cluster" / "runtime-env.yaml").read_text())
    assert beside <= set(sent["excludes"]), "more than 100 MiB, and no job could be submitted"


@pytest.mark.parametrize("name", ["pandas.yaml", "numpy.yaml", "polars.yaml"])
def test_papers_four_models_at_papers_size(name: str) -> None:
    recipe = load_recipe(str(JOBS / name))
    assert {model.view.value for model in recipe.models.values()} == {"base", "xl", "sketcher", "generator"}
    base, xl = recipe.train_config("base"), recipe.train_config("xl")
    assert base.base in PRESETS
    assert (base.steps, xl.steps) == (200_000, 100_000)
    assert base.steps * base.rows_per_step * recipe.context_tokens == pytest.approx(100e9, rel=0.35)  # the paper: 100B
    trained = [recipe.train_config(one) for one in ("xl", "sketcher", "generator")]
    assert len({one.steps * one.rows_per_step for one in trained}) == 1
    assert {one.base for one in trained} == {base.output}


@pytest.mark.parametrize("name", RECIPES)
def test_what_trains_on_several_gpus_goes_on_with_half_of_them(name: str) -> None:
    """With half of them, too, every row counts that is computed; and spot nodes go more often than twice."""
    recipe = load_recipe(str(JOBS / name))
    for train in [recipe.train_config(model) for model in recipe.models]:
        if train.use_gpu and train.workers > 1:
            assert train.min_workers == train.workers // 2
            passes = micro_batches(train.rows_per_step, train.micro_batch, train.min_workers)
            assert passes * train.micro_batch * train.min_workers == train.rows_per_step
            assert train.max_failures >= 20
            assert train.checkpoint_every_steps is not None


def test_certg_reads_every_file_and_takes_over_the_bases_tokenizer() -> None:
    recipe = load_recipe(str(JOBS / "certg.yaml"))
    assert [recipe.view_libraries(view) for view in recipe.views] == [None, None]
    assert recipe.adopts_tokenizer


@pytest.mark.parametrize("name", ["smollm2.yaml", "smollm2-cpu.yaml"])
def test_one_model_of_both_stages_learns_from_as_much_as_each_of_the_claims(name: str) -> None:
    recipe = load_recipe(str(JOBS / name))
    made, claimed = recipe.train_config("context_first"), recipe.train_config("generator")
    assert recipe.models["context_first"].view == "context_first"
    assert (made.base, made.steps * made.rows_per_step) == (claimed.base, claimed.steps * claimed.rows_per_step)


def test_smollm2_measures_the_claim_from_one_base() -> None:
    recipe = load_recipe(str(JOBS / "smollm2.yaml"))
    claim = check_claim(recipe)
    assert (claim.n, len(claim.seeds), len(claim.benchmarks)) == (200, 3, 2)
    assert len(models_to_train(seeded(recipe))) == 3 * 3
    assert recipe.outside_bases == ["bases/smollm2-135m"]
    result = CliRunner().invoke(cli.app, ["reproduce", str(JOBS / "smollm2.yaml"), "--dry-run"])
    assert result.exit_code == 0, result.output
    assert "sketcher-seed-2" in result.output
