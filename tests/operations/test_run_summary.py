"""The page of a run: what `status` says, what manifests count, who did what; links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from cert_ray import cli, storage
from cert_ray.operations.recipe import Recipe, RunFolders
from cert_ray.operations.run_summary import render_summary
from cert_ray.telemetry import logs
from tests.operations.test_status import finish, recipe

__all__ = ["recipe"]  # the fixture


def test_the_page_of_a_run_in_the_middle(recipe: Recipe, tmp_path: Path) -> None:
    folders = RunFolders(recipe.run)
    for stage in ("documents", "dedup", "dataset"):
        finish(storage.join(folders.run, stage), stage)
    finish(storage.join(folders.run, "tokens", "base"), "tokens")
    storage.write_text(storage.join(folders.dataset, "card", "card.html"), "<p>card")
    Path(folders.model("base")).mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(Path(folders.model("base")) / "loss.png")
    storage.write_text(storage.join(folders.model("base"), "README.md"), "card")
    storage.write_text(storage.join(folders.model("base"), "loss.jsonl"), "{}")
    with pytest.raises(ValueError, match="no"), logs.story(folders.run, "tokenizer"):
        raise ValueError("no <vocabulary>")
    assert CliRunner().invoke(cli.app, ["summary", str(tmp_path / "recipe.yaml")]).exit_code == 0
    page = (Path(folders.run) / "summary.html").read_text()
    assert "cert-ray tokenizer RECIPE" in page
    assert "too_short 3" in page  # one of each of three shards
    assert "D [tokenizer] tokenizer failed: no &lt;vocabulary&gt;" in page
    assert re.search(r'class="failed">failed', page)
    assert '<tr><td>tokens/base</td><td class="number">' in page  # its rows, besides how far it is
    assert "data:image/png;base64," in page
    assert not re.search(r"(?:href|src)=.(?:https?:)?//", page)
    links = re.findall(r'href="([^"]+)"', page)
    assert "dataset/card/card.html" in links
    assert [link for link in links if not (Path(folders.run) / link).exists()] == []


def test_a_run_that_has_not_begun_has_a_page(recipe: Recipe) -> None:
    page = render_summary(recipe)
    assert "cert-ray preprocess RECIPE" in page
    assert "Who did what" not in page
