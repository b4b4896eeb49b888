"""Benchmarks as tasks of other harnesses: lm-evaluation-harness and bigcode-evaluation-harness.

In: benchmark files. Out: OUTPUT/NAME.jsonl (the problems), OUTPUT/NAME.yaml and cert_ray_tasks.py, which both harnesses
read. The harnesses draw the completions; these are cut and scored here, in the sandbox and with the benchmark's library
versions. So cert-ray must be installed beside the harness, and a score is the same in all three.

A failure of ours ends the harness's run, as it ends one of `cert-ray evaluate`: it never counts as a wrong answer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import yaml

from cert_ray import storage
from cert_ray.errors import ConfigError
from cert_ray.evaluation.benchmarks import Problem, read_problems
from cert_ray.evaluation.execution import Execute, ExecutionConfig, execute_in_threads
from cert_ray.evaluation.pass_at_k import pass_at_k
from cert_ray.evaluation.programs import STOPS, assemble, truncate
from cert_ray.evaluation.sandbox import Outcome

MODULE: Final = "cert_ray_tasks"
_KS: Final = (1, 10, 100)
_GENERATED: Final = '''"""Tasks for lm-eval and bigcode-evaluation-harness, written by `cert-ray export-tasks`."""

from pathlib import Path

from cert_ray.evaluation import harness


def judge(resps, docs):
    """lm-eval: the outcome of each completion, instead of its text."""
    return harness.judge_rows(resps, docs)


def score(references, predictions):
    """lm-eval: pass@k of one problem."""
    return harness.score_outcomes(predictions)


def create_all_tasks():
    """bigcode: a task class for each benchmark here."""
    return harness.bigcode_tasks(Path(__file__).parent)
'''


def export_tasks(problems: Sequence[str], output: str, n: int = 1, temperature: float = 0.0) -> list[str]:
    """Write task files for the benchmark files `problems` into the local folder `output`; returns the tasks' names.

    lm-eval is told to draw `n` samples a problem at `temperature`; bigcode has its own options for that.

    Raises:
        BenchmarkFormatError: for a file that cannot be used.
        ConfigError: for two files with the same name, several samples at temperature 0, or a folder that is not local.
    """
    names = [_task_name(url) for url in problems]
    if len(set(names)) < len(names):
        raise ConfigError(f"--problems: {', '.join(names)}: give every benchmark once.")
    if n > 1 and temperature == 0:
        raise ConfigError(f"--n {n}: several samples want a --temperature above 0.")
    folder = storage.local_path(storage.absolute(output))
    for url, name in zip(problems, names, strict=True):
        rows = [_row(problem) for problem in read_problems(url)]
        data = str(folder / f"{name}.jsonl")
        storage.write_text(data, "".join(json.dumps(row) + "\n" for row in rows))
        storage.write_text(str(folder / f"{name}.yaml"), _yaml(name, data, n, temperature))
    storage.write_text(str(folder / f"{MODULE}.py"), _GENERATED)
    return names


def _task_name(url: str) -> str:
    """pandas_eval for PandasEval.jsonl.gz."""
    name = storage.name_of(url).partition(".")[0]
    spaced = "".join(f"_{char.lower()}" if char.isupper() else char for char in name)
    return spaced.lstrip("_").replace("-", "_")


def _row(problem: Problem) -> dict[str, str]:
    """Only strings, which both harnesses can hold; `problem` is the whole problem as JSON."""
    return {
        "task_id": problem.task_id,
        "prompt": problem.prompt,
        "canonical_solution": problem.canonical_solutions[0] if problem.canonical_solutions else "",
        "problem": json.dumps(asdict(problem)),
    }


def _problem(row: dict[str, Any]) -> Problem:
    fields = json.loads(row["problem"])
    fields |= {"canonical_solutions": tuple(fields["canonical_solutions"])}
    return Problem(**fields | {"renamed": tuple((name, library) for name, library in fields["renamed"])})


def _yaml(name: str, data: str, n: int, temperature: float) -> str:
    """The task for lm-eval. Its `!function` tags name functions in the module beside it."""
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": 0.9}  # the paper's top_p
    fields = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": data}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "prompt",
        "doc_to_target": "canonical_solution",
        "target_delimiter": "",
        "num_fewshot": 0,
        "repeats": n,
        "generation_kwargs": {"until": list(STOPS), "max_gen_toks": 100, **sampling},
        "metadata": {"version": 1.0},
    }
    functions = (
        f"filter_list:\n- name: executed\n  filter:\n  - function: custom\n    filter_fn: !function {MODULE}.judge\n"
        f"metric_list:\n- metric: !function {MODULE}.score\n  aggregation: mean\n  higher_is_better: true\n"
    )
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True) + functions


def judge_rows(
    completions: Sequence[Sequence[str]],
    rows: Sequence[dict[str, Any]],
    execute: Execute = execute_in_threads,
    environment: ExecutionConfig | None = None,
) -> list[list[str]]:
    """The outcome ("passed", "failed", ...) of each completion of each row's problem. All programs run together.

    Raises:
        SandboxError: when programs could not be run.
    """
    problems = [_problem(row) for row in rows]
    if environment is None:
        requirements = dict.fromkeys(one for problem in problems for one in problem.requirements)
        environment = ExecutionConfig(requirements=tuple(requirements))
    programs = [
        assemble(problem, truncate(completion))
        for problem, some in zip(problems, completions, strict=True)
        for completion in some
    ]
    executions = iter(execute(programs, environment))
    return [[str(next(executions).outcome) for _ in some] for some in completions]


def score_outcomes(outcomes: Sequence[Sequence[str]]) -> dict[str, float]:
    """pass@k of one problem, by name, for each k of 1, 10 and 100 that the number of samples allows."""
    flat = [outcome for some in outcomes for outcome in ([some] if isinstance(some, str) else some)]
    passed = sum(outcome == str(Outcome.PASSED) for outcome in flat)
    return {f"pass@{k}": pass_at_k(len(flat), passed, k) for k in _KS if k <= len(flat)}


def bigcode_tasks(folder: Path) -> dict[str, Callable[[], BigCodeTask]]:
    """A task for each benchmark file in `folder`, by its name with hyphens, for bigcode's registry."""

    def task_of(path: Path) -> Callable[[], BigCodeTask]:
        return lambda: BigCodeTask(path)

    return {path.stem.replace("_", "-"): task_of(path) for path in sorted(folder.glob("*.jsonl"))}


