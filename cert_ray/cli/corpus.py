"""Verbs of the dataset: `preprocess`, `inspect`, `remove`, `sketch`."""

from __future__ import annotations

import contextlib
import sys
from typing import IO, Annotated

import typer

from cert_ray import storage
from cert_ray.cli.app import Address, DryRun, Libraries, Limit, Overrides, RecipeFile, app, load, perform, show
from cert_ray.errors import ConfigError, InputError

_MOST_SKETCHED_BYTES = 10_000_000  # assumed: a syntax tree takes some hundred times as much memory


@app.command()
def preprocess(
    recipe: RecipeFile,
    overrides: Overrides = None,
    library: Libraries = None,
    limit: Limit = None,
    dry_run: DryRun = False,
    address: Address = None,
) -> None:
    """Turn files into the annotated dataset. They are read, cleaned, deduplicated, scored and sketched.

    Example: cert-ray preprocess jobs/numpy.yaml --set run=runs/numpy --limit 1000
    """
    resolved = load(recipe, overrides, library, {"preprocess.sources.limit": limit} if limit else None)
    from cert_ray.operations import pipeline

    what = f"preprocess {', '.join(resolved.preprocess.sources.inputs)} into {resolved.run}"
    manifest = perform("preprocess", resolved, address, dry_run, what, lambda: pipeline.run_preprocess(resolved))
    show({"read": manifest.rows_read, "kept": manifest.rows_kept, "dropped": manifest.dropped, "run": resolved.run})


@app.command()
def inspect(
    dataset: Annotated[str, typer.Argument(metavar="DATASET", help="a run's folder, or its dataset")],
    dropped: Annotated[
        str | None, typer.Option(metavar="REASON", help="show files dropped for this reason, e.g. not_python_3")
    ] = None,
    doc: Annotated[str | None, typer.Option(metavar="ID", help="show this file beside its sketch")] = None,
    limit: Annotated[int, typer.Option(min=1, help="show at most this many")] = 20,
) -> None:
    """Show rows, drops, or a file beside its sketch. Not at a terminal, rows are plain lines.

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
        str | None, typer.Option("--repo", help="files of this repository; case does not matter")
    ] = None,
    source: Annotated[str | None, typer.Option(help="files of this input, as the recipe names it")] = None,
    path_prefix: Annotated[str | None, typer.Option(help="files whose path in the input begins with this")] = None,
    reason: Annotated[str, typer.Option(help="for the record, e.g. the number of the request")] = "",
    date: Annotated[str | None, typer.Option(help="when it was asked for, YYYY-MM-DD; default: today")] = None,
    keep_out: Annotated[bool, typer.Option("--keep-out", help="record it even if no file of the run matches")] = False,
    dry_run: DryRun = False,
) -> None:
    """Take a repository out of a finished dataset (a takedown). Later runs of the recipe keep it out.

    Rewrites the shards that hold it (in the dataset, the cleaned documents and the packed tokens) and the card, and
    records in RUN/removals.jsonl what was done. If killed, run it again. Trained models keep what they learned.

    Example: cert-ray remove runs/numpy --repo someone/something --reason "request 17"
    """
    import datetime

    from cert_ray.corpus.removals import Removal
    from cert_ray.operations import remove as removing

    if repository is None and source is None and path_prefix is None:
        raise ConfigError("say what to take out: give --repo, --source or --path-prefix")
    asked = date or datetime.datetime.now(datetime.UTC).date().isoformat()
    options = {"repository": repository, "source": source, "path_prefix": path_prefix, "reason": reason, "asked": asked}
    wanted = Removal.from_mapping(options, "remove")
    if dry_run:
        files = removing.preview(run, wanted)
        show({"would rewrite": {file.file: file.rows for file in files}})
        raise typer.Exit
    show(removing.remove(run, wanted, keep_out).model_dump(mode="json"))


@app.command()
def sketch(
    file: Annotated[str, typer.Argument(metavar="FILE", help="a Python file, or - for standard input")] = "-",
    kind: Annotated[str, typer.Option(help="constants, names, both or released")] = "constants",
) -> None:
    """Print the sketch of one file.

    Example: echo 'df = pd.read_csv("a.csv")' | cert-ray sketch
    """
    from cert_ray.sketching import sketch as sketch_text

    sys.stdout.write(sketch_text(_source(file), kind))


def _source(file: str) -> str:
    """The text of a Python file, decoded as preprocessing does it."""
    from cert_ray.corpus.cleaning import decode
    from cert_ray.schemas import Dropped

    cure = "Give a Python file, or - for standard input."
    if file != "-" and storage.is_folder(file):
        raise InputError(file, "a folder", cure)
    try:
        with _opened(file) as stream:
            payload = stream.read(_MOST_SKETCHED_BYTES + 1)
    except FileNotFoundError as error:
        raise InputError(file, "no such file", cure) from error
    if len(payload) > _MOST_SKETCHED_BYTES:
        raise InputError(file, f"longer than {_MOST_SKETCHED_BYTES:,} bytes", cure)
    text = decode(payload)
    if isinstance(text, Dropped):
        raise InputError(file, f"not text that Python reads: {text.detail}", "Convert it to UTF-8 first.")
    return text


def _opened(file: str) -> contextlib.AbstractContextManager[IO[bytes]]:
    if file == "-":
        return contextlib.nullcontext(sys.stdin.buffer)
    if storage.is_local(file):
        return storage.local_path(file).open("rb")  # also a pipe, such as a shell's <(...)
    return storage.open_read(file)
