"""Verbs that answer prompts: `serve`, `generate`."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from cert_ray.cli.app import Address, DryRun, Generator, ModelFolder, Sketcher, app, model_options, show
from cert_ray.errors import ConfigError


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
    from cert_ray.serving.deployment import ServerConfig
    from cert_ray.serving.on_ray import start_server

    options = {"host": host, "port": port, "model_name": name, "api_keys_file": api_keys_file}
    models = model_options(model, sketcher, generator)
    config = ServerConfig.from_mapping({**models, **{k: v for k, v in options.items() if v is not None}}, "serve")
    if dry_run:
        show(config.model_dump(mode="json"))
        raise typer.Exit
    with ray_session(address), start_server(config) as served:
        typer.echo(f"serving {name} at {served.base_url}/v1/completions; Ctrl-C stops", err=True)
        signal.pause()


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
    return complete_with_models(ModelConfig.from_mapping(model_options(model, sketcher, generator), "models"), config)


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
        source = {"endpoint": endpoint} if endpoint else model_options(model, sketcher, generator)
        show({"prompt": text, "n": n, **sampling, **source})
        raise typer.Exit
    for completion in _completer(model, sketcher, generator, endpoint, sampling)([text], n)[0]:
        typer.echo(text + completion)
