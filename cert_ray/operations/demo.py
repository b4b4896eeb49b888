"""`cert-ray demo`: the whole of CERT, small, on Python files that this machine has anyway.

In: the standard library and installed packages. Out, in one folder: the annotated dataset with its card, a tokenizer, a
base model, a sketcher and a generator, an answer over HTTP, pass@k of a few problems, and `summary.md`. Every stage is
the real one, only small; the next run reuses what is finished.
"""

from __future__ import annotations

import importlib.resources
import importlib.util
import json
import logging
import sysconfig
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import pydantic
import yaml

from cert_ray import storage
from cert_ray.config import Config
from cert_ray.errors import CertRayError, ConfigError
from cert_ray.manifests import Manifest
from cert_ray.operations import pipeline
from cert_ray.operations.recipe import Recipe, RunFolders, recipe_from
from cert_ray.tokens.encoding import View
from cert_ray.training import cpu_speed
from cert_ray.training.on_ray import TrainResult

logger = logging.getLogger(__name__)

# Installed with cert-ray, and they use NumPy or Pandas: the files that the sketcher and the generator read.
_PACKAGES = ("numpy", "pandas", "scipy", "matplotlib", "networkx", "pyarrow", "fsspec", "transformers", "ray")
_PROMPT = "import numpy as np\n\n\ndef column_means(values):\n    # mean of every column of a matrix\n    return "


class DemoConfig(Config):
    """How much the demo does. Measured on two cores with bf16: 200 s with the defaults, 170 s with `SMALL`."""

    output: str = "demo"
    max_input_bytes: int = pydantic.Field(default=24_000_000, gt=0)
    base_steps: int = pydantic.Field(default=120, gt=10)
    library_steps: int = pydantic.Field(default=40, gt=10)  # of the sketcher and of the generator
    samples: int = pydantic.Field(default=4, ge=1)  # completions per problem


SMALL = DemoConfig(max_input_bytes=9_000_000, base_steps=80, library_steps=15, samples=2)


