"""The verb of evaluation: `evaluate`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from cert_ray.cli.app import DryRun, Generator, Limit, ModelFolder, Sketcher, app, show
from cert_ray.cli.serving import completer


@app.command()
def evaluate(
    problems: Annotated[str, typer.Option(help="PandasEval, NumpyEval or HumanEval format, .jsonl or .jsonl.gz")],
    output: Annotated[str, typer.Option(help="folder for results.jsonl, report.html, ...")] = "evaluation",
    samples: Annotated[str | None, typer.Option(help="score this file of samples instead of sampling")] = None,
    model: ModelFolder = None,
    sketcher: Sketcher = None,
    generator: Generator = None,
    endpoint: Annotated[str | None, typer.Option(help="base URL of an OpenAI-compatible server")] = None,
    n: Annotated[int, typer.Option(min=1, help="samples per problem")] = 1,
    temperature: float = 0.2,
    max_tokens: int = 100,
    seed: int = 0,
    requirement: Annotated[
        list[str] | None, typer.Option(help="library of the sandbox, e.g. pandas==1.5.3; default: the benchmark's")
    ] = None,
    python: Annotated[str | None, typer.Option(help="interpreter of the sandbox, e.g. 3.11")] = None,
    unsafe: Annotated[bool, typer.Option("--unsafe", help="run generated code without bubblewrap")] = False,
    limit: Limit = None,
    dry_run: DryRun = False,
) -> None:
    """Score a model, a cascade, an endpoint or a file of samples: pass@k, in a sandbox.

    Example: cert-ray evaluate --problems PandasEval.jsonl.gz --samples samples.jsonl --requirement pandas==1.5.3
    """
    from cert_ray.evaluation.run import EvaluateConfig, run_evaluation

    options: dict[str, Any] = {"problems": problems, "output": output, "samples": samples, "n": n, "seed": seed}
    options |= {"temperature": None if samples else temperature, "limit": limit}
    options |= {"requirements": requirement or None, "execution": {"python": python, "unsafe": unsafe}}
    config = EvaluateConfig.from_mapping(options, "evaluate")
    if dry_run:
        show(config.model_dump(mode="json"))
        raise typer.Exit
    sampling = {"temperature": temperature, "max_tokens": max_tokens, "seed": seed}
    complete = None if samples else completer(model, sketcher, generator, endpoint, sampling)
    result = run_evaluation(config, complete)
    for k, value in result.pass_at_k.items():
        typer.echo(f"pass@{k} {value}")
    typer.echo(f"report: {output}/report.html", err=True)
