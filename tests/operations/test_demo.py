"""The demo's recipe, without running it."""

from __future__ import annotations

from pathlib import Path

import transformers  # noqa: F401 - once it is imported, its folder is a `Path`

from cert_ray.operations.demo import SMALL, DemoConfig, demo_recipe


def test_the_demo_reads_this_machines_packages(tmp_path: Path) -> None:
    options = {**SMALL.model_dump(), "output": str(tmp_path / "demo")}
    recipe = demo_recipe(DemoConfig.from_mapping(options, "demo"))
    inputs = recipe.preprocess.sources.inputs
    assert Path(inputs[0]).name == "numpy"
    assert all(Path(folder).is_dir() for folder in inputs)
    assert {"base", "sketcher", "generator"} <= set(recipe.models)
