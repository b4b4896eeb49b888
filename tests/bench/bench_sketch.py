"""The sketcher beside the released stack (RedBaron), both on the same sampled files, in MB per CPU-second.

In: a folder of Parquet tables with `content`. Out: the scan alone (`sketch_source`, text known to parse), the public
`sketch()`, `ast.parse` and `symtable`, each in one process; RedBaron's rate over the files that it can do, so that its
failures, counted beside, neither slow nor flatter it; and the share of parsed files that get a sketch.

Ours is repeated on a small sample until a second has gone by; it is measured on the larger sample too.

Example: python -m tests.bench.bench_sketch --tables /tmp/corpus/tables --output results --peers .venv-bench/bin/python
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import subprocess
import symtable
import sys
import tokenize
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cert_ray.errors import SketchError
from cert_ray.schemas import Dropped
from cert_ray.sketching import SketchKind, sketch, sketch_source
from tests.bench.inputs import sample_texts
from tests.bench.measuring import Spread, markdown, peers_python, publish, repeated, timed
from tests.bench.ours import parses

PEER = Path(__file__).parent / "peers" / "redbaron_sketch.py"
SCAN_GOAL, SKETCH_GOAL, COVERAGE_GOAL = 250, 100, 0.9999  # the goals


def main() -> None:
    """Measure both sides."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--peers", type=peers_python, required=True, help="the Python of the peers' environment")
    parser.add_argument("--documents", type=int, default=5_000, help="files of the larger sample")
    parser.add_argument("--peer-documents", type=int, default=150, help="files that RedBaron gets")
    parser.add_argument("--all", action="store_true", help="coverage over every file of the tables, not the sample's")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout-s", type=int, default=60, help="CPU and wall seconds that RedBaron has for a file")
    given = parser.parse_args()
    warnings.simplefilter("ignore")  # '\d' in a corpus file
    drawn = [text for text in sample_texts(given.tables, given.documents, given.seed) if text.strip()]
    large = [text for text in drawn if parses(text)]
    small = large[: given.peer_documents]
    peer_runs = [run_peer(given.peers, small, given.timeout_s) for _ in range(given.runs)]
    done = [text for index, text in enumerate(small) if all(run[index][1] is not None for run in peer_runs)]
    failures = Counter(problem for _, _, problem in peer_runs[0] if problem)
    indexes = [index for index, text in enumerate(small) if text in set(done)]
    peer = Spread.of([size_mb(done) / sum(run[index][0] for index in indexes) for run in peer_runs])
    figures = {name: (rate(work, done, given.runs), rate(work, large, given.runs)) for name, work in WORKS.items()}
    every = sample_texts(given.tables, sys.maxsize, given.seed) if given.all else drawn
    covered = coverage(every)
    same = sum(sketch_source(small[index], SketchKind.RELEASED).text == peer_runs[0][index][1] for index in indexes)
    publish(
        given.output, "sketch", "python -m tests.bench.bench_sketch " + " ".join(sys.argv[1:]),
        [
            speed_table(peer, figures, len(done), size_mb(done), len(large), size_mb(large)),
            f"RedBaron failed on {len(small) - len(done)} of {len(small)} files: {dict(failures)}. "
            f"Ours of kind `released` gives its text on {same} of the other {len(done)}.",
            coverage_line(covered),
        ],
        {"redbaron": peer, "failures": failures, "ours": figures, "coverage": covered},
    )  # fmt: skip


def _sketch_or_none(text: str) -> str | None:
    try:
        return sketch(text)
    except SketchError:
        return None


WORKS: dict[str, Callable[[str], Any]] = {
    "the scan alone, kind `constants`": lambda text: sketch_source(text, SketchKind.CONSTANTS),
    "the scan alone, kind `released`": lambda text: sketch_source(text, SketchKind.RELEASED),
    "public `sketch()`, syntax check included": _sketch_or_none,
    "`ast.parse` alone": ast.parse,
    "`symtable` alone": lambda text: _quiet_symtable(text),
}


def _quiet_symtable(text: str) -> object:
    try:
        return symtable.symtable(text, "file", "exec")
    except SyntaxError:  # stricter than ast.parse
        return None


