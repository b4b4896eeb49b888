"""Benchmarks as other harnesses read them.

lm-eval itself is not installed with the project: docs/evaluation.md says what was run with it. Here its part is played
by what it does with a task file: parse it, load the functions beside it, call them with documents and completions.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from cert_ray.errors import ConfigError
from cert_ray.evaluation import harness
from cert_ray.evaluation.benchmarks import read_problems
from tests.evaluation.builders import in_this_process, write_problems


class Loader(yaml.SafeLoader):
    """Reads `!function module.name` as lm-eval does: a function of the module beside the file."""


def load_task(path: Path) -> dict[str, Any]:
    def function(loader: Loader, node: yaml.ScalarNode) -> Callable[..., Any]:
        module, _, name = str(loader.construct_scalar(node)).partition(".")
        spec = importlib.util.spec_from_file_location(module, path.parent / f"{module}.py")
        assert spec is not None
        assert spec.loader is not None
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
        found: Callable[..., Any] = getattr(loaded, name)
        return found

    Loader.add_constructor("!function", function)
    found: dict[str, Any] = yaml.load(path.read_text(), Loader)
    return found


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    problems = write_problems(tmp_path / "ThreeEval.jsonl", 3)
    assert harness.export_tasks([problems], str(tmp_path / "tasks"), n=2, temperature=0.5) == ["three_eval"]
    judge = harness.judge_rows

    def judge_here(completions: Sequence[Sequence[str]], rows: Sequence[dict[str, Any]], *_: Any) -> list[list[str]]:
        return judge(completions, rows, in_this_process)

    monkeypatch.setattr(harness, "judge_rows", judge_here)
    return tmp_path / "tasks"


def test_lm_eval_draws_by_the_task_file_and_cert_ray_scores(folder: Path) -> None:
    task = load_task(folder / "three_eval.yaml")
    rows = [json.loads(line) for line in Path(task["dataset_kwargs"]["data_files"]["test"]).read_text().splitlines()]
    assert (task["task"], task["repeats"], task["output_type"]) == ("three_eval", 2, "generate_until")
    assert [row[task["doc_to_text"]] for row in rows] == [f"# {number}\nx =" for number in range(3)]
    assert task["generation_kwargs"] | {"until": len(task["generation_kwargs"]["until"])} == {
        "until": 6,
        "max_gen_toks": 100,
        "do_sample": True,
        "temperature": 0.5,
        "top_p": 0.9,
    }
    completions = [[" 0", " 5"], [" 1\ndef f(:", " 1"], [" 7", " 8"]]  # the second is cut before its syntax error
    outcomes = task["filter_list"][0]["filter"][0]["filter_fn"](completions, rows)
    assert outcomes == [["passed", "failed"], ["passed", "passed"], ["failed", "failed"]]
    score = task["metric_list"][0]["metric"]
    assert [score(references=[""], predictions=[one]) for one in outcomes] == [
        {"pass@1": 0.5},
        {"pass@1": 1.0},
        {"pass@1": 0.0},
    ]


def test_bigcode_gets_tasks_that_score_what_it_generates_whatever_the_limit(folder: Path) -> None:
    spec = importlib.util.spec_from_file_location("cert_ray_tasks", folder / "cert_ray_tasks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tasks = module.create_all_tasks()
    assert list(tasks) == ["three-eval"]
    task = tasks["three-eval"]()
    dataset = task.get_dataset()
    task.stop_words.append("<eos>")  # as the evaluator does with a tokenizer's own
    shown = [dataset[place] for place in (1, 2)]  # as --limit_start 1 --limit 2
    references = [task.get_reference(doc) for doc in shown]
    generated = [[task.get_prompt(doc) + text for text in (" 1\n# on", " 1<eos><eos>")] for doc in shown]
    generations = [
        [task.postprocess_generation(text, place) for text in some]
        for place, some in zip((1, 2), generated, strict=True)
    ]
    assert generations[0][0] == "# 1\nx = 1"
    assert task.process_results(generations, references) == {"pass@1": 0.5}  # of both, x is 1
    answers = [[task.get_reference(doc, get_solution=True)] for doc in shown]  # as --check_references
    assert task.process_results(answers, references) == {"pass@1": 1.0}


def test_a_problem_survives_the_way_through_a_row(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    row = {"task_id": "T/0", "prompt": "import monkey\n", "entry_point": "f", "test": "def check(f): pass"}
    path.write_text(json.dumps({**row, "canonical_solution": ["a", "b"], "renamed": {"monkey": "pandas"}}))
    problem = read_problems(str(path))[0]
    assert harness._problem(harness._row(problem)) == problem


@pytest.mark.parametrize(("options", "message"), [({"n": 5}, "--temperature above 0"), ({}, "every benchmark once")])
def test_what_cannot_be_exported_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    problems = [write_problems(tmp_path / "p.jsonl", 1)] * (1 if options else 2)
    with pytest.raises(ConfigError, match=message):
        harness.export_tasks(problems, str(tmp_path / "tasks"), **options)