@dataclass(slots=True)
class Summary:
    """What the demo reports at its end, in the order in which it happened."""

    output: str
    dataset: Manifest | None = None
    tokenizer: dict[str, Any] = field(default_factory=dict)
    models: dict[str, TrainResult] = field(default_factory=dict)
    unigram_entropy: float = 0.0
    request: dict[str, Any] = field(default_factory=dict)
    response: dict[str, Any] = field(default_factory=dict)
    pass_at_k: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def demo_recipe(config: DemoConfig) -> Recipe:
    """The demo's recipe: an ordinary one, which `cert-ray train` and the other verbs take as well."""
    small = {
        "micro_batch": 8,
        "gradient_accumulation": 1,
        "workers": 2,
        "zero_stage": 1,
        "precision": cpu_speed.faster_precision(),
        "log_every_steps": 20,
    }
    continued = {"start": "base"}
    later = {**small, "steps": config.library_steps, "learning_rate": 5e-4, "warmup_steps": config.library_steps // 10}
    first = {**small, "steps": config.base_steps, "learning_rate": 2e-3, "warmup_steps": config.base_steps // 10}
    return recipe_from(
        {
            "run": str(Path(config.output).absolute()),
            "libraries": ["numpy", "pandas"],
            "preprocess": {"sources": _sources(config)},
            "tokenizer": {"vocab_size": 4_096, "sample_bytes": 12_000_000},
            "context_tokens": 256,
            "models": {
                "base": {"start": "tiny", "view": "base", "train": first},
                "sketcher": {**continued, "view": "sketcher", "train": later},
                "generator": {**continued, "view": "generator", "train": later},
            },
        },
        "demo",
    )


def _sources(config: DemoConfig) -> dict[str, Any]:
    """NumPy first, so that even the smallest cap holds users of it, then the standard library, then more packages."""
    found = [importlib.util.find_spec(name) for name in _PACKAGES]
    # As text: a package that loads its parts lazily (transformers) gives a `Path` once it has been imported.
    folders = [str(spec.submodule_search_locations[0]) for spec in found if spec and spec.submodule_search_locations]
    return {
        "inputs": [folders[0], sysconfig.get_paths()["stdlib"], *folders[1:]],
        "exclude": ["site-packages/*", "dist-packages/*", "*/tests/*", "tests/*", "test/*", "*/lib2to3/*"],
        "max_input_bytes": config.max_input_bytes,
        "unit_bytes": 2_000_000,
    }


def run_demo(config: DemoConfig) -> Summary:
    """Run every stage, serve, ask, score. Ray must be running.

    Raises:
        CertRayError: when a stage fails, or the base model's held-out loss is not below the unigram entropy of the
            same tokens, which a model that learned nothing but frequencies would reach.
    """
    recipe = demo_recipe(config)
    folders = RunFolders(recipe.run)
    summary = Summary(output=folders.run)
    storage.write_text(
        storage.join(folders.run, "recipe.yaml"), yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
    )
    _stage(summary, "preprocess", lambda: _preprocess(recipe, summary))
    _stage(summary, "tokenizer", lambda: summary.tokenizer.update(pipeline.run_tokenizer(recipe).notes))
    _stage(summary, "pack", lambda: _pack(recipe, summary))
    for name in recipe.models:
        _stage(summary, f"train {name}", lambda name=name: _train(recipe, name, summary))
    _check_learned(summary)
    _stage(summary, "serve and ask", lambda: _serve_and_ask(folders, summary))
    _stage(summary, "evaluate", lambda: _evaluate(config, folders, summary))
    storage.write_text(storage.join(folders.run, "summary.md"), render_summary(summary))
    return summary


def _stage(summary: Summary, name: str, work: Any) -> None:
    logger.info("---- %s", name)
    started_s = time.monotonic()
    work()
    summary.seconds[name] = time.monotonic() - started_s


def _preprocess(recipe: Recipe, summary: Summary) -> None:
    summary.dataset = pipeline.run_preprocess(recipe)


def _pack(recipe: Recipe, summary: Summary) -> None:
    packed = pipeline.run_views(recipe)
    summary.unigram_entropy = float(packed[View.BASE].notes["held_out_unigram_entropy_nats"])


def _train(recipe: Recipe, name: str, summary: Summary) -> None:
    summary.models[name] = pipeline.run_train(recipe, name)


def _check_learned(summary: Summary) -> None:
    held_out = summary.models["base"].held_out_loss
    if held_out is None or not held_out < summary.unigram_entropy:
        raise CertRayError(
            f"the base model's held-out loss is {held_out} nats per token, not below the {summary.unigram_entropy:.3f} "
            "of single-token frequencies: it has learned nothing. Give it more --base-steps or more input bytes."
        )


def _serve_and_ask(folders: RunFolders, summary: Summary) -> None:
    try:
        import openai
    except ImportError as error:
        raise ConfigError("the demo needs the OpenAI client: pip install 'cert-ray[client]'") from error
    from cert_ray.serving.deployment import ServerConfig
    from cert_ray.serving.on_ray import start_server

    models = {"sketcher": folders.model("sketcher"), "generator": folders.model("generator")}
    with start_server(ServerConfig.from_mapping(models, "demo")) as served:
        client = openai.OpenAI(base_url=f"{served.base_url}/v1", api_key="unused", max_retries=2)
        summary.request = {"model": "cert", "prompt": _PROMPT, "n": 4, "max_tokens": 48, "temperature": 0.2, "seed": 1}
        response = client.completions.create(**summary.request)
        summary.response = json.loads(response.model_dump_json())
        client.close()


def _evaluate(config: DemoConfig, folders: RunFolders, summary: Summary) -> None:
    from cert_ray.evaluation.run import EvaluateConfig, run_evaluation
    from cert_ray.serving.answering import ModelConfig
    from cert_ray.serving.completers import CompleterConfig, complete_with_models

    problems = importlib.resources.files("cert_ray.operations") / "demo_problems.jsonl"
    target = storage.join(folders.evaluation, "problems.jsonl")
    storage.write_text(target, problems.read_text(encoding="utf-8"))
    models = ModelConfig(sketcher=folders.model("sketcher"), generator=folders.model("generator"))
    result = run_evaluation(
        EvaluateConfig(problems=target, output=folders.evaluation, n=config.samples, k=(1,), temperature=0.2),
        complete_with_models(models, CompleterConfig(max_tokens=32)),
    )
    summary.pass_at_k = {f"pass@{k}": value for k, value in result.pass_at_k.items()}


def render_summary(summary: Summary) -> str:
    """The summary as Markdown, which reads well on a terminal too."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("cert_ray.operations", ""),
        autoescape=False,  # Markdown for the terminal
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    raw = json.dumps(summary.response, indent=1)
    return environment.get_template("demo_summary.md.j2").render(s=summary, raw_response=raw)
