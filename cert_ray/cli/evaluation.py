"""Verbs of evaluation: `evaluate`, `compare`, `export-tasks`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from cert_ray.cli.app import (
    Address,
    ApiKeyEnv,
    DryRun,
    Endpoint,
    EndpointModel,
    Generator,
    Limit,
    Mask,
    ModelFolder,
    Retrieve,
    Sketcher,
    app,
    show,
    source_options,
)
from cert_ray.errors import ConfigError


@app.command()
def evaluate(
    problems: Annotated[
        list[str],
        typer.Option(help="pandas-eval, numpy-eval, human-eval, or a file in their format or MBPP's; repeatable"),
    ],
    output: Annotated[str, typer.Option(help="folder for results.jsonl, report.html, ...")] = "evaluation",
    samples: Annotated[str | None, typer.Option(help="score this file of samples instead of sampling")] = None,
    model: ModelFolder = None,
    sketcher: Sketcher = None,
    generator: Generator = None,
    mask: Mask = None,
    endpoint: Endpoint = None,
    endpoint_model: EndpointModel = None,
    api_key_env: ApiKeyEnv = None,
    retrieve: Retrieve = None,
    n: Annotated[int, typer.Option(min=1, help="samples per problem")] = 1,
    temperature: Annotated[list[float] | None, typer.Option(help="repeatable; default: 0.2")] = None,
    max_tokens: int = 100,
    seed: int = 0,
    requirement: Annotated[
        list[str] | None, typer.Option(help="library for the sandbox, e.g. pandas==1.5.3; default: the benchmark's")
    ] = None,
    python: Annotated[str | None, typer.Option(help="interpreter for the sandbox, e.g. 3.11")] = None,
    unsafe: Annotated[bool, typer.Option("--unsafe", help="run generated code without bubblewrap")] = False,
    unfiltered: Annotated[
        bool, typer.Option("--unfiltered", help="run generated code even where libseccomp is missing")
    ] = False,
    rerank: Annotated[
        list[str] | None, typer.Option(help="logprob, syntax or agreement: add pass@1 of its first choice; repeatable")
    ] = None,
    calls_at_once: Annotated[int, typer.Option(min=1, help="requests to an endpoint at a time")] = 1,
    on_ray: Annotated[bool, typer.Option("--on-ray", help="run the programs as Ray tasks")] = False,
    limit: Limit = None,
    dry_run: DryRun = False,
    address: Address = None,
) -> None:
    """Score a model, an endpoint or samples: pass@k, in a sandbox. If killed, run it again.

    Example: cert-ray evaluate --problems PandasEval.jsonl.gz --samples samples.jsonl --requirement pandas==1.5.3
    """
    from cert_ray.evaluation.run import EvaluateConfig
    from cert_ray.operations import evaluating

    asked = {"mask": mask, "endpoint": endpoint, "endpoint_model": endpoint_model, "api_key_env": api_key_env}
    source = source_options(model, sketcher, generator, **asked, retrieve=retrieve)
    if samples is None:
        from cert_ray.operations.sources import Source

        source = Source.from_mapping(source, "evaluate").recorded
    elif source:
        raise ConfigError(f"--samples: the file has the samples already, so leave {', '.join(source)} out")
    temperatures = temperature or [0.2]
    options: dict[str, Any] = {"problems": problems[0], "output": output, "samples": samples, "n": n, "seed": seed}
    options |= {"temperature": None if samples else temperatures[0], "limit": limit, "source": source}
    options |= {"max_tokens": None if samples else max_tokens}
    options |= {"requirements": requirement or None}
    options |= {"execution": {"python": python, "unsafe": unsafe, "unfiltered": unfiltered}}
    config = EvaluateConfig.from_mapping(
        {**options, "rerank": rerank or (), "calls_at_once": calls_at_once}, "evaluate"
    )
    if dry_run:
        show({**config.model_dump(mode="json"), "problems": problems, "temperature": temperatures})
        raise typer.Exit
    sampling = {"max_tokens": max_tokens, "seed": seed}
    if on_ray or address:
        from cert_ray.evaluation.on_ray import execute_on_ray
        from cert_ray.operations.on_ray import ray_session, warn_of_unprotected_nodes

        with ray_session(address):
            warn_of_unprotected_nodes(unsafe, unfiltered)
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
    k: Annotated[list[int] | None, typer.Option("--k", help="repeatable; default: every k that both scored")] = None,
) -> None:
    """Put evaluations in one table. Published scores stand beside them; two are also compared problem by problem.

    Example: cert-ray compare runs/base runs/cert
    """
    from cert_ray.operations import evaluating

    if len(runs) < 2:
        raise ConfigError("compare: name two evaluations or more.")
    typer.echo(evaluating.tabulate(runs, output))
    if len(runs) == 2:
        typer.echo(evaluating.compare(runs[0], runs[1], output, k).split("\n## ")[0].rstrip())
    typer.echo(f"report: {output}/table.html{f', {output}/compare.html' if len(runs) == 2 else ''}", err=True)


@app.command("export-tasks")
def export_tasks(
    problems: Annotated[list[str], typer.Option(help="as for evaluate; repeatable")],
    output: Annotated[str, typer.Option(help="folder for the task files")] = "tasks",
    n: Annotated[int, typer.Option(min=1, help="samples per problem, for lm-eval")] = 1,
    temperature: Annotated[float, typer.Option(min=0.0, help="for lm-eval")] = 0.0,
    dry_run: DryRun = False,
) -> None:
    """Write benchmarks as tasks of lm-eval and bigcode's harness. cert-ray scores what these draw.

    Example: cert-ray export-tasks --problems pandas-eval --problems numpy-eval --output tasks
    """
    from cert_ray.evaluation import harness
    from cert_ray.evaluation.fetch import find_problems

    if dry_run:
        show({"problems": problems, "output": output, "n": n, "temperature": temperature})
        raise typer.Exit
    names = harness.export_tasks([find_problems(one) for one in problems], output, n, temperature)
    typer.echo(
        f"lm-eval run --include_path {output} --tasks {','.join(names)} --model hf --model_args pretrained=MODEL"
    )