def size_mb(texts: Sequence[str]) -> float:
    """UTF-8 megabytes."""
    return sum(len(text.encode()) for text in texts) / 1e6


def rate(work: Callable[[str], Any], texts: Sequence[str], runs: int) -> Spread:
    """MB per CPU-second of `work` over all texts."""

    def once() -> None:
        for text in texts:
            work(text)

    megabytes = size_mb(texts)
    return repeated(runs, lambda: megabytes / timed(once))


def run_peer(python: Path, texts: Sequence[str], timeout_s: int) -> list[tuple[float, str | None, str | None]]:
    """RedBaron on every text; a process that dies of one is started again after it.

    Raises:
        SystemExit: when it cannot be started.
    """
    if subprocess.run([python, "-c", "import redbaron"], capture_output=True, check=False).returncode:
        raise SystemExit(f"{python}: has no RedBaron. `make bench-env` makes the peers' environment.")
    results: list[tuple[float, str | None, str | None]] = []
    while len(results) < len(texts):
        given = "".join(json.dumps(text) + "\n" for text in texts[len(results) :])
        command = [str(python), str(PEER), "--timeout-s", str(timeout_s)]
        done = subprocess.run(command, input=given, capture_output=True, text=True, check=False)
        results += [tuple(json.loads(line)) for line in done.stdout.splitlines()]
        if done.returncode:
            results.append((0.0, None, f"died with {done.returncode}"))
    return results


def coverage(texts: Sequence[str]) -> dict[str, int]:
    """Of the texts that `ast.parse` takes: how many have a sketch that replaces what there is to replace."""
    counts: Counter[str] = Counter(given=len(texts))
    for text in texts:
        if not parses(text):
            continue
        counts["parsed"] += 1
        result = sketch_source(text, SketchKind.CONSTANTS)
        if isinstance(result, Dropped):
            counts["without a sketch"] += 1
        elif result.text == text and has_something_to_replace(text):
            counts["left as it was"] += 1
        else:
            counts["sketched"] += 1
    return dict(counts)


def has_something_to_replace(text: str) -> bool:
    """Whether Python's tokenizer sees a definition, a decimal number, or a string that is not triple-quoted.

    A name that is already the placeholder does not count, nor a number or string in a concatenation that stays.
    """
    before = ""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if before in ("def", "class") and token.string not in ("func", "AnClass"):
            return True
        if token.type == tokenize.NUMBER and token.string[:2].lower() not in ("0x", "0o", "0b"):
            return True
        if token.type == tokenize.STRING and not ('"""' in token.string or "'''" in token.string):
            return True
        before = token.string
    return False


def speed_table(
    peer: Spread, figures: dict[str, tuple[Spread, Spread]], done: int, done_mb: float, large: int, large_mb: float
) -> str:
    """Both sides' rates."""
    rows: list[Sequence[object]] = [("released stack (RedBaron)", peer, "", "1")]
    rows += [
        (name, small, all_of_them, f"{small.median / peer.median:,.0f}{_verdict(name, small.median / peer.median)}")
        for name, (small, all_of_them) in figures.items()
    ]
    headers = [
        "one process, MB per CPU-second",
        f"{done} files that RedBaron can do, {done_mb:.2f} MB",
        f"{large} files, {large_mb:.1f} MB",
        "times RedBaron",
    ]
    return markdown(headers, rows)


def _verdict(name: str, times: float) -> str:
    goal = SCAN_GOAL if "constants" in name else SKETCH_GOAL if "public" in name else None
    return "" if goal is None else f" ({'met' if times >= goal else 'MISSED'}: {goal})"


def coverage_line(covered: dict[str, int]) -> str:
    """The share of parsed files that have a sketch."""
    parsed, sketched = covered["parsed"], covered.get("sketched", 0)
    share = sketched / parsed if parsed else 0.0
    verdict = "met" if share >= COVERAGE_GOAL else "MISSED"
    return (
        f"{sketched} of {parsed} files that `ast.parse` takes have a sketch: {share:.4%} ({verdict}: 99.99%). {covered}"
    )


if __name__ == "__main__":
    main()
