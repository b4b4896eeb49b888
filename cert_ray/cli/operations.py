"""Verbs that cross stages: `demo`, `reproduce`, `doctor`, `status`, `summary`, `drain`, `plan corpus`, `plan train`."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import typer

from cert_ray import retries, storage
from cert_ray.cli.app import Address, DryRun, Overrides, RecipeFile, app, load, perform, show
from cert_ray.errors import ConfigError, InputError

_ANSWERS_S = 5.0  # assumed: anyone who asks for a cluster's health wants to hear quickly that there is none
_STORE_ANSWERS_S = 10.0  # assumed: clients that are refused retry for some seconds, and then say why


@app.command()
def doctor(
    folder: Annotated[str, typer.Option(help="check the disk of this folder")] = ".",
    cluster: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="ask every node of this Ray cluster instead, e.g. auto")
    ] = None,
) -> None:
    """Check whether this machine, or a cluster, is fit. Looks at versions, GPU, memory, disk, token and sandbox.

    Example: cert-ray doctor --cluster auto
    """
    from cert_ray.operations.doctor import Level, examine

    if cluster is None:
        findings = examine(folder)
    else:
        from cert_ray.operations.nodes import judge_nodes, versions_here
        from cert_ray.operations.on_ray import ask_nodes, ray_session

        with ray_session(cluster, check_versions=False, patience_s=_ANSWERS_S):  # the findings name other versions
            findings = judge_nodes(ask_nodes(try_sandbox=True), versions_here())
    for finding in findings:
        typer.echo(f"{finding.level.value:5} {finding.name:20} {finding.found}")
        if finding.advice:
            typer.echo(f"{'':26} -> {finding.advice}")
    raise typer.Exit(1 if any(finding.level == Level.FAIL for finding in findings) else 0)


@contextmanager
def _storage_asked_once(run: str) -> Iterator[None]:
    """Report storage that refuses on one line, once its client's own retries are over; also storage that is silent."""
    try:
        with retries.asked_once():
            storage.resolve(run)  # which may import a driver
            retries.answered_within(_STORE_ANSWERS_S, lambda: storage.exists(run))
            yield
    except Exception as error:
        if not retries.is_of_storage(error):
            raise
        said = " ".join(f"{type(error).__name__}: {error}".split())
        cure = "Can its storage be reached from here, by this address and with these credentials?"
        raise InputError(run, said.rstrip("."), cure) from error


@app.command()
def status(
    recipe: RecipeFile,
    overrides: Overrides = None,
    story: Annotated[bool, typer.Option("--story", help="first every line that the run's jobs kept, in order")] = False,
) -> None:
    """Show how far a run is, and how to continue it. Read from its folder, with what its last job did and where.

    Example: cert-ray status jobs/numpy.yaml --set run=s3://bucket/runs/numpy
    """
    from cert_ray.operations.status import render_status, run_status
    from cert_ray.operations.story import last_job, read_story, render_line

    resolved = load(recipe, overrides, None)
    repeated = [part for assignment in overrides or () for part in ("--set", assignment)]
    with _storage_asked_once(resolved.run):
        told = [render_line(line) for line in read_story(resolved.run)] if story else []
        told.append(render_status(run_status(resolved), shlex.join([recipe, *repeated]), last_job(resolved.run)))
    for text in told:
        typer.echo(text)


