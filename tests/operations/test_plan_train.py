"""The plan of a recipe's models: a start is followed to its preset or folder, and nothing is trained."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from cert_ray import cli
from cert_ray.errors import ConfigError
from cert_ray.operations.plan_train import render_training
from cert_ray.operations.recipe import recipe_from
from cert_ray.training.presets import preset_config

RECIPE = Path(__file__).resolve().parents[2] / "jobs" / "numpy.yaml"


def _recipe(start: str, **train):
    models = {
        "base": {"start": start, "view": "base", "train": {"steps": 2_000, "precision": "bf16", **train}},
        "xl": {"start": "base", "view": "xl", "train": {"steps": 3_600, "warmup_steps": 0}},
    }
    sources = {"sources": {"inputs": ["corpus"]}}
    options = {"run": "run", "libraries": ["numpy"], "preprocess": sources, "models": models}
    return recipe_from(options | {"context_tokens": 256, "tokenizer": {"vocab_size": 4_096}}, "test")


def test_a_plan_shows_both_ways_and_follows_the_start():
    text = render_training(_recipe("tiny"), ["base", "xl"], "a100")
    assert "base: tiny, 2.6M parameters, bf16, ZeRO 1, 1 workers; 10 x 256 tokens per pass" in text
    assert "xl: base, 2.6M parameters, fp32" in text
    assert text.count("total, of 80 (a100)") == 2
    assert "does not fit" not in text


def test_times_are_a_range_with_its_source_unless_a_share_is_given():
    def seconds(text: str) -> list[str]:
        return next(line for line in text.splitlines() if "seconds per step" in line).split()[3:]

    recipe = _recipe("pycodegpt-110m", micro_batch=64)
    text = render_training(recipe, ["base"], "h100")
    assert "estimates" in text
    assert "18% to 44% of the peak, measured on one H100" in text
    least, to, most = seconds(text)[:3]
    assert to == "to"
    assert float(most) / float(least) == pytest.approx(0.44 / 0.18, rel=0.05)  # of two digits
    short = seconds(render_training(_recipe("tiny", micro_batch=1), ["base"], "h100"))
    assert 0 < float(short[0]) < float(short[2]) < 0.005
    given = render_training(recipe, ["base"], "h100", 0.18)
    assert seconds(given)[0] == most
    assert "18% of the peak, as given" in given


def test_what_does_not_fit_comes_with_advice():
    text = render_training(_recipe("modern-tiny", micro_batch=4_000, gradient_accumulation=1), ["base"], "l4")
    assert "does not fit. Set micro_batch: " in text


def test_a_folder_needs_its_config_only(tmp_path):
    preset_config("modern-tiny", 4_096, 256, 0, 1).save_pretrained(tmp_path)
    assert "2.6M parameters" in render_training(_recipe(str(tmp_path)), ["base"], "h100")


def test_unknown_names_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="--gpu k80"):
        render_training(_recipe("tiny"), ["base"], "k80")
    with pytest.raises(ConfigError, match="no 'other' in this recipe"):
        render_training(_recipe("tiny"), ["other"], "h100")
    with pytest.raises(ConfigError, match=r"config\.json could not be loaded"):
        render_training(_recipe(str(tmp_path)), ["base"], "h100")
    with pytest.raises(ConfigError, match="has none to plan"):
        render_training(_recipe("tiny"), [], "h100")


def test_the_verb_plans_a_shipped_recipe():
    result = CliRunner().invoke(cli.app, ["plan", "train", str(RECIPE), "--model", "xl", "--gpu", "a10"])
    assert result.exit_code == 0, result.output
    assert result.output.startswith("xl: base, 110.4M parameters, bf16, ZeRO 1, 8 workers")
    shown = CliRunner().invoke(cli.app, ["plan", "train", "--help"])
    assert "Example: cert-ray plan train" in " ".join(shown.output.split())
