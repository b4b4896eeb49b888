"""Which precision is the faster one on a CPU is measured, told, and what the demo trains in."""

from __future__ import annotations

import logging

import pytest
import torch

from cert_ray.operations.demo import DemoConfig, demo_recipe
from cert_ray.operations.doctor import examine
from cert_ray.training import cpu_speed, worker


@pytest.fixture(params=["fp32", "bf16"])
def faster(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The faster precision of the machine that is feigned."""
    monkeypatch.setattr(cpu_speed, "measure", lambda: {"fp32": 1e11, "bf16": 1e11, request.param: 3e11})
    return str(request.param)


def test_a_measurement_is_of_one_thread_and_leaves_the_threads_as_they_were() -> None:
    before = torch.get_num_threads()
    measured = cpu_speed.measure()
    assert set(measured) == {"fp32", "bf16"}
    assert all(flops > 1e8 for flops in measured.values())
    assert torch.get_num_threads() == before


def test_the_demo_trains_in_the_faster_precision(faster: str) -> None:
    recipe = demo_recipe(DemoConfig(output="demo"))
    assert {model.train["precision"] for model in recipe.models.values()} == {faster}


def test_the_doctor_names_the_faster_precision(faster: str) -> None:
    found = {finding.name: finding.found for finding in examine()}["cpu"]
    assert found.endswith(f"GFLOP/s a thread: {faster} trains faster")
    assert f"{faster} 300" in found


def test_a_run_in_the_slower_precision_is_warned(faster: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        worker._warn_of_slow_bf16()
    assert ("fp32 trains faster" in caplog.text) == (faster == "fp32")
