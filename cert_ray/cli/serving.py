"""Verbs that answer prompts: `serve`, `generate`."""

from __future__ import annotations

import signal
import sys
from typing import Annotated

import typer

from cert_ray.cli.app import (
    Address,
    AnswerMode,
    ApiKeyEnv,
    DryRun,
    Endpoint,
    EndpointModel,
    Generator,
    Mask,
    ModelFolder,
    Retrieve,
    Sketcher,
    app,
    model_options,
    show,
    source_options,
)


@app.command()
def serve(
    model: ModelFolder = None,
    sketcher: Sketcher = None,
    generator: Generator = None,
    host: Annotated[str, typer.Option(help="any but loopback needs --api-keys-file")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    api_keys_file: Annotated[str | None, typer.Option(help="one key per line")] = None,
    name: Annotated[str, typer.Option(help="the model name that requests use")] = "cert",
    mode: AnswerMode = None,
    retrieve: Retrieve = None,
    dry_run: DryRun = False,
    address: Address = None,
) -> None:
    """Serve models over HTTP, as OpenAI's /v1/completions. A cascade (two models, or one for both), or a plain model.

    Runs until interrupted.

    Example: cert-ray serve --sketcher demo/models/sketcher --generator demo/models/generator
    """
    from cert_ray.operations.on_ray import ray_session
    from cert_ray.serving.deployment import ServerConfig
    from cert_ray.serving.on_ray import start_server

    options = {"host": host, "port": port, "model_name": name, "api_keys_file": api_keys_file}
    models = model_options(model, sketcher, generator)
    further = {
        **({"retrieve": {"docs": retrieve}} if retrieve else {}),
        **({"cascade": {"mode": mode}} if mode else {}),
    }
    given = {key: value for key, value in options.items() if value is not None}
    config = ServerConfig.from_mapping({**models, **further, **given}, "serve")
    if dry_run:
        show(config.model_dump(mode="json"))
        raise typer.Exit
    config.check_models()  # before Ray is started in vain
    with ray_session(address), start_server(config, checked=True) as served:
        typer.echo(f"serving {name} at {served.base_url}/v1/completions; Ctrl-C stops", err=True)
        signal.pause()


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="code to continue, or - for standard input")] = "-",
    model: ModelFolder = None,
    sketcher: Sketcher = None,
    generator: Generator = None,
    mask: Mask = None,
    endpoint: Endpoint = None,
    endpoint_model: EndpointModel = None,
    api_key_env: ApiKeyEnv = None,
    mode: AnswerMode = None,
    retrieve: Retrieve = None,
    n: Annotated[int, typer.Option(min=1, help="how many completions")] = 1,
    temperature: float = 0.2,
    max_tokens: int = 100,
    seed: int = 0,
    dry_run: DryRun = False,
) -> None:
    """Complete one prompt with local models or an endpoint.

    Example: cert-ray generate --endpoint http://127.0.0.1:8000 'import numpy as np\\nx = '
    """
    from cert_ray.evaluation.benchmarks import Answer
    from cert_ray.operations.sources import Source, complete_at

    text = sys.stdin.read() if prompt == "-" else prompt
    asked = {"mask": mask, "endpoint": endpoint, "endpoint_model": endpoint_model, "api_key_env": api_key_env}
    source = Source.from_mapping(source_options(model, sketcher, generator, **asked, retrieve=retrieve), "generate")
    sampling = {"max_tokens": max_tokens, "seed": seed, **({"mode": mode} if mode else {})}
    if dry_run:
        show({"prompt": text, "n": n, "temperature": temperature, **sampling, **source.recorded})
        raise typer.Exit
    for answer in complete_at(source, sampling)(temperature)([text], n)[0]:
        typer.echo(text + (answer.text if isinstance(answer, Answer) else answer))
