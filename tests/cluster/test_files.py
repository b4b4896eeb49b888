"""The shipped cluster files: authentication on, every Serve host named, and valid by Ray's own schemas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.autoscaler
import yaml

from cert_ray.operations.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"


def load(name: str) -> Any:
    return yaml.safe_load((CLUSTER / name).read_text())


def test_hosts_file_follows_rays_schema() -> None:
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(load("hosts.yaml"), schema)


def test_every_ray_start_asks_for_a_token_and_stays_on_loopback() -> None:
    starts = [line for path in CLUSTER.glob("*.yaml") for line in path.read_text().splitlines() if "ray start" in line]
    commands = [line for line in starts if not line.lstrip().startswith("#")]
    assert len(commands) == 2
    for line in starts:
        assert "RAY_AUTH_MODE=token" in line
        assert "0.0.0.0" not in line
    config = load("hosts.yaml")
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        assert commands[0] == "test -s ~/.ray/auth_token", "the token must exist before Ray starts"


@pytest.mark.parametrize("path", sorted(CLUSTER.glob("serve-*.yaml")), ids=lambda path: path.name)
def test_serve_files_name_their_host(path: Path) -> None:
    from ray.serve.schema import ServeDeploySchema

    config = load(path.name)
    ServeDeploySchema.model_validate(config)
    host = config["http_options"]["host"]
    keys = all(application["args"].get("api_keys_file") for application in config["applications"])
    assert host == "127.0.0.1" or keys, "reachable from outside, and no key is asked for"


@pytest.mark.parametrize("path", sorted((ROOT / "jobs").glob("*.yaml")), ids=lambda path: path.name)
def test_recipes_are_valid(path: Path) -> None:
    recipe = load_recipe(str(path))
    assert list(recipe.models) == ["base", "xl", "sketcher", "generator"]
    assert {recipe.train_config(name).learning_rate for name in recipe.models} == {5e-4}
