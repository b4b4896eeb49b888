"""By hand: every sketch of every Python file of this installation, held to `properties.violations`.

In: folders (default: the standard library and the installed packages). Out: files read, refused by `ast.parse`, and
sketched, by kind, and what does not hold; exit status 1 if anything. Minutes per kind and core.

Example: nice python -m tests.sketching.everything --kind names --kind both --workers 2
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import sysconfig
from collections import Counter
from pathlib import Path

from cert_ray.corpus.cleaning import decode
from cert_ray.python_source import parse
from cert_ray.schemas import Dropped
from cert_ray.sketching import SketchKind
from tests.sketching.properties import violations

MAX_BYTES = 1_000_000  # as preprocessing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--kind", action="append", type=SketchKind, choices=list(SketchKind)[:3])
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    kinds = given.kind or [SketchKind.CONSTANTS, SketchKind.NAMES, SketchKind.BOTH]
    folders = given.folders or [Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("purelib"))]
    paths = sorted({path for folder in folders for path in folder.rglob("*.py")})
    counts: Counter[str] = Counter()
    wrong = 0
    with multiprocessing.get_context("spawn").Pool(given.workers) as pool:
        for path, outcome, found in pool.imap(functools.partial(checked, kinds=kinds), paths, chunksize=20):
            counts.update(outcome)
            wrong += bool(found)
            for line in found:
                print(f"{path}: {line}", flush=True)
    print(", ".join(f"{name} {count:,}" for name, count in counts.items()), f"; wrong {wrong:,}")
    raise SystemExit(bool(wrong))


def checked(path: Path, kinds: list[SketchKind]) -> tuple[Path, list[str], list[str]]:
    """The path, what is counted of it, and what is wrong."""
    try:
        payload = path.read_bytes()
    except OSError:
        return path, ["unreadable"], []
    source = decode(payload) if len(payload) <= MAX_BYTES else None
    if not isinstance(source, str):
        return path, ["too large or no text"], []
    if isinstance(parse(source), Dropped):
        return path, ["refused by ast.parse"], []
    found = [f"{kind}: {line}" for kind in kinds for line in violations(source, kind)]
    return (
        path,
        ["parsed", *(f"{kind} sketched" for kind in kinds if not any("no sketch" in line for line in found))],
        found,
    )


if __name__ == "__main__":
    main()
