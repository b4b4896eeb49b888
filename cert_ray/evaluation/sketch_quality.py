"""How good a cascade's sketches are: results whose samples have sketches in; matches, votes, routes and blame out.

The gold sketch is that of the benchmark's own answer, as it stands after the prompt. A failed sample is blamed on its
sketch if that is neither a gold one nor the sketch of a sample that passed, else on the generator. Other sketches may
also lead to a right answer, so the sketch's share of the blame is an upper bound.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from cert_ray.errors import SketchError
from cert_ray.evaluation.sandbox import Outcome
from cert_ray.evaluation.scoring import ProblemResult
from cert_ray.sketching import sketch_spans


def sketch_of_answer(prompt: str, answer: str, kind: str = "constants") -> str | None:
    """The sketch of `answer` after `prompt`, without the prompt's own; None if the two together do not parse."""
    try:
        sketched = sketch_spans(prompt + answer, kind)
    except SketchError:
        return None
    start = len(prompt)
    for place, (low, high) in zip(sketched.placeholders, sketched.replaced, strict=True):
        if low < len(prompt) < high:
            return None  # one literal begins in the prompt and ends in the answer
        if high <= len(prompt):
            start = place.end + len(prompt) - high
    return sketched.text[start:].strip()


def measure_sketches(results: Sequence[ProblemResult], kind: str = "constants") -> dict[str, Any] | None:
    """Figures over all samples that have a sketch; None if none has. Shares are of samples.

    `exact_match` counts only problems whose answer has a sketch. `vote_share` is the mean of the winners' least shares:
    of the sketches asked for, those that agreed before the vote ended.
    """
    routes: Counter[str] = Counter()
    blame: Counter[str] = Counter()
    votes, matches, comparable = [], 0, 0
    for one in results:
        gold = {sketch_of_answer(one.problem.prompt, answer, kind) for answer in one.problem.canonical_solutions}
        gold.discard(None)
        passing = {
            _stripped(sample.sketch)
            for sample, run in zip(one.samples, one.executions, strict=True)
            if run.outcome is Outcome.PASSED
        }
        for sample, run in zip(one.samples, one.executions, strict=True):
            if sample.sketch is None:
                continue
            routes[sample.route or "unknown"] += 1
            votes += [] if sample.vote_share is None else [sample.vote_share]
            comparable += bool(gold)
            matches += sample.sketch.strip() in gold
            if run.outcome is not Outcome.PASSED:
                blame["generator" if sample.sketch.strip() in gold | passing else "sketch"] += 1
    total = sum(routes.values())
    if not total:
        return None
    return {
        "samples": total,
        "exact_match": matches / comparable if comparable else None,
        "vote_share": sum(votes) / len(votes) if votes else None,
        "routes": {route: count / total for route, count in routes.most_common()},
        "failures": {"sketch": blame["sketch"], "generator": blame["generator"]},
    }


def _stripped(sketch: str | None) -> str | None:
    return None if sketch is None else sketch.strip()
