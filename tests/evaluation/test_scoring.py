"""Counting: which samples belong to which problem, which k are possible, what is refused."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from cert_ray.errors import ConfigError
from cert_ray.evaluation.benchmarks import Problem, Sample
from cert_ray.evaluation.execution import ExecutionConfig
from cert_ray.evaluation.programs import Program
from cert_ray.evaluation.rerank import RerankMethod
from cert_ray.evaluation.sandbox import Execution
from cert_ray.evaluation.scoring import EvaluationResult, evaluate, rerank_counts
from tests.evaluation.builders import in_this_process

PROBLEMS = [Problem(f"T/{n}", "x =", None, f"def check(): assert x == {n}", (f" {n}",)) for n in range(3)]


def score(samples: list[Sample], k: tuple[int, ...] | None = None, run_gold: bool = False) -> EvaluationResult:
    return evaluate(PROBLEMS, samples, ExecutionConfig(), k=k, run_gold=run_gold, execute=in_this_process)


def drawn(*completions: str) -> list[Sample]:
    return [Sample(problem.task_id, text) for problem in PROBLEMS for text in completions]


def test_counts_belong_to_their_problem_whatever_the_order_of_samples() -> None:
    samples = [*drawn(" 0", " 0", " 1"), Sample("T/2", " 2")]
    result = score(samples)
    assert [(one.num_samples, one.num_passed) for one in result.problems] == [(3, 2), (3, 1), (4, 1)]
    assert score(samples[::-1]).pass_at_k == result.pass_at_k == {1: pytest.approx((2 / 3 + 1 / 3 + 1 / 4) / 3)}
    assert result.outcomes == {"failed": 6, "passed": 4}


def test_default_k_are_those_that_every_problem_allows() -> None:
    assert set(score(drawn(*[" 0"] * 10)).pass_at_k) == {1, 10}
    assert set(score(drawn(*[" 0"] * 9)).pass_at_k) == {1}


@pytest.mark.parametrize("k", [(3,), (1, 4), (0,)])
def test_a_k_beyond_the_samples_is_refused(k: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="T/0 has 2"):
        score(drawn(" 0", " 1"), k)


def test_problems_without_samples_and_samples_without_problems_are_refused() -> None:
    with pytest.raises(ConfigError, match="1 of 3 problems have none: T/2"):
        score(drawn(" 0")[:2])
    with pytest.raises(ConfigError, match="U/1"):
        score([*drawn(" 0"), Sample("U/1", "")])
    with pytest.raises(ConfigError):
        score([])


def test_reranking_is_scored_on_the_first_candidate_and_runs_its_programs_once() -> None:
    ran: list[int] = []

    def execute(programs: Sequence[Program | str], config: ExecutionConfig) -> list[Execution]:
        ran.append(len(programs))
        return in_this_process(programs, config)

    samples = [Sample(p.task_id, text, logprob=value) for p in PROBLEMS for text, value in ((" 5", -1.0), (" 1", -0.5))]
    results = score([*samples, *drawn(" 2", " 2 ")]).problems
    counts = {m: rerank_counts(results, m, ExecutionConfig(), execute) for m in RerankMethod}
    assert counts[RerankMethod.LOGPROB] == [(1, 0), (1, 1), (1, 0)]
    assert counts[RerankMethod.SYNTAX] == [(1, 0), (1, 0), (1, 1)]
    assert counts[RerankMethod.AGREEMENT] == [(1, 0), (1, 0), (1, 1)]
    assert ran == [0, 0, 3 * 4]  # four texts a problem; prompts without numbers in brackets have no variants
    with pytest.raises(ConfigError, match="log-probability"):
        rerank_counts(score(drawn(" 1")).problems, RerankMethod.LOGPROB, ExecutionConfig(), execute)


def test_the_valid_subset_leaves_out_problems_whose_answer_fails() -> None:
    wrong = Problem("T/9", "x =", None, "def check(): assert x == 9", (" 8", " 7"))
    result = evaluate(
        [*PROBLEMS, wrong],
        [*drawn(" 1"), Sample("T/9", " 8")],
        ExecutionConfig(),
        run_gold=True,
        execute=in_this_process,
    )
    assert result.gold_failed == ("T/9",)
    assert result.pass_at_k == {1: 0.25}
    assert result.pass_at_k_valid == {1: pytest.approx(1 / 3)}
