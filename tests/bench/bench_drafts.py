"""CPU-seconds of stage two with the sketch as draft, and held to the sketch, beside stage two with neither.

The gold answers of PandasEval and NumpyEval stand for sketches. Two situations: `pair` gives the model sketch and
prompt as the cascade does, `copying` gives it the solved problem and then the problem again, so that a model that was
not trained on sketches goes the sketch's way as a trained generator should. In: a model folder with the project's
special tokens. Out: per answer the CPU-seconds, forward passes and rows; the share of drafted tokens that were drawn;
the share of samples that are the same as without, which is all of them in fp32. One model, problem by problem in turn,
so that a busy machine is busy for all; prompts are read for every answer, as for a cascade's second stage.

Example: python -m tests.bench.bench_drafts --model MODEL --benchmarks ../shared/benchmarks --output results
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from cert_ray.schemas import Dropped
from cert_ray.serving import drafts
from cert_ray.serving.boundaries import PAPER_STOPS, split_trailing_blanks
from cert_ray.serving.constraints import Template
from cert_ray.serving.engines import EngineConfig, Work
from cert_ray.serving.transformers_engine import TransformersEngine
from cert_ray.sketching import Placeholder, SketchKind, prompt_format, sketch_source
from tests.bench.measuring import markdown, publish

CONSTRAINED = "constrained"


@dataclass(slots=True)
class Sums:
    """What the answers of one setting took together."""

    answers: int = 0
    cpu_s: float = 0.0
    counts: list[int] = field(default_factory=lambda: [0] * 4)  # passes, rows, drafted, accepted
    samples: int = 0
    same: int = 0


@dataclass(frozen=True, slots=True)
class Problem:
    """A prompt and the sketch of its answer; `blanks` are those at the prompt's end, which the answer begins with."""

    body: str
    blanks: str
    answer: str
    sketch: str
    placeholders: tuple[Placeholder, ...]


def main() -> None:
    """Measure every setting on every problem, in turn."""
    given = _arguments()
    torch.set_num_threads(1)
    problems = _problems(given.benchmarks, given.problems)
    config = EngineConfig(dtype=given.dtype, threads=1, prefix_cache_tokens=0)
    engine = TransformersEngine(given.model, config)
    settings: list[Any] = [0, *given.draft_tokens, CONSTRAINED]
    keys = [(situation, n, setting) for situation in given.situation for n in given.n for setting in settings]
    sums = {key: Sums() for key in keys}
    _draw(
        engine, config, replace(_work(engine, problems[0], given.situation[0], 1), max_tokens=2), CONSTRAINED
    )  # reads all once
    for problem in problems:
        for situation in given.situation:
            for n in given.n:
                work = _work(engine, problem, situation, n)
                plain: list[Any] = []
                for setting in settings:
                    ids = _measure(engine, config, work, setting, sums[situation, n, setting])
                    plain = ids if setting == 0 else plain
                    sums[situation, n, setting].same += sum(map(tuple.__eq__, ids, plain))
    rows = [_row(key, one, sums[key[0], key[1], 0]) for key, one in sums.items()]
    heads = ["situation", "n", "draft", "CPU-s per answer", "of none", "forward passes", "rows", "drafts drawn", "same"]
    load = ", ".join(f"{value:.0f}" for value in os.getloadavg())
    table = markdown(heads, rows) + f"\n{given.dtype}, {len(problems)} problems, one thread, load average {load}\n"
    figures = {" ".join(map(str, key)): [one.answers, one.cpu_s, *one.counts, one.same] for key, one in sums.items()}
    publish(given.output, f"drafts-{given.dtype}", "python -m tests.bench.bench_drafts " + " ".join(sys.argv[1:]),
            [table], figures)  # fmt: skip


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model folder")
    parser.add_argument("--benchmarks", type=Path, required=True, help="folder of PandasEval and NumpyEval")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--problems", type=int, default=16)
    parser.add_argument("--n", type=int, action="append", help="default: 1 and 20")
    parser.add_argument("--draft-tokens", type=int, action="append", help="default: 4 and 8")
    parser.add_argument("--situation", action="append", choices=["pair", "copying"], help="default: both")
    given = parser.parse_args()
    given.n, given.draft_tokens = given.n or [1, 20], given.draft_tokens or [4, 8]
    given.situation = given.situation or ["pair", "copying"]
    return given


