"""An evaluation for people: a summary and a result in; Markdown, HTML and JSONL rows out. Writes nothing.

Completions, error messages and outputs are generated text and hostile: HTML is escaped by the template engine and
carries a policy that runs no script; Markdown shows them inside fences longer than any run of back-ticks in them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import jinja2

from cert_ray.evaluation.pass_at_k import pass_at_k
from cert_ray.evaluation.scoring import EvaluationResult, ProblemResult

_SHOWN_PROBLEMS = 20  # in full, with one completion each; the rest is in results.jsonl
_SHOWN_CHARS = 2000


def result_rows(result: EvaluationResult) -> Iterator[dict[str, Any]]:
    """One JSON-ready row a problem, in the benchmark's order."""
    for one in result.problems:
        yield {
            "task_id": one.problem.task_id,
            "num_samples": one.num_samples,
            "num_passed": one.num_passed,
            "pass_at_k": {str(k): pass_at_k(one.num_samples, one.num_passed, k) for k in result.pass_at_k},
            "gold_passed": one.gold_passed,
            "samples": [
                {"completion": text, "outcome": str(run.outcome), "detail": run.detail, "output": run.output}
                for text, run in zip(one.completions, one.executions, strict=True)
            ],
        }


def render_markdown(summary: Mapping[str, Any], result: EvaluationResult) -> str:
    """The report as Markdown."""
    return _template("report.md.j2").render(_context(summary, result))


def render_html(summary: Mapping[str, Any], result: EvaluationResult) -> str:
    """The report as one HTML page without scripts or outside references."""
    return _template("report.html.j2").render(_context(summary, result))


def fenced(text: str) -> str:
    """`text` as a Markdown code block that it cannot break out of."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{text}\n{fence}"


def inline(text: str) -> str:
    """`text` on one line, with everything that Markdown or HTML would read escaped."""
    flat = " ".join(text.split())
    return re.sub(r"([\\`*_{}\[\]()#+!|<>&~:@])", r"\\\1", flat)


@cache
def _template(name: str) -> jinja2.Template:
    engine = jinja2.Environment(
        loader=jinja2.PackageLoader("cert_ray.evaluation", "templates"),
        autoescape=name.endswith(".html.j2"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    engine.filters.update(fenced=fenced, inline=inline)
    return engine.get_template(name)


def _context(summary: Mapping[str, Any], result: EvaluationResult) -> dict[str, Any]:
    return {
        "summary": summary,
        "problems": result.problems,
        "shown": [_shown(one) for one in result.problems[:_SHOWN_PROBLEMS]],
        "hidden": max(0, len(result.problems) - _SHOWN_PROBLEMS),
    }


def _shown(one: ProblemResult) -> dict[str, str]:
    """The first sample of a problem, shortened."""
    run = one.executions[0]
    return {
        "task_id": one.problem.task_id,
        "prompt": one.problem.prompt[-_SHOWN_CHARS:],
        "completion": one.completions[0][:_SHOWN_CHARS],
        "outcome": str(run.outcome),
        "detail": run.detail,
    }
