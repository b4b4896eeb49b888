"""What the scripts in `jobs/` share: read the recipe, join the job's Ray, run one stage, report the outcome."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cert_ray.errors import CertRayError, ConfigError, InputError
from cert_ray.operations.on_ray import ray_session
from cert_ray.operations.recipe import Recipe, load_recipe
from cert_ray.telemetry import logs

_SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set for what `ray job submit` runs; this really is the variable's name


def run_job(stage: Callable[[Recipe], Any]) -> None:
    """Run `stage` on the recipe that the command line names; exit status 0, 1 (failed) or 2 (cannot be used).

    The last line on standard output is `{"outcome": "finished", ...}`, `{"outcome": "failed", "error": ...}` or, after
    Ctrl-C or `ray job stop`, `{"outcome": "stopped", "run": ...}` (with the usual exit status of such a program).
    """
    try:
        logs.configure()
        recipe = _recipe(sys.argv[1:])
        with logs.story(recipe.run, Path(sys.argv[0]).stem), ray_session():
            result = _unless_stopped(stage, recipe)
    except CertRayError as error:
        _tell({"outcome": "failed", "error": str(error)})
        raise SystemExit(2 if isinstance(error, ConfigError | InputError) else 1) from error
    except Exception as error:
        _tell({"outcome": "failed", "error": f"{type(error).__name__}: {error}"})
        raise  # with its traceback on standard error, and status 1
    _tell({"outcome": "finished", "run": recipe.run, "result": _brief(result)})


def _unless_stopped(stage: Callable[[Recipe], Any], recipe: Recipe) -> Any:
    try:
        return stage(recipe)
    except (KeyboardInterrupt, SystemExit):
        _tell({"outcome": "stopped", "run": recipe.run})
        raise


def _recipe(arguments: list[str]) -> Recipe:
    if not arguments:
        raise ConfigError(f"usage: {sys.argv[0]} RECIPE.yaml [KEY=VALUE ...]")
    recipe = load_recipe(arguments[0], arguments[1:])
    if _SUBMITTED in os.environ and "://" not in recipe.run and not recipe.run.startswith(("/", "~")):
        raise ConfigError(
            f"run: {recipe.run!r} would be in the job's own folder, which Ray copies to each node and removes. Give "
            "the whole path of a folder that all nodes see, or a URL, as in run=/shared/runs/mine"
        )
    return recipe


def _brief(result: Any) -> Any:
    if isinstance(result, dict):
        return {name: _brief(value) for name, value in result.items()}
    if isinstance(result, int | float):
        return result
    keys = ("rows_read", "rows_kept", "dropped", "folder", "steps", "last_loss", "held_out_loss")
    return {key: getattr(result, key) for key in keys if hasattr(result, key)}


def _tell(outcome: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(outcome) + "\n")
    sys.stdout.flush()