class BigCodeTask:
    """What bigcode's evaluator calls of a task. It needs no base class, and no `--allow_code_execution`: nothing runs
    in the evaluator's process. A reference is a task_id, so `--limit` cannot shift answers against problems."""

    def __init__(self, path: Path, execute: Execute = execute_in_threads) -> None:
        self.stop_words = list(STOPS)
        self.requires_execution = False
        self._path, self._execute = str(path), execute

    def get_dataset(self) -> list[dict[str, Any]]:
        """The problems as rows."""
        return _rows(self._path)

    def fewshot_examples(self) -> None:
        """There are none."""

    def get_prompt(self, doc: dict[str, Any]) -> str:
        """The prompt as it is."""
        return str(doc["prompt"])

    def get_reference(self, doc: dict[str, Any], get_solution: bool = False) -> str:
        """The task_id; with `get_solution` (`--check_references`), the prompt and the benchmark's own answer."""
        return str(doc["prompt"] + doc["canonical_solution"] if get_solution else doc["task_id"])

    def postprocess_generation(self, generation: str, idx: int) -> str:
        """The prompt and the completion, cut. The evaluator adds the end of text to `stop_words`, which also cuts."""
        prompt = self.get_prompt(self.get_dataset()[idx])
        return prompt + truncate(generation.removeprefix(prompt), tuple(self.stop_words))

    def process_results(self, generations: Sequence[Sequence[str]], references: Sequence[str]) -> dict[str, float]:
        """Mean pass@k over the problems that `references` name.

        Raises:
            SandboxError: when programs could not be run.
        """
        known = {row["task_id"]: row for row in self.get_dataset()}
        rows = [known[task_id] for task_id in references]
        completions = [
            [text.removeprefix(row["prompt"]) for text in some] for row, some in zip(rows, generations, strict=True)
        ]
        scores = [score_outcomes([one]) for one in judge_rows(completions, rows, self._execute)]
        return {k: sum(score[k] for score in scores) / len(scores) for k in scores[0]} if scores else {}


@lru_cache(maxsize=8)
def _rows(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in storage.read_text(path).splitlines()]
