"""Reports show generated text without letting it act."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from typing import Any

from cert_ray.evaluation.benchmarks import Problem, Sample
from cert_ray.evaluation.report import fenced, inline, render_html, render_markdown, result_rows
from cert_ray.evaluation.sandbox import Execution, Outcome
from cert_ray.evaluation.scoring import EvaluationResult, ProblemResult

HOSTILE = (
    "</pre><script>alert(1)</script><img src=x onerror=alert(1)>\n````\n# Title\n| a | [x](javascript:1) {{ 7*7 }}"
)

RESULT = EvaluationResult(
    problems=(
        ProblemResult(
            Problem("T/0|<b>", "x =", None, "def check(): pass"),
            (Sample("T/0|<b>", HOSTILE, HOSTILE, HOSTILE, 0.5), Sample("T/0|<b>", " 1")),
            (HOSTILE, " 1"),
            (Execution(Outcome.FAILED, HOSTILE, HOSTILE), Execution(Outcome.PASSED, "", "")),
            gold_passed=False,
        ),
    ),
    pass_at_k={1: 0.5, 2: 1.0},
    pass_at_k_valid=None,
)
SUMMARY: dict[str, Any] = {
    "config": {"problems": HOSTILE, "samples": None, "temperature": 0.2, "seed": 0, "source": {"model": HOSTILE}},
    "benchmark": {"problems": 1},
    "samples": {"count": 2, "distinct_per_problem": 2.0},
    "environment": {"python_version": "3.11.7", "packages": {"pandas": "1.5.3"}},
    "isolation": ["walls"],
    "outcomes": {"failed": 1, "passed": 1},
    "pass_at_k": {"1": 0.5, "2": 1.0},
    "pass_at_k_valid": None,
    "intervals": {"1": [0.0, 1.0], "2": [0.0, 1.0]},
    "gold_failed": ["T/0|<b>"],
    "sketches": {
        "samples": 1,
        "exact_match": None,
        "vote_share": 0.5,
        "routes": {HOSTILE: 1.0},
        "failures": {"sketch": 1, "generator": 0},
    },
    "rerank": {"syntax": {"pass_at_1": 1.0, "difference": 0.5, "low": -1.0, "high": 1.0, "p_value": 1.0}},
    "version": "0",
    "commit": None,
}


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.found.add(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_html_holds_generated_text_as_text_only() -> None:
    page = _Tags()
    page.feed(render_html(SUMMARY, RESULT))
    assert not page.found & {"script", "img", "a", "iframe"}
    assert "<script>alert(1)</script>" in page.text
    assert "{{ 7*7 }}" in page.text


def test_markdown_holds_generated_text_in_fences_and_escapes() -> None:
    text = render_markdown(SUMMARY, RESULT)
    outside = re.sub(r"(?ms)^(`{3,})\n.*?^\1$", "", text)
    assert "<script>" not in outside.replace("\\<", "")
    assert not re.search(r"(?m)^# Title", outside)
    assert "| 1 | 0.5 | 0.00 to 100.00% | not run |" in text
    assert "T/0\\|\\<b\\>" in text


def test_fences_are_longer_than_any_inside() -> None:
    assert fenced("a ````` b").startswith("``````\n")
    assert inline("a\n# b|c") == "a \\# b\\|c"


def test_rows_are_json_and_hold_every_sample() -> None:
    (row,) = json.loads(json.dumps(list(result_rows(RESULT))))
    assert (row["num_samples"], row["num_passed"]) == (2, 1)
    assert row["pass_at_k"] == {"1": 0.5, "2": 1.0}
    assert [sample["outcome"] for sample in row["samples"]] == ["failed", "passed"]
    assert row["samples"][0]["completion"] == HOSTILE
