"""MFU against figures worked out by hand and against published ones."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from cert_ray.training.presets import preset_config
from cert_ray.training.utilization import GPUS, flops_per_token, gpu_of_device, utilization


@pytest.fixture(scope="module")
def models():
    """The two large presets, without storage for their weights."""
    with torch.device("meta"):
        return {
            name: AutoModelForCausalLM.from_config(preset_config(name, 32_000, 1_024, 0, 1))
            for name in ("pycodegpt-110m", "modern-110m")
        }


def test_work_per_token_is_that_of_the_matrices_and_of_attention(models):
    """12 layers of 4 x 768^2 and 2 x 768 x 3,072 (three of 768 x 2,048), 32,000 x 768 for the output; attention."""
    attention = 12 * 12 * 768 * 1_024
    neo = 12 * (4 * 768 * 768 + 2 * 768 * 3_072) + 32_000 * 768
    llama = 12 * (4 * 768 * 768 + 3 * 768 * 2_048) + 32_000 * 768
    assert flops_per_token(models["pycodegpt-110m"], 1_024) == 6 * neo + attention
    assert flops_per_token(models["modern-110m"], 1_024) == 6 * llama + attention


def test_llm_c_on_an_h100_is_at_about_forty_percent(models):
    """463,000 tokens/s, as its author gives for a GPT-2 of 124M, whose vocabulary is 50,257."""
    more = 6 * (50_257 - 32_000) * 768
    found = utilization(463_000, flops_per_token(models["pycodegpt-110m"], 1_024) + more, GPUS["h100"].half_flops)
    assert found == pytest.approx(0.40, abs=0.02)


def test_the_share_is_of_all_devices_together_and_unknown_without_a_peak():
    assert utilization(1_000.0, 2e9, 1e12, devices=4) == 0.5
    assert utilization(1_000.0, 2e9, None) is None


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", None),
        ("NVIDIA A10G", None),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None),
        ("Some Other Card", None),
    ],
)
def test_a_device_is_known_by_its_name_or_not_at_all(name, key):
    assert gpu_of_device(name) == (GPUS[key] if key else None)
