"""From models and folders to evaluations: what is said of samples, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cert_ray.errors import BenchmarkFormatError, ConfigError
from cert_ray.evaluation.benchmarks import Answer
from cert_ray.evaluation.run import EvaluateConfig, run_evaluation
from cert_ray.operations import evaluating
from cert_ray.operations.sources import complete_with_answers
from cert_ray.serving.answers import CascadeAnswer, Listener, Route
from cert_ray.serving.completers import CompleterConfig
from cert_ray.serving.engines import Completion
from cert_ray.serving.sampling import Sampling
from tests.evaluation.builders import in_this_process, write_problems
from tests.serving.fakes import FakeAnswerer


class Cascade(FakeAnswerer):
    """An answerer with a fixed sketch."""

    def answer_one(self, prompt: str, sampling: Sampling, listener: Listener) -> CascadeAnswer:
        choices = tuple(Completion((), f" {number}", "stop", -0.5) for number in range(sampling.n))
        return CascadeAnswer(choices, Route.GENERATOR, " number", 2, 0.5)


def test_a_cascades_samples_say_sketch_route_and_votes_and_the_report_shows_them(tmp_path: Path) -> None:
    complete = complete_with_answers(Cascade(), CompleterConfig())
    assert complete(["x ="], 1) == [[Answer(" 0", " number", "generator", 0.5, -0.5)]]
    config = EvaluateConfig(problems=write_problems(tmp_path / "p.jsonl", 3), output=str(tmp_path / "out"), n=2)
    run_evaluation(config, complete, in_this_process)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Left the sketch (50% of the sketches asked for)" in page
    assert (
        '"sketch": " number", "route": "generator", "vote_share": 0.5'
        in (tmp_path / "out" / "results.jsonl").read_text()
    )


def test_a_broken_line_is_told_before_a_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good, broken = write_problems(tmp_path / "good.jsonl", 3), tmp_path / "broken.jsonl"
    broken.write_text(Path(good).read_text() + '{"task_id": ')
    config = EvaluateConfig(problems=good, output=str(tmp_path / "out"), source={"model": str(tmp_path)})
    monkeypatch.setattr(evaluating, "_complete_at", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(BenchmarkFormatError, match=r"broken\.jsonl:4: not a JSON object"):
        evaluating.evaluate(config, [good, str(broken)], [0.0], {}, in_this_process)


def test_compare_writes_its_report_and_returns_it(tmp_path: Path) -> None:
    for name in ("a", "b"):
        config = EvaluateConfig(problems=write_problems(tmp_path / "p.jsonl", 3), output=str(tmp_path / name))
        run_evaluation(config, lambda prompts, n: [[" 1"] * n for _ in prompts], in_this_process)
    text = evaluating.compare(str(tmp_path / "a"), str(tmp_path / "b"), str(tmp_path / "c"))
    assert text == (tmp_path / "c" / "compare.md").read_text()
    assert "no problem differs" in text
    assert {path.name for path in (tmp_path / "c").iterdir()} == {"compare.md", "compare.html", "compare.json"}


def test_a_model_folder_may_hold_a_file_whose_name_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    without = evaluating._source_digest({"model": str(tmp_path)})
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff")).write_text("x")
    assert evaluating._source_digest({"model": str(tmp_path)}) != without


def test_samples_belong_to_one_benchmark(tmp_path: Path) -> None:
    config = EvaluateConfig(problems="p", output=str(tmp_path), samples="s")
    with pytest.raises(ConfigError, match="one --problems"):
        evaluating.evaluate(config, ["p", "q"], [0.2], {})
