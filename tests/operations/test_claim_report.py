"""The report's numbers against counts made by hand, and its pages from them."""

from __future__ import annotations

import io
from typing import Any

import pytest
from PIL import Image

from cert_ray.operations.claim_report import Table, _comparisons, _scores, card_scores, draw_scores, render


@pytest.fixture(params=[{}, {"contaminated": 2}], ids=["clean", "contaminated"])
def report(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Two benchmarks of three and two problems: the base passes 1 of 5, XL 2, CERT 4."""
    passed = {"base": "10000", "xl": "11000", "cert": "11101"}
    table: Table = {}
    for system, marks in passed.items():
        counts = {f"P/{place}": (1, int(mark)) for place, mark in enumerate(marks)}
        table["greedy", system, "First"] = {name: counts[name] for name in ("P/0", "P/1", "P/2")}
        table["greedy", system, "Second"] = {name: counts[name] for name in ("P/3", "P/4")}
    model = {"seed": 0, "parameters": 10, "steps": 3, "tokens": 96, "training_s": 1.5, "first_loss": 3.0}
    return {
        "libraries": ["polars"],
        "base": {"name": "tiny", "dequantised_from": "Q4_1"},
        "seeds": [0],
        "sampling": {"n": None, "temperature": 0.2, "top_p": 0.9, "tokens": 100},
        "dtype": "float32",
        "benchmarks": ["First", "Second"],
        "dataset": {"read": 10, "kept": 8, "dropped": request.param},
        "models": [{"model": "xl", **model, "last_loss": 2.0, "held_out_loss": None}],
        "scores": _scores(table, "greedy", ["First", "Second"]),
        "comparisons": _comparisons(table, "greedy", ["First", "Second"]),
        "cost": {"training_s": 1.5, "evaluating_s": 2.0, "parts": {"xl greedy": {"answering_s": 1.0, "total_s": 2.0}}},
        "machines": {"training": ["one GPU"], "answering": [], "running": ["two cores"]},
    }


def test_scores_and_differences_are_those_counted_by_hand(report: dict[str, Any]) -> None:
    pooled = {row["system"]: row for row in report["scores"] if row["benchmark"] == "pooled"}
    assert {system: row["value"] for system, row in pooled.items()} == pytest.approx(
        {"base": 0.2, "xl": 0.4, "cert": 0.8}
    )
    assert [(row["passed"], row["samples"]) for row in pooled.values()] == [(1, 5), (2, 5), (4, 5)]
    (last,) = [row for row in report["comparisons"] if row["benchmark"] == "pooled" and row["pair"] == ["xl", "cert"]]
    assert last["difference"]["value"] == pytest.approx(0.4)
    assert (last["wins"], last["losses"], last["ties"]) == (("P/2", "P/4"), (), 3)


def test_the_pages_say_what_was_compared(report: dict[str, Any]) -> None:
    text = render(report, "claim.md.j2")
    assert "dequantised from Q4_1" in text
    assert "| greedy | pooled | CERT | 4 of 5 | pass@1 80.00% |" in text
    assert "| greedy | pooled | CERT - XL | +40.00 |" in text
    assert ("dropped for holding a problem" in text) == bool(report["dataset"]["dropped"])
    page = render(report, "claim.html.j2", picture="AAAA")
    assert "<td>+40.00</td>" in page
    assert "None" not in text + page
    with Image.open(io.BytesIO(draw_scores(report))) as picture:
        assert picture.format == "PNG"


def test_cards_get_the_scores_of_each_benchmark(report: dict[str, Any]) -> None:
    assert [(score.benchmark, score.system, score.value) for score in card_scores(report, "cert", "cascade")] == [
        ("First", "cascade", 1.0),
        ("Second", "cascade", 0.5),
    ]