def _problems(folder: Path, count: int) -> list[Problem]:
    """Problems whose answer's sketch has a placeholder, evenly from both benchmarks."""
    found: list[list[Problem]] = []
    for name in ("PandasEval", "NumpyEval"):
        with gzip.open(folder / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
            problems = [_problem(one["prompt"], one["canonical_solution"][0]) for one in map(json.loads, lines)]
        kept = [problem for problem in problems if problem is not None]
        found.append(kept[:: max(1, 2 * len(kept) // count)][: count // 2])
    return [problem for both in zip(*found, strict=False) for problem in both]


def _problem(prompt: str, answer: str) -> Problem | None:
    body, blanks = split_trailing_blanks(prompt)
    sketched = sketch_source(prompt + answer, SketchKind.CONSTANTS)
    if isinstance(sketched, Dropped):
        return None
    own = [
        place
        for place, (start, _) in zip(sketched.placeholders, sketched.replaced, strict=True)
        if start >= len(prompt)
    ]
    first = len(sketched.placeholders) - len(own)
    if not own or any(start < len(prompt) < end for start, end in sketched.replaced):
        return None
    behind = sketched.placeholders[first - 1].end - sketched.replaced[first - 1][1] if first else 0
    begin = len(prompt) + behind
    text = sketched.text[begin:].rstrip()
    moved = tuple(Placeholder(place.start - begin, place.end - begin, place.kind) for place in own)
    return Problem(body, blanks, answer.rstrip(), text, moved)


def _work(engine: TransformersEngine, problem: Problem, situation: str, n: int) -> Work:
    tokenizer = engine.tokenizer
    if situation == "pair":
        prompt = prompt_format.encode_pair(tokenizer, problem.sketch, problem.placeholders, problem.body)
    else:
        solved = f"{problem.body}{problem.blanks}{problem.answer}\n\n\n{problem.body}"
        prompt = prompt_format.encode_code(tokenizer, solved)
    return Work(
        tuple(prompt),
        n=n,
        max_tokens=64,
        temperature=0.2,
        top_p=0.9,
        stop=(*PAPER_STOPS, "\n\n\n"),
        start=problem.blanks,
        template=Template.of(problem.blanks, problem.sketch, problem.placeholders, 0.001),
        draft=drafts.source(tokenizer, problem.blanks, problem.sketch, problem.placeholders),
    )


def _draw(engine: TransformersEngine, config: EngineConfig, work: Work, setting: Any) -> list[tuple[int, ...]]:
    engine.config = config.model_copy(update={"draft_tokens": 0 if setting == CONSTRAINED else setting})
    work = work if setting == CONSTRAINED else replace(work, template=None)
    return [sample.ids for sample in engine.draw(work).samples if sample is not None]


def _measure(
    engine: TransformersEngine, config: EngineConfig, work: Work, setting: Any, sums: Sums
) -> list[tuple[int, ...]]:
    def counts() -> list[int]:
        counted = engine.counted
        return [counted.forward_passes, counted.forward_rows, counted.drafted_tokens, counted.accepted_tokens]

    before, cpu = counts(), time.process_time()
    ids = _draw(engine, config, work, setting)
    sums.cpu_s += time.process_time() - cpu
    sums.counts = [total + new - old for total, new, old in zip(sums.counts, counts(), before, strict=True)]
    sums.answers += 1
    sums.samples += len(ids)
    return ids


def _row(key: tuple[str, int, Any], sums: Sums, plain: Sums) -> list[str]:
    situation, n, setting = key
    passes, rows, drafted, accepted = sums.counts
    return [
        situation,
        str(n),
        str(setting) if setting else "none",
        f"{sums.cpu_s / sums.answers:.3g}",
        f"{sums.cpu_s / plain.cpu_s:.0%}",
        f"{passes / sums.answers:.1f}",
        f"{rows / sums.answers:.0f}",
        f"{accepted} of {drafted}",
        "-" if setting == CONSTRAINED else f"{sums.same / sums.samples:.0%}",
    ]


if __name__ == "__main__":
    main()
