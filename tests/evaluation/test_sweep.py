"""Several benchmarks and temperatures: what is written, what is not done twice, and what cannot be asked for."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from cert_ray.errors import ConfigError, InputError, SandboxError
from cert_ray.evaluation.comparison import compare_runs, render_comparison, render_table, summarise
from cert_ray.evaluation.run import EvaluateConfig, is_finished, run_evaluation
from cert_ray.evaluation.runs import read_run, read_runs
from cert_ray.evaluation.sweep import SweepConfig, run_sweep
from tests.evaluation.builders import in_this_process, write_problems


class Model:
    """Right at problems below ten times its temperature, in every second sample; counts its calls."""

    def __init__(self, fail_after: int | None = None) -> None:
        self.calls: list[tuple[float, int]] = []
        self._fail_after = fail_after

    def at(self, temperature: float) -> object:
        def complete(prompts: list[str], n: int) -> list[list[str]]:
            if self._fail_after is not None and len(self.calls) >= self._fail_after:
                raise SandboxError("killed")
            self.calls.append((temperature, len(prompts)))
            return [[self._answer(int(prompt[2]), temperature, i) for i in range(n)] for prompt in prompts]

        return complete

    def _answer(self, number: int, temperature: float, sample: int) -> str:
        return f" {number}" if number < 10 * temperature and sample % 2 else f" -1 - {sample}"


def config(tmp_path: Path, **options: object) -> SweepConfig:
    problems = tuple(write_problems(tmp_path / f"{name}.jsonl", 6, name) for name in ("A", "B"))
    each = EvaluateConfig.from_mapping(
        {
            "problems": problems[0],
            "output": str(tmp_path / "out"),
            "n": 4,
            "k": [1, 2],
            "prompts_per_call": 2,
            **options,
        },
        "test",
    )
    return SweepConfig(problems=problems, temperatures=(0.2, 0.4), each=each)


def test_every_pair_has_a_folder_and_the_best_temperature_stands_beside_all(tmp_path: Path) -> None:
    found = run_sweep(config(tmp_path), Model().at, in_this_process)  # type: ignore[arg-type]
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir() if path.is_dir()} == {"A-t0.2", "A-t0.4", "B-t0.2", "B-t0.4"}
    one = json.loads((out / "sweep.json").read_text())["benchmarks"][1]
    assert (one["benchmark"], one["best"]["temperature"], one["best"]["folder"]) == ("B", 0.4, "B-t0.4")
    values = [score["pass_at_k"]["1"]["value"] for score in one["scores"]]
    assert values == [
        pytest.approx(2 / 6 / 2),
        pytest.approx(4 / 6 / 2),
    ]  # 2 and 4 of 6 problems, half of their samples
    assert found["benchmarks"][1] == one
    page = (out / "sweep.html").read_text()
    assert page.count("<svg") == 2
    assert 'href="A-t0.2/report.html"' in page
    assert [run.folder for run in read_runs(str(out))] == [str(out / "A-t0.4"), str(out / "B-t0.4")]


def test_a_folder_holds_the_scores_of_what_was_done_last(tmp_path: Path) -> None:
    sweep, out = config(tmp_path), tmp_path / "out"
    model = Model()

    def scored() -> list[str]:
        return [Path(run.folder).name for run in read_runs(str(out))]

    run_sweep(sweep, model.at, in_this_process)  # type: ignore[arg-type]
    calls = len(model.calls)
    with pytest.raises(SandboxError):  # killed once it has begun
        run_evaluation(sweep.each, Model(fail_after=1).at(0.2), in_this_process)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"no summary\.json"):
        scored()
    run_evaluation(sweep.each, Model().at(0.2), in_this_process)  # type: ignore[arg-type]
    assert scored() == ["out"]
    run_sweep(sweep, model.at, in_this_process)  # type: ignore[arg-type]
    assert scored() == ["A-t0.4", "B-t0.4"]
    assert not list(out.glob("report.*"))
    assert not is_finished(sweep.each)
    assert len(model.calls) == calls  # the sweep's own evaluations were kept


def test_a_killed_sweep_goes_on_where_it_was_and_ends_the_same(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    whole = config(tmp_path / "whole")
    run_sweep(whole, Model().at, in_this_process)  # type: ignore[arg-type]
    cut = config(tmp_path)
    first, second, third = Model(fail_after=5), Model(), Model()
    with pytest.raises(SandboxError):
        run_sweep(cut, first.at, in_this_process)  # type: ignore[arg-type]
    run_sweep(cut, second.at, in_this_process)  # type: ignore[arg-type]
    assert len(first.calls) + len(second.calls) == 12  # four evaluations of three batches: none was asked for twice
    run_sweep(cut, third.at, in_this_process)  # type: ignore[arg-type]
    assert third.calls == []
    for name in ("A-t0.2", "A-t0.4", "B-t0.2", "B-t0.4"):
        for file in ("samples.jsonl", "results.jsonl"):
            cut_file, whole_file = tmp_path / "out" / name / file, tmp_path / "whole" / "out" / name / file
            assert cut_file.read_bytes() == whole_file.read_bytes()
        assert not (tmp_path / "out" / name / "parts").exists()


def test_other_options_are_another_evaluation(tmp_path: Path) -> None:
    cell = config(tmp_path).cells()[0]
    run_evaluation(cell, Model().at(0.2), in_this_process)  # type: ignore[arg-type]
    assert is_finished(cell)
    assert not is_finished(cell.model_copy(update={"seed": 1}))
    with (tmp_path / "out" / "A-t0.2" / "samples.jsonl").open("a") as stream:
        stream.write("\n")
    assert not is_finished(cell)


def test_the_order_of_calls_does_not_show(tmp_path: Path) -> None:
    one, many = (config(tmp_path / name, calls_at_once=count) for name, count in made(tmp_path, {"one": 1, "many": 3}))
    for some in (one, many):
        run_evaluation(some.cells()[0], Model().at(0.2), in_this_process)  # type: ignore[arg-type]
    texts = [(tmp_path / name / "out" / "A-t0.2" / "results.jsonl").read_bytes() for name in ("one", "many")]
    assert texts[0] == texts[1]


def made(tmp_path: Path, names: dict[str, int]) -> Sequence[tuple[str, int]]:
    for name in names:
        (tmp_path / name).mkdir()
    return list(names.items())


def test_a_file_or_temperature_given_twice_is_refused(tmp_path: Path) -> None:
    some = config(tmp_path)
    for update in ({"temperatures": (0.2, 0.2)}, {"problems": (some.problems[0], some.problems[0])}):
        with pytest.raises(ConfigError, match="once"):
            some.model_copy(update=update).cells()


def test_a_comparison_has_the_statistics_and_every_problem(tmp_path: Path) -> None:
    run_sweep(config(tmp_path), Model().at, in_this_process)  # type: ignore[arg-type]
    cold, warm = (read_run(str(tmp_path / "out" / name)) for name in ("A-t0.2", "A-t0.4"))
    found = compare_runs([cold], [warm])
    rows = summarise(found)
    assert [(row["k"], row["wins"], row["losses"], row["ties"]) for row in rows] == [(1, 2, 0, 4), (2, 2, 0, 4)]
    assert rows[0]["difference"] == pytest.approx(2 / 6 / 2)
    page = render_comparison(found, "html")
    assert page.count('class="cell second"') == 2
    assert "| A/2 | 0/4 | 2/4 | second |" in render_comparison(found, "md")
    with pytest.raises(ConfigError, match="k must be among"):
        compare_runs([cold], [warm], [10])
    other = read_run(str(tmp_path / "out" / "B-t0.4"))
    with pytest.raises(ConfigError, match="different problem files"):
        compare_runs([cold], [other])


def test_a_table_has_every_run_and_marks_what_is_published(tmp_path: Path) -> None:
    problems = write_problems(tmp_path / "p.jsonl", 4, "HumanEval")
    for name in ("a", "b"):
        cell = EvaluateConfig(problems=problems, output=str(tmp_path / name), source={"model": name})
        run_evaluation(cell, lambda prompts, n: [[" 1"] * n for _ in prompts], in_this_process)
    text = render_table([read_run(str(tmp_path / name)) for name in ("a", "b")], "md")
    assert re.search(r"(?m)^\| model a \| 25\.00 \(\d+\.\d\d to \d+\.\d\d\) \|.*\| measured \|$", text)
    assert "| PyCodeGPT 110M | 8.32 | 13.53 | 18.3 |" in text
    assert text.count("| published |") == 7


def test_a_folder_without_a_finished_evaluation_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"summary\.json"):
        read_runs(str(tmp_path))


@pytest.mark.parametrize("text", ["{", "[]", '{"benchmarks": [{"best": {}}]}'])
def test_a_damaged_sweep_is_named_with_what_to_do(tmp_path: Path, text: str) -> None:
    (tmp_path / "sweep.json").write_text(text)
    with pytest.raises(InputError, match=r"sweep\.json: damaged.*evaluate` again"):
        read_runs(str(tmp_path))


@pytest.mark.parametrize("text", ["{}", '{"config": {}, "pass_at_k": {}}', '{"config": 1}'])
def test_a_damaged_summary_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "summary.json").write_text(text)
    (tmp_path / "results.jsonl").write_text("")
    with pytest.raises(InputError, match="not a finished evaluation"):
        read_runs(str(tmp_path))


def test_an_evaluation_of_before_the_option_unfiltered_is_finished_and_digests_are_of_then(tmp_path: Path) -> None:
    config = EvaluateConfig(problems=write_problems(tmp_path / "p.jsonl", 2), output=str(tmp_path / "out"))
    run_evaluation(config, lambda prompts, n: [[" 1"] * n for _ in prompts], in_this_process)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    summary["config"]["execution"].pop("unfiltered", None)  # as it was written then
    (tmp_path / "out" / "summary.json").write_text(json.dumps(summary))
    assert is_finished(config)
    assert "unfiltered" not in config.model_dump(mode="json")["execution"]
    accepted = config.model_copy(update={"execution": config.execution.model_copy(update={"unfiltered": True})})
    assert not is_finished(accepted)
    assert EvaluateConfig.from_mapping(accepted.model_dump(mode="json"), "test") == accepted
