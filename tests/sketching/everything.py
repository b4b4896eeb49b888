"""By hand: every sketch of every Python file of this installation, held to `properties.violations`.

In: folders (default: the standard library and the installed packages). Out: files read, refused by `ast.parse`, and
sketched, by kind, and what does not hold; exit status 1 if anything. Equal files are looked at once; the order is drawn
by a seed, so a run that is ended early has seen a fair sample. Its last line says how many it reached: `--start` with
that number, the same seed and the same files, goes on there. The order's digest is told, to see that they are the same.
Minutes per kind and core.

Example: nice python -m tests.sketching.everything --kind names --kind both --workers 2 --seed 7
         nice python -m tests.sketching.everything --kind names --kind both --workers 2 --seed 7 --start 21500
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import random
import sysconfig
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import xxhash

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
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, metavar="N", help="leave out the first N files of the order")
    given = parser.parse_args()
    kinds = given.kind or [SketchKind.CONSTANTS, SketchKind.NAMES, SketchKind.BOTH]
    folders = given.folders or [Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("purelib"))]
    paths = distinct(path for folder in folders for path in folder.rglob("*.py"))
    random.Random(given.seed).shuffle(paths)
    if not 0 <= given.start <= len(paths):
        parser.error(f"--start {given.start}: give 0 to {len(paths)}, the number of different files")
    order = xxhash.xxh3_64_hexdigest("\n".join(map(str, paths)).encode())
    print(f"{len(paths):,} different files, order {order}, from file {given.start + 1:,} on", flush=True)
    counts: Counter[str] = Counter()
    wrong = 0
    with multiprocessing.get_context("spawn").Pool(given.workers) as pool:
        results = pool.imap(functools.partial(checked, kinds=kinds), paths[given.start :], chunksize=20)
        for number, (path, outcome, found) in enumerate(results, given.start + 1):
            counts.update(outcome)
            wrong += bool(found)
            for line in found:
                print(f"{path}: {line}", flush=True)
            if number % 500 == 0 or number == len(paths):
                told = ", ".join(f"{name} {count:,}" for name, count in counts.items())
                print(f"{number:,} of {len(paths):,} files: {told}; wrong {wrong:,}", flush=True)
    raise SystemExit(bool(wrong))


def distinct(paths: Iterable[Path]) -> list[Path]:
    """One path for each content, sorted; packages inside the standard library's folder are not of it."""
    library = sysconfig.get_path("stdlib")
    first: dict[bytes, Path] = {}
    for path in sorted(set(paths)):
        if not (path.is_relative_to(library) and "site-packages" in path.parts):
            with suppress(OSError):
                first.setdefault(xxhash.xxh3_128_digest(path.read_bytes()), path)
    return list(first.values())


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
