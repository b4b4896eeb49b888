"""Problems, samples and a way to run programs in; per-problem counts and pass@k out.

The raw score counts every problem. Some problems of the published benchmarks fail even with their own answers, under
every library version that was tried. When gold answers are run too, the score over the problems whose answer passes is
given beside the raw one, never instead of it.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from cert_ray.errors import ConfigError
from cert_ray.evaluation.benchmarks import Problem, Sample
from cert_ray.evaluation.execution import Execute, ExecutionConfig, execute_in_threads
from cert_ray.evaluation.pass_at_k import mean_pass_at_k
from cert_ray.evaluation.programs import Program, assemble, assemble_gold, truncate
from cert_ray.evaluation.rerank import Candidate, RerankMethod, rank
from cert_ray.evaluation.sandbox import Execution, Outcome
from cert_ray.evaluation.statistics import Counts

_log = logging.getLogger(__name__)
_DEFAULT_K = (1, 10, 100)  # the values that the papers report


@dataclass(frozen=True, slots=True)
class ProblemResult:
    """The samples of one problem and what became of each. `gold_passed` is None if the answer was not run.

    `gold_detail` is what the answer failed with.
    """

    problem: Problem
    samples: tuple[Sample, ...]
    completions: tuple[str, ...]  # as they were run: cut, if cutting was asked for
    executions: tuple[Execution, ...]
    gold_passed: bool | None = None
    gold_detail: str = ""

    @property
    def num_samples(self) -> int:
        return len(self.completions)

    @property
    def num_passed(self) -> int:
        return sum(execution.outcome is Outcome.PASSED for execution in self.executions)


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """Every problem's result, in the benchmark's order; pass@k by k, over all and over those whose answer passes."""

    problems: tuple[ProblemResult, ...]
    pass_at_k: dict[int, float]
    pass_at_k_valid: dict[int, float] | None

    @property
    def outcomes(self) -> dict[str, int]:
        """Samples by outcome, most frequent first."""
        counts = Counter(str(execution.outcome) for result in self.problems for execution in result.executions)
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))

    @property
    def gold_failed(self) -> tuple[str, ...]:
        """The task_ids of problems whose own answer did not pass here."""
        return tuple(result.problem.task_id for result in self.problems if result.gold_passed is False)


def evaluate(
    problems: Sequence[Problem],
    samples: Sequence[Sample],
    environment: ExecutionConfig,
    *,
    k: Sequence[int] | None = None,
    cut: bool = False,
    run_gold: bool = False,
    execute: Execute = execute_in_threads,
) -> EvaluationResult:
    """Run every sample and count. With `cut`, completions are first cut at the paper's stops.

    `k` None takes each of 1, 10 and 100 that the number of samples allows.

    Raises:
        ConfigError: when a problem has no sample, a sample no problem, or fewer samples than the largest k.
        SandboxError: when programs could not be run.
    """
    grouped = _by_problem(problems, samples)
    ks = _chosen_k(k, grouped)
    completions = {
        task_id: tuple(truncate(sample.completion) if cut else sample.completion for sample in some)
        for task_id, some in grouped.items()
    }
    gold = [assemble_gold(problem) if run_gold else () for problem in problems]
    programs = [assemble(problem, text) for problem in problems for text in completions[problem.task_id]]
    executions = iter(execute([*programs, *(program for group in gold for program in group)], environment))
    drawn = [tuple(next(executions) for _ in completions[problem.task_id]) for problem in problems]
    own = [[next(executions) for _ in group] for group in gold]
    results = tuple(
        ProblemResult(problem, grouped[problem.task_id], completions[problem.task_id], runs, *_own(answers))
        for problem, runs, answers in zip(problems, drawn, own, strict=True)
    )
    return EvaluationResult(results, _scores(results, ks), _valid_scores(results, ks))


def rerank_counts(
    results: Sequence[ProblemResult], method: RerankMethod, environment: ExecutionConfig, execute: Execute
) -> list[Counts]:
    """Whether each problem's first candidate passes after reordering, as counts of one sample each.

    All programs of all problems run together, so candidates are ranked twice: first to learn what has to be run.
    Raises:
        ConfigError: when `method` needs log-probabilities and the samples have none.
        SandboxError: when programs could not be run.
    """
    wanted: list[Program] = []

    def note(programs: Sequence[Program]) -> list[Execution]:
        wanted.extend(programs)
        return [Execution(Outcome.FAILED, "", "")] * len(programs)

    try:
        for one in results:
            rank(one.problem.prompt, _candidates(one), method, note)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    seen = dict(zip(wanted, execute(wanted, environment), strict=True))
    firsts = [
        rank(one.problem.prompt, _candidates(one), method, lambda programs: [seen[program] for program in programs])[0]
        for one in results
    ]
    passed = [one.executions[first].outcome is Outcome.PASSED for one, first in zip(results, firsts, strict=True)]
    return [(1, int(one)) for one in passed]


def _candidates(one: ProblemResult) -> list[Candidate]:
    return [Candidate(text, sample.logprob) for text, sample in zip(one.completions, one.samples, strict=True)]


def _by_problem(problems: Sequence[Problem], samples: Sequence[Sample]) -> dict[str, tuple[Sample, ...]]:
    grouped: defaultdict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        grouped[sample.task_id].append(sample)
    known = [problem.task_id for problem in problems]
    missing = [task_id for task_id in known if task_id not in grouped]
    strange = sorted(set(grouped) - set(known))
    if not known:
        raise ConfigError("problems: there are none to score.")
    if strange:
        raise ConfigError(
            f"samples: not in the benchmark: {_some(strange)}. Score samples with the one that they were made for."
        )
    if missing:
        raise ConfigError(
            f"samples: {len(missing)} of {len(known)} problems have none: {_some(missing)}. Add them (an empty "
            'completion, {"task_id": ..., "completion": ""}, fails), or score the first problems alone with --limit.'
        )
    fewest, most = (choose(len(some) for some in grouped.values()) for choose in (min, max))
    if fewest < most:
        _log.warning("samples: from %d to %d per problem; pass@k is unbiased only for k up to %d", fewest, most, fewest)
    return {task_id: tuple(grouped[task_id]) for task_id in known}


def _some(task_ids: Sequence[str]) -> str:
    shown = ", ".join(task_ids[:10])
    return shown if len(task_ids) <= 10 else f"{shown} and {len(task_ids) - 10} more"


def _chosen_k(k: Sequence[int] | None, grouped: dict[str, tuple[Sample, ...]]) -> tuple[int, ...]:
    task_id, fewest = min(((name, len(texts)) for name, texts in grouped.items()), key=lambda item: item[1])
    if k is None:
        return tuple(value for value in _DEFAULT_K if value <= fewest)
    for value in k:
        if not 1 <= value <= fewest:
            raise ConfigError(f"k: {value} must lie between 1 and the samples per problem; {task_id} has {fewest}.")
    return tuple(sorted(set(k)))


def _own(answers: Sequence[Execution]) -> tuple[bool | None, str]:
    """Whether one of a problem's own answers passed and, if none did, what the last one failed with."""
    if not answers:
        return None, ""
    if any(one.outcome is Outcome.PASSED for one in answers):
        return True, ""
    return False, answers[-1].detail or str(answers[-1].outcome)


def _scores(results: Sequence[ProblemResult], ks: Sequence[int]) -> dict[int, float]:
    return {k: mean_pass_at_k(((result.num_samples, result.num_passed) for result in results), k) for k in ks}


def _valid_scores(results: Sequence[ProblemResult], ks: Sequence[int]) -> dict[int, float] | None:
    valid = [result for result in results if result.gold_passed]
    return _scores(valid, ks) if valid else None
