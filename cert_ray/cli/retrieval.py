"""The verb that documents a library for models that never saw it: `library-docs`."""

from __future__ import annotations

from typing import Annotated

import typer

from cert_ray.cli.app import DryRun, app, show


@app.command("library-docs")
def library_docs(
    package: Annotated[str, typer.Argument(help="a package, by the name that Python imports, or by its folder")],
    output: Annotated[str, typer.Option(help="file to write")] = "docs.jsonl",
    shown_as: Annotated[
        str | None, typer.Option("--as", metavar="NAME", help="the name that prompts import it by, if it differs")
    ] = None,
    path: Annotated[
        list[str] | None, typer.Option(help="look first in this folder (e.g. a site-packages); repeatable")
    ] = None,
    imports: Annotated[
        bool, typer.Option("--import", help="also import the package and inspect it, for compiled parts; runs its code")
    ] = False,
    dry_run: DryRun = False,
) -> None:
    """Collect a package's public signatures and descriptions. Its source is read, and only --import runs it.

    `evaluate`, `generate` and `serve` take the file as --retrieve, a recipe as `retrieve: {docs: FILE}`.

    Example: cert-ray library-docs pandas --output docs.jsonl
    """
    from cert_ray.retrieval.library_docs import collect_docs, write_docs

    if dry_run:
        show({"package": package, "output": output, "as": shown_as, "path": path or [], "import": imports})
        raise typer.Exit
    found = collect_docs(package, shown_as, path or (), imports)
    write_docs(output, found.docs)
    typer.echo(f"{len(found.docs)} functions, classes and methods of {package}: {output}")
    if found.unread:
        some = ", ".join(found.unread[:5])
        typer.echo(f"{len(found.unread)} public names have no source ({some} ...): use --import to read them", err=True)
