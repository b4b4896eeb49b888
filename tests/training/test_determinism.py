"""The block's switches, put back afterwards; an operation without a deterministic kernel, told with what to change."""

from __future__ import annotations

import os

import pytest
import torch
import torch._inductor.config

from cert_ray.errors import ConfigError
from cert_ray.training.determinism import deterministic_kernels


def _state() -> dict[str, object]:
    return {
        "torch": torch.are_deterministic_algorithms_enabled(),
        "warns only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "compiler": torch._inductor.config.deterministic,
        "cuDNN measures": torch.backends.cudnn.benchmark,
        "cuBLAS": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
        "NVLS": os.environ.get("NCCL_NVLS_ENABLE"),
    }


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUBLAS_WORKSPACE_CONFIG", "NCCL_NVLS_ENABLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)


def test_all_is_deterministic_within_the_block_and_as_before_behind_it() -> None:
    before = _state()
    with deterministic_kernels():
        assert _state() == {
            "torch": True,
            "warns only": False,
            "compiler": True,
            "cuDNN measures": False,
            "cuBLAS": ":4096:8",
            "NVLS": "0",
        }
    assert _state() == before


def test_what_the_environment_has_already_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    with deterministic_kernels():
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_an_operation_without_a_deterministic_kernel_is_told_with_the_option_to_change() -> None:
    before = _state()
    refused = pytest.raises(ConfigError, match=r"^deterministic: .*put_ does not have a .*Take the option out")
    with refused, deterministic_kernels():
        torch.zeros(3).put_(torch.tensor([0]), torch.tensor([1.0]))
    assert _state() == before


def test_other_errors_stay_what_they_are() -> None:
    before = _state()
    with pytest.raises(RuntimeError, match="illegal memory"), deterministic_kernels():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    assert _state() == before
