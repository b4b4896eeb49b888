"""An evaluation for people: a summary and a result in; Markdown, HTML and JSONL rows out. Writes nothing.

Completions, error messages and outputs are generated text and hostile: the template engine escapes HTML, and the page
has a policy that runs no script; Markdown shows them in fences longer than any run of back-ticks inside.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import jinja2

from cert_ray.evaluation.pass_at_k import pass_at_k
from cert_ray.evaluation.runs import label_of
from cert_ray.evaluation.sandbox import Outcome
from cert_ray.evaluation.scoring import EvaluationResult, ProblemResult

_SHOWN_PROBLEMS = 20  # in Markdown, with one completion each; HTML has all problems, results.jsonl also the rest
_SHOWN_SAMPLES = 40  # distinct samples shown per problem in HTML
_SHOWN_CHARS = 2000


def result_rows(result: EvaluationResult) -> Iterator[dict[str, Any]]:
    """One JSON-ready row per problem, in the benchmark's order."""
    for one in result.problems:
        yield {
            "task_id": one.problem.task_id,
            "num_samples": one.num_samples,
            "num_passed": one.num_passed,
            "pass_at_k": {str(k): pass_at_k(one.num_samples, one.num_passed, k) for k in result.pass_at_k},
            "gold_passed": one.gold_passed,
            "samples": [
                {"completion": text, "outcome": str(run.outcome), "detail": run.detail, "output": run.output, **origin}
                for text, run, origin in zip(one.completions, one.executions, _origins(one), strict=True)
            ],
        }


def render_markdown(summary: Mapping[str, Any], result: EvaluationResult) -> str:
    """The report as Markdown."""
    return template("report.md.j2").render(_context(summary, result, _SHOWN_PROBLEMS))


def render_html(summary: Mapping[str, Any], result: EvaluationResult) -> str:
    """The report as one HTML page without scripts or outside references."""
    return template("report.html.j2").render(_context(summary, result, None))


def fenced(text: str) -> str:
    """`text` as a Markdown code block that it cannot break out of."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{text}\n{fence}"


def inline(text: str) -> str:
    """`text` on one line, with everything escaped that Markdown or HTML would interpret."""
    flat = " ".join(text.split())
    return re.sub(r"([\\`*_{}\[\]()#+!|<>&~:@])", r"\\\1", flat)


def percent(share: float) -> str:
    """A share in percent, with two decimals."""
    return f"{100 * share:.2f}"


def points(difference: float) -> str:
    """A difference of shares in percentage points, with its sign."""
    return f"{100 * difference:+.2f}"


def ends(interval: Sequence[float]) -> str:
    """Both ends of an interval of shares, in percent."""
    return f"{percent(interval[0])} to {percent(interval[1])}"


@cache
def template(name: str) -> jinja2.Template:
    """One of the templates beside this module. HTML templates escape the values put into them."""
    engine = template_engine(jinja2.PackageLoader("cert_ray.evaluation", "templates"), html=name.endswith(".html.j2"))
    engine.filters.update(fenced=fenced, inline=inline, percent=percent, points=points, ends=ends)
    return engine.get_template(name)


def template_engine(loader: jinja2.BaseLoader, *, html: bool) -> jinja2.Environment:
    """The environment of every report's templates: HTML escapes values, and a missing value is an error."""
    return jinja2.Environment(
        loader=loader,
        autoescape=html,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def _context(summary: Mapping[str, Any], result: EvaluationResult, shown: int | None) -> dict[str, Any]:
    config, environment = summary["config"], summary["environment"]
    packages = " ".join(f"{name} {version}" for name, version in environment["packages"].items())
    facts = {
        "problems": config["problems"],
        "samples": config["samples"] or "generated",
        **(config.get("source") or {}),
        "temperature": "not recorded" if config["temperature"] is None else config["temperature"],
        "seed": config["seed"],
        "Python of the sandbox": environment["python_version"],
        "its packages": packages or "none asked for",
        "cert-ray": summary["version"],
        "commit": summary["commit"] or "not a checkout",
    }
    return {
        "summary": summary,
        "label": label_of(dict(config)),
        "facts": list(facts.items()),
        "problems": result.problems,
        "shown": [_shown(one) for one in result.problems[:shown]],
        "hidden": max(0, len(result.problems) - (shown or len(result.problems))),
    }


def _origins(one: ProblemResult) -> Iterator[dict[str, Any]]:
    """What is known of how each sample came about."""
    for sample in one.samples:
        known = {"sketch": sample.sketch, "route": sample.route, "vote_share": sample.vote_share}
        yield {name: value for name, value in known.items() if value is not None}


def _shown(one: ProblemResult) -> dict[str, Any]:
    """A problem with its distinct samples, shortened: failed ones first, the most frequent of those first."""
    kinds: Counter[tuple[Any, ...]] = Counter()
    for sample, text, run in zip(one.samples, one.completions, one.executions, strict=True):
        kinds[(text, run.outcome, run.detail, run.output, sample.sketch, sample.route, sample.vote_share)] += 1
    ordered = sorted(kinds.items(), key=lambda item: (item[0][1] is Outcome.PASSED, -item[1]))
    return {
        "task_id": one.problem.task_id,
        "num_samples": one.num_samples,
        "num_passed": one.num_passed,
        "gold_passed": one.gold_passed,
        "prompt": one.problem.prompt[-_SHOWN_CHARS:],
        "hidden": max(0, len(ordered) - _SHOWN_SAMPLES),
        "samples": [
            {
                "completion": text[:_SHOWN_CHARS],
                "outcome": str(outcome),
                "headline": " ".join((detail or text).split())[:100],
                "detail": detail,
                "output": output[:_SHOWN_CHARS],
                "sketch": sketch if sketch is None else sketch[:_SHOWN_CHARS],
                "route": route,
                "vote_share": vote_share,
                "count": count,
            }
            for (text, outcome, detail, output, sketch, route, vote_share), count in ordered[:_SHOWN_SAMPLES]
        ],
    }
