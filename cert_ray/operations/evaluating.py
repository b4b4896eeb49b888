"""`cert-ray evaluate` and `cert-ray compare` behind their options: sources and problems in, finished folders out."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import xxhash

from cert_ray import manifests, storage
from cert_ray.errors import ConfigError
from cert_ray.evaluation.benchmarks import read_problems
from cert_ray.evaluation.comparison import compare_runs, render_comparison, render_table, summarise
from cert_ray.evaluation.execution import Execute, execute_in_threads
from cert_ray.evaluation.fetch import find_problems
from cert_ray.evaluation.run import Complete, EvaluateConfig, is_finished, run_evaluation
from cert_ray.evaluation.runs import read_run, read_runs, remove_sweep
from cert_ray.evaluation.sandbox import describe_isolation
from cert_ray.evaluation.sweep import SweepConfig, run_sweep
from cert_ray.retrieval.retriever import RetrieveConfig

_log = logging.getLogger(__name__)


def evaluate(
    config: EvaluateConfig,
    problems: Sequence[str],
    temperatures: Sequence[float],
    sampling: dict[str, Any],
    execute: Execute = execute_in_threads,
    *,
    reuse: bool = False,
) -> dict[str, dict[str, float]]:
    """Score a file of samples, or `config.source` at every temperature. Returns each evaluation's name and pass@k.

    Args:
        reuse: do not repeat a single evaluation that is finished, with the same models and options. Never applies to
            an endpoint, which may have another model behind it.

    Raises:
        ConfigError: for several benchmarks or temperatures together with a file of samples.
        InputError: when a file of problems is missing, or has a line that cannot be used.
    """
    problems = [find_problems(one) for one in problems]
    config = config.model_copy(update={"problems": problems[0], "source_digest": _source_digest(config.source)})
    if config.samples is None:
        for one in problems:
            read_problems(one)  # reports what is wrong with them before models are loaded
    for line in describe_isolation(config.execution.unsafe, config.execution.unfiltered):
        _log.info("isolation, as on this machine: %s", line)
    if config.samples is None and (len(problems) > 1 or len(temperatures) > 1):
        sweep = SweepConfig(problems=tuple(problems), temperatures=tuple(temperatures), each=config)
        found = run_sweep(sweep, _complete_at(config, sampling), execute)
        return {
            f"{one['benchmark']} at its best temperature, {one['best']['temperature']}": {
                f"pass@{k}": score["value"] for k, score in one["best"]["pass_at_k"].items()
            }
            for one in found["benchmarks"]
        }
    if len(problems) > 1 or len(temperatures) > 1:
        raise ConfigError("evaluate: --samples goes with one --problems file and one --temperature only.")
    if reuse and config.source_digest and is_finished(config):
        _log.info("%s is finished", config.output)
        remove_sweep(config.output)
        run = read_run(config.output)
        return {config.problems: {f"pass@{k}": run.interval(k).value for k in run.ks}}
    complete = None if config.samples else _complete_at(config, sampling)(temperatures[0])
    result = run_evaluation(config, complete, execute)
    return {config.problems: {f"pass@{k}": value for k, value in result.pass_at_k.items()}}


def _complete_at(config: EvaluateConfig, sampling: dict[str, Any]) -> Callable[[float], Complete]:
    from cert_ray.operations.sources import Source, complete_at  # torch: 3 s that a file of samples need not wait

    return complete_at(Source.from_mapping(config.source, "evaluate"), sampling)


def _source_digest(source: Mapping[str, str]) -> str:
    """A digest that changes when `source` holds other models or docs; empty for a source that cannot be looked at."""
    found = [describe_model(source[option]) for option in ("generator", "model", "sketcher") if option in source]
    if source.get("retrieve"):
        found.append(RetrieveConfig.from_text(source["retrieve"]).pinned().checksum or "")
    return str(xxhash.xxh3_64_hexdigest("\n".join(found).encode(errors="surrogateescape"))) if any(found) else ""


def describe_model(folder: str) -> str:
    """What distinguishes the model in `folder`: its manifest's checksums, else file names, sizes and change times."""
    if not storage.is_folder(folder):
        return ""
    if manifests.is_finished(folder):
        return manifests.read_manifest(folder, "model", "train").files_digest()
    return "\n".join(f"{storage.name_of(e.url)} {e.size_bytes} {e.version}" for e in storage.list_files(folder))


def tabulate(folders: Sequence[str], output: str) -> str:
    """Put finished evaluations in one table, write `output`/table.md and .html, and return the Markdown.

    Raises:
        InputError: when one is not finished.
    """
    runs = [run for folder in folders for run in read_runs(folder)]
    for form in ("html", "md"):
        text = render_table(runs, form)
        storage.write_text(storage.join(output, f"table.{form}"), text)
    return text


def compare(first: str, second: str, output: str, ks: Sequence[int] | None = None) -> str:
    """Compare two finished evaluations, write `output`/compare.md, .html and .json, and return the Markdown.

    Raises:
        InputError, ConfigError: when they are not finished, or do not belong together.
    """
    found = compare_runs(read_runs(first), read_runs(second), ks)
    markdown = render_comparison(found, "md")
    storage.write_text(storage.join(output, "compare.md"), markdown)
    storage.write_text(storage.join(output, "compare.html"), render_comparison(found, "html"))
    storage.write_text(storage.join(output, "compare.json"), json.dumps(summarise(found), indent=1) + "\n")
    return markdown