@app.command()
def summary(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Write a page about a run, RUN/summary.html. It has progress, rows, losses, a history, and links to reports.

    Example: cert-ray summary jobs/numpy.yaml
    """
    from cert_ray.operations.run_summary import write_summary

    typer.echo(write_summary(load(recipe, overrides, None)))


@app.command()
def drain(
    when: Annotated[
        Literal["now", "aws", "gcp"], typer.Option(help="now, or once this cloud gives notice to its spot machine")
    ] = "now",
    within_s: Annotated[float, typer.Option(min=0, help="with now: seconds until this node is gone")] = 100.0,
) -> None:
    """Announce that this node will be taken away. Training writes a checkpoint, and nothing new starts here.

    The command ends when the time is over, so that a pod stays that long, or as soon as Ray has ended here, as it does
    once nothing runs. The cluster is that of RAY_ADDRESS, else of the Ray that runs here. A head is never drained.

    Example: cert-ray drain --when aws
    """
    from cert_ray.operations import leaving
    from cert_ray.operations.on_ray import node_here

    node_id, address = node_here()  # now: there may be little time later
    left = within_s if when == "now" else leaving.wait_for_notice(when)
    leaving.drain(node_id, address, left)


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
    storage_mb_per_s: Annotated[float | None, typer.Option(help="MB/s that storage moves for each node")] = None,
    node_hour_price: Annotated[
        float | None, typer.Option(help="price of a node for an hour, in any currency; default: show no cost")
    ] = None,
    costs: Annotated[str | None, typer.Option(metavar="FILE", help="another measurement than cert-ray's own")] = None,
) -> None:
    """Predict time, memory, bytes moved and disk of preprocessing, per stage, from measured costs.

    Example: cert-ray plan corpus --files 60.6e6 --bytes 330e9 --nodes 16 --cores 32
    """
    from cert_ray.operations.plan import PlanConfig, load_costs, make_plan, render_plan

    options = {"files": files, "size_bytes": size_bytes, "nodes": nodes, "cores": cores}
    if node_hour_price is not None:
        options["node_hour_price"] = node_hour_price
    if storage_mb_per_s is not None:
        options["storage_bytes_per_s"] = storage_mb_per_s * 1e6
    typer.echo(render_plan(make_plan(PlanConfig.from_mapping(options, "plan corpus"), load_costs(costs))))


@plan.command("train")
def plan_train(
    recipe: RecipeFile,
    model: Annotated[list[str] | None, typer.Option(help="a model of the recipe; default: all")] = None,
    gpu: Annotated[
        str, typer.Option(help="a100, a100-40gb, a10, h100, h100-nvl, h100-pcie, h200, l4 or rtx4090")
    ] = "h100",
    mfu: Annotated[
        float | None,
        typer.Option(min=0.01, max=1, help="share of the GPU's peak that is reached; default: the measured range"),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Predict memory per worker and time per step of each model, with and without activation checkpointing.

    Example: cert-ray plan train jobs/numpy.yaml --model base --gpu a100
    """
    resolved = load(recipe, overrides, None)
    from cert_ray.operations.plan_train import render_training

    typer.echo(render_training(resolved, model or list(resolved.models), gpu, mfu))


@app.command()
def reproduce(
    recipe: RecipeFile,
    only: Annotated[
        list[str] | None, typer.Option(help="train, base, xl or cert: do only this; default: all, and the report")
    ] = None,
    answers_only: Annotated[
        bool,
        typer.Option(
            "--answers-only",
            help="once trained, let models answer but run no program; run these later, elsewhere, without it",
        ),
    ] = False,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    address: Address = None,
) -> None:
    """Test the paper's claim: base, XL and CERT side by side. All start from one base and learn from equal tokens.

    Trains what is not trained, evaluates base, XL and CERT greedily and (with claim.n) sampled, and writes scores with
    intervals, differences and cost to RUN/claim. What is finished is reused.

    Example: cert-ray reproduce jobs/smollm2.yaml --set claim.n=20
    """
    from cert_ray.operations.claim import SYSTEMS, check_claim, models_to_train, seeded

    resolved = load(recipe, overrides, None)
    check_claim(resolved)
    if wrong := sorted(set(only or []) - {"train", *SYSTEMS}):
        raise ConfigError(f"--only {', '.join(wrong)}: unknown; known are train, {', '.join(SYSTEMS)}")
    from cert_ray.operations import reproduce as reproducing

    if dry_run or only is None or "train" in only:
        what = f"train {', '.join(models_to_train(seeded(resolved)))} into {resolved.run}/models, and evaluate"
        perform("reproduce", resolved, address, dry_run, what, lambda: reproducing.train_models(resolved))
    systems = [name for name in SYSTEMS if only is None or name in only]
    reproducing.evaluate_parts(resolved, systems, answers_only=answers_only)
    if answers_only and systems:
        kept = f"{', '.join(systems)} answered, kept in {reproducing.claim_folder(resolved)}"
        others = " ".join(f"--only {system}" for system in systems)
        typer.echo(f"{kept}; to run them, repeat the command with {others} instead of --answers-only", err=True)
        raise typer.Exit
    from cert_ray.operations.claim_report import missing_parts, write_report

    if missing := missing_parts(resolved):
        typer.echo(f"no report yet: {', '.join(missing)} not evaluated", err=True)
        raise typer.Exit
    report = write_report(resolved)
    show({"report": f"{reproducing.claim_folder(resolved)}/claim.md", "comparisons": _brief(report["comparisons"])})


def _brief(comparisons: list[dict[str, Any]]) -> dict[str, str]:
    """Each difference of the pooled scores in percentage points, with its interval."""
    pooled = [row for row in comparisons if row["benchmark"] == "pooled"]
    return {
        f"{row['mode']}: {row['pair'][1]} - {row['pair'][0]}": (
            f"{100 * row['difference']['value']:+.2f} "
            f"({100 * row['difference']['low']:+.2f} to {100 * row['difference']['high']:+.2f})"
        )
        for row in pooled
    }


@app.command()
def demo(
    output: Annotated[str, typer.Option(help="folder of the run; finished stages in it are reused")] = "demo",
    small: Annotated[bool, typer.Option("--small", help="less input and fewer steps, for a quick look")] = False,
    max_input_bytes: Annotated[int | None, typer.Option(help="read at most this many bytes of Python files")] = None,
    base_steps: Annotated[int | None, typer.Option(help="training steps of the base model")] = None,
    dry_run: DryRun = False,
    address: Address = None,
) -> None:
    """Run everything, small, on this machine's Python files. It makes a dataset, three models, an answer and pass@k.

    Example: cert-ray demo --output demo
    """
    from cert_ray.operations.demo import SMALL, DemoConfig, demo_recipe, render_summary, run_demo

    given = {"output": output, "max_input_bytes": max_input_bytes, "base_steps": base_steps}
    options = SMALL.model_dump() if small else {}
    config = DemoConfig.from_mapping({**options, **{k: v for k, v in given.items() if v is not None}}, "demo")
    summary = perform(
        "demo", demo_recipe(config), address, dry_run, f"run the demo into {output}", lambda: run_demo(config)
    )
    typer.echo(render_summary(summary))
