"""The command line's frame: the application, the options that several verbs share, and how errors end.

Heavy imports stand inside the verbs, so that `--help` is quick. Exit status: 0 done, 1 failed, 2 an input or option
that cannot be used, 130 interrupted; the message says what to change. No traceback is shown for errors raised on
purpose, nor for what a disk, the network or a store refuses.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from cert_ray import __version__, storage
from cert_ray.errors import CertRayError, ConfigError, InputError
from cert_ray.retries import is_of_storage
from cert_ray.telemetry import logs

if TYPE_CHECKING:
    from cert_ray.operations.recipe import Recipe

_INTERRUPTED = 130
_CANNOT_BE_USED = 2

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
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
Limit = Annotated[int | None, typer.Option(min=1, help="do at most this many (files, steps, problems)")]
ModelFolder = Annotated[
    str | None, typer.Option("--model", help="folder or URL of one language model: plain, or trained for both stages")
]
Sketcher = Annotated[str | None, typer.Option(help="folder of the sketcher (with --generator)")]
Generator = Annotated[str | None, typer.Option(help="folder of the generator (with --sketcher)")]
Endpoint = Annotated[str | None, typer.Option(help="base URL of an OpenAI-compatible server")]
EndpointModel = Annotated[str | None, typer.Option(help="the endpoint's model; default: the first one it lists")]
ApiKeyEnv = Annotated[
    str | None, typer.Option(metavar="NAME", help="the environment variable that holds the endpoint's key")
]
AnswerMode = Annotated[
    str | None,
    typer.Option(
        "--mode",
        help="for a cascade: cascade (default), constrained (the sketch's fixed text must come), sketch_only or "
        "generator_only",
    ),
]
Mask = Annotated[
    str | None, typer.Option(help="text that tells a sequence-to-sequence model where to write, e.g. <extra_id_0>")
]
Retrieve = Annotated[
    str | None, typer.Option(help="file of library-docs: the documentation that suits a prompt is put ahead of it")
]


def main() -> None:
    """Entry point: run the verb. Errors raised on purpose, and those of storage, become one line and an exit status."""
    try:
        app()
    except CertRayError as error:
        typer.echo(f"cert-ray: {error}", err=True)
        raise SystemExit(2 if isinstance(error, ConfigError | InputError) else 1) from error
    except SystemExit as stop:
        if stop.code == _INTERRUPTED:  # typer's for Ctrl-C
            typer.echo("cert-ray: stopped; run the same command again to go on from what is finished", err=True)
        if stop.code == _CANNOT_BE_USED and (value := _value_of_recipe(sys.argv)):
            typer.echo(f"cert-ray: to set a value of the recipe, write --set {value}", err=True)
        raise
    except Exception as error:
        if (told := _told_by_storage(error)) is None:
            raise
        typer.echo(f"cert-ray: {told}", err=True)
        raise SystemExit(1) from error


def _value_of_recipe(arguments: list[str]) -> str | None:
    """The first KEY=VALUE that follows a recipe without `--set`, as jobs take it."""
    behind = next((place for place, one in enumerate(arguments) if one.endswith((".yaml", ".yml"))), len(arguments))
    pairs = pairwise(arguments[behind:])
    return next((one for before, one in pairs if re.match(r"[a-z_][\w.]*=", one) and not before.startswith("-")), None)


def _told_by_storage(error: Exception) -> str | None:
    """What a disk, the network or a store said, on one line; None for any other error."""
    error = getattr(error, "cause", error)  # Ray's error for a task has its cause's class, and holds the cause
    if isinstance(error, OSError) and error.filename is not None:
        place = error.filename if error.filename2 is None else error.filename2
        return f"{place}: {error.strerror}. Check the path, and who may read and write there."
    if is_of_storage(error):
        kind, said = type(error).__name__, " ".join(str(error).split())
        if not said:
            said = kind
        elif isinstance(error, OSError) and error.errno is None:  # e.g. fsspec's, whose text may be only the path
            said = f"{kind}: {said}"
        return f"{said.rstrip('.')}. Check the disk, or the network and the credentials for the store."
    return None


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="print it")] = False,  # noqa: ARG001
    log_format: Annotated[
        str | None, typer.Option(envvar=logs.FORM_VARIABLE, help="form of the lines on standard error: text or json")
    ] = None,
) -> None:
    logs.configure(log_format)


def load(
    url: str, overrides: list[str] | None, libraries: list[str] | None, extra: dict[str, Any] | None = None
) -> Recipe:
    from cert_ray.operations.recipe import load_recipe

    return load_recipe(url, overrides or (), {**({"libraries": libraries} if libraries else {}), **(extra or {})})


def perform(verb: str, recipe: Recipe, address: str | None, dry_run: bool, what: str, stage: Callable[[], Any]) -> Any:
    """Run one stage of a recipe with Ray up, keeping its log in the run's folder; or say `what` it would do."""
    if dry_run:
        typer.echo(f"# would {what}")
        typer.echo(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))
        raise typer.Exit
    from cert_ray.operations.on_ray import ray_session

    with logs.story(recipe.run, verb), ray_session(address):
        return stage()


def show(figures: dict[str, Any]) -> None:
    typer.echo(json.dumps(figures, indent=1))


def source_options(
    model: str | None, sketcher: str | None, generator: str | None, **others: str | None
) -> dict[str, str]:
    """The options of a `Source` that were given, with local paths made absolute."""
    given = {"model": model, "sketcher": sketcher, "generator": generator, **others}
    files = ("model", "sketcher", "generator", "retrieve")
    return {
        key: storage.absolute(value) if key in files and storage.exists(value) else value
        for key, value in given.items()
        if value is not None
    }


def model_options(model: str | None, sketcher: str | None, generator: str | None) -> dict[str, str]:
    """The models to serve.

    Raises:
        ConfigError: unless it is one model, or sketcher and generator.
    """
    found = source_options(model, sketcher, generator)
    if set(found) not in ({"model"}, {"sketcher", "generator"}):
        raise ConfigError("give either --model, or --sketcher and --generator")
    return found
