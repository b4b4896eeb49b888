"""Real code for the tests of sketching: a fixed sample of the interpreter's standard library."""

from __future__ import annotations

import sysconfig
from functools import cache
from pathlib import Path

from cert_ray.python_source import parse
from cert_ray.schemas import Dropped


@cache
def standard_library(files: int) -> tuple[tuple[str, str], ...]:
    """About `files` (path, source) at even distances, those only that this interpreter parses and of at most 20 KB."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(path for path in root.rglob("*.py") if "site-packages" not in path.parts)
    sources = []
    for path in paths[:: max(1, len(paths) // files)]:
        try:
            source = path.read_text("utf-8-sig")
        except UnicodeDecodeError:
            continue
        if len(source) <= 20_000 and not isinstance(parse(source), Dropped):
            sources.append((str(path), source))
    return tuple(sources)
