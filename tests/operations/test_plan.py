"""The plan's arithmetic, by hand counts; its data; and what it says of options that cannot be used."""

from __future__ import annotations

import math
import pickle
import tracemalloc
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from cert_ray import cli, storage
from cert_ray.corpus.sources import SourceConfig, plan_units
from cert_ray.errors import ConfigError, InputError
from cert_ray.operations.plan import (
    LOOSE_FILE_BYTES,
    Cost,
    Costs,
    PlanConfig,
    StageCost,
    cores_used,
    load_costs,
    make_plan,
    render_plan,
)
from tests.bench.bench_driver_memory import loose_files


def stage(name: str = "work", shared_by: str = "units", **costs: Cost) -> StageCost:
    none = Cost()
    figures = ("seconds", "read_bytes", "written_bytes", "worker_memory_bytes", "driver_memory_bytes")
    return StageCost.model_validate({"name": name, "shared_by": shared_by, **{f: costs.get(f, none) for f in figures}})


def costs_of(*stages: StageCost) -> Costs:
    return Costs(
        machine="m", cores=2, date="2026-01-01", command="c", corpus="s", runs=5, versions={}, stages=stages
    )  # fmt: skip


def test_a_stage_takes_its_fixed_seconds_and_its_core_seconds_shared() -> None:
    seconds = Cost(fixed=10, per_document=0.002, per_byte=1e-7)
    config = PlanConfig(files=1e6, size_bytes=10e9, nodes=4, cores=8)
    plan = make_plan(config, costs_of(stage(seconds=seconds)))
    # 1e6 * 0.002 + 10e9 * 1e-7 = 3,000 core-seconds on 32 cores
    assert plan.seconds == pytest.approx(10 + 3000 / 32)
    assert plan.stages[0].core_hours == pytest.approx(3000 / 3600)


@pytest.mark.parametrize(("shared_by", "used"), [("units", 1024), ("bands", 4), ("driver", 1)])
def test_a_stage_uses_only_the_cores_that_it_can_share_work_among(shared_by: str, used: int) -> None:
    config = PlanConfig(files=1e6, size_bytes=1e12, nodes=16, cores=64)
    plan = make_plan(config, costs_of(stage(shared_by=shared_by, seconds=Cost(per_document=1))))
    assert plan.stages[0].cores_used == used
    assert plan.seconds == pytest.approx(1e6 / used)


def test_bands_are_cut_into_more_tasks_in_a_large_corpus() -> None:
    # 25 bands; at most 20 million keys in a task, so four key ranges of each.
    assert [cores_used("bands", 1000, files, 1e9) for files in (1e6, 20e6, 60.6e6)] == [4, 25, 100]


def test_a_task_of_bands_needs_no_more_memory_once_its_keys_are_bounded() -> None:
    def of(files: float) -> float:
        costs = costs_of(stage(shared_by="bands", worker_memory_bytes=Cost(fixed=100, per_document=7)))
        return make_plan(PlanConfig(files=files, size_bytes=1e9, cores=8), costs).stages[0].worker_memory_bytes

    # 7 of 25 bands in a task of a small corpus: a byte a key. At 20 million files a task has one band, at 60 a quarter.
    assert of(1e6) == pytest.approx(100 + 7e6)
    assert of(20e6) == pytest.approx(100 + 20e6)
    assert of(60e6) == pytest.approx(100 + 20e6)
    assert of(70e6) == pytest.approx(100 + 17.5e6)


def test_a_small_corpus_cannot_use_more_cores_than_it_has_units() -> None:
    config = PlanConfig(files=100, size_bytes=3 << 20, cores=64)
    assert make_plan(config, costs_of(stage(seconds=Cost(per_document=1)))).seconds == pytest.approx(100 / 3)


def test_storage_bounds_a_stage_that_computes_little() -> None:
    moving = stage(seconds=Cost(per_byte=1e-12), read_bytes=Cost(per_byte=1), written_bytes=Cost(per_byte=0.5))
    config = PlanConfig(files=1, size_bytes=400e9, nodes=4, cores=8, storage_bytes_per_s=100e6)
    plan = make_plan(config, costs_of(moving))
    assert plan.stages[0].bound_by_storage
    assert plan.seconds == pytest.approx(600e9 / (4 * 100e6))
    assert plan.moved_bytes == pytest.approx(600e9)
    assert plan.disk_bytes == pytest.approx(200e9)


def test_the_fullest_node_holds_the_driver_and_a_worker_on_each_core_that_is_used() -> None:
    light = stage("light", worker_memory_bytes=Cost(fixed=1e9), driver_memory_bytes=Cost(fixed=1e9, per_document=100))
    heavy = stage("heavy", "driver", worker_memory_bytes=Cost(fixed=4e9), driver_memory_bytes=Cost(fixed=3e9))
    config = PlanConfig(files=1e7, size_bytes=1e12, nodes=2, cores=16)
    assert make_plan(config, costs_of(light, heavy)).node_memory_bytes == pytest.approx(1e9 + 1e9 + 16e9)
    assert make_plan(config, costs_of(heavy)).node_memory_bytes == pytest.approx(3e9 + 4e9)


def test_twice_the_nodes_halve_what_is_shared_and_nothing_else() -> None:
    shared = stage("a", seconds=Cost(per_document=1))
    alone = stage("b", "driver", seconds=Cost(fixed=5, per_document=0.001))
    one, two = (
        make_plan(PlanConfig(files=1e6, size_bytes=1e12, nodes=nodes, cores=10), costs_of(shared, alone))
        for nodes in (1, 2)
    )
    assert one.stages[0].seconds == pytest.approx(2 * two.stages[0].seconds)
    assert one.stages[1].seconds == two.stages[1].seconds == pytest.approx(1005)


def test_the_shipped_costs_load_and_say_where_they_come_from() -> None:
    costs = load_costs()
    assert [stage.name for stage in costs.stages] == [
        "documents", "dedup keys", "dedup edges", "dedup clusters", "dataset",
    ]  # fmt: skip
    assert "bench_growth" in costs.command
    plan = make_plan(PlanConfig(files=60.6e6, size_bytes=330e9, nodes=16, cores=32), costs)
    assert math.isfinite(plan.seconds)
    shown = render_plan(plan)
    assert costs.machine in shown
    assert costs.date in shown
    assert "Assumed" in shown


def test_the_plan_says_what_listing_loose_files_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many bytes as it says are enough for what listing and planning allocate at their peak, and half are not."""
    files = 20_000
    monkeypatch.setattr(storage, "list_files", lambda url: loose_files(files))
    monkeypatch.setattr(storage, "is_folder", lambda url: True)
    tracemalloc.start()
    units = plan_units(SourceConfig(inputs=("/corpus",), include=("*",)))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(unit.rows for unit in units) == files
    assert LOOSE_FILE_BYTES / 2 < peak_bytes / files < LOOSE_FILE_BYTES
    plan = make_plan(PlanConfig(files=2e6, size_bytes=1e9, cores=2), load_costs())
    assert "these would take 900 MB more of its memory" in render_plan(plan)


def test_the_command_reads_a_measurement_of_ones_own(tmp_path: Path) -> None:
    own = costs_of(stage("only this", "driver", seconds=Cost(per_document=0.01)))
    (tmp_path / "costs.yaml").write_text(yaml.safe_dump(own.model_dump(mode="json")))
    arguments = ["plan", "corpus", "--files", "1e4", "--bytes", "5e7", "--cores", "2"]
    result = CliRunner().invoke(cli.app, [*arguments, "--costs", str(tmp_path / "costs.yaml")])
    assert result.exit_code == 0, result.output
    assert "only this" in result.output
    assert "time 100.0 s" in result.output


def test_money_is_nodes_times_hours_and_told_only_where_a_price_is() -> None:
    costs = load_costs()
    config = PlanConfig(files=60.6e6, size_bytes=330e9, nodes=16, cores=32)
    plan = make_plan(config, costs)
    assert "node-hours" not in render_plan(plan)
    hours = 16 * sum(stage.seconds for stage in plan.stages) / 3600
    priced = make_plan(config.model_copy(update={"node_hour_price": 1.5}), costs)
    assert f"{hours:,.1f} node-hours at 1.5: {hours * 1.5:,.2f}" in render_plan(priced)


def test_the_help_shows_an_example() -> None:
    result = CliRunner().invoke(cli.app, ["plan", "corpus", "--help"])
    assert "Example: cert-ray plan corpus" in " ".join(result.output.split())


def test_costs_that_cannot_be_used_are_refused_with_a_cure(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such file with costs.*--write-costs"):
        load_costs(str(tmp_path / "none.yaml"))
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(InputError, match="not a YAML mapping"):
        load_costs(str(tmp_path / "list.yaml"))
    (tmp_path / "bad.yaml").write_text("machine: m\ncore: 2\n")
    with pytest.raises(ConfigError, match="core: unknown option") as caught:
        load_costs(str(tmp_path / "bad.yaml"))
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize("options", [{"files": 0}, {"size_bytes": -1}, {"cores": 0}, {"nodes": 0}])
def test_sizes_below_the_least_are_refused(options: dict[str, float]) -> None:
    given = {"files": 1e6, "size_bytes": 1e9, "cores": 4, **options}
    with pytest.raises(ConfigError, match=next(iter(options))):
        PlanConfig.from_mapping(given, "plan corpus")
