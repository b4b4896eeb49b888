"""Memory and work of a run: against hand sums, against real tensors, and against the engine's own state."""

from __future__ import annotations

import dataclasses
import gc

import pytest
import torch
from transformers import AutoModelForCausalLM

from cert_ray.errors import ConfigError
from cert_ray.gpt_neo import fuse_attention
from cert_ray.training import memory
from cert_ray.training.config import TrainConfig
from cert_ray.training.deepspeed_engine import Engine, engine_options
from cert_ray.training.presets import preset_config

BASE = {"base": "modern-110m", "tokens": "tokens", "output": "model", "steps": 2_000, "precision": "bf16"}


def _config(**options):
    return TrainConfig.from_mapping(BASE | options, "test")


@pytest.fixture(scope="module")
def size() -> memory.ModelSize:
    return memory.measure(preset_config("modern-110m", 32_000, 1_024, 0, 1), "bf16", 1_024)


@pytest.mark.parametrize("name", ["tiny", "modern-tiny"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_are_those_of_a_real_forward_pass(name, precision):
    shape = preset_config(name, 500, 64, 0, 1)
    model = AutoModelForCausalLM.from_config(shape, dtype=torch.float32 if precision == "fp32" else torch.bfloat16)
    with memory.saved_bytes(fuse_attention(model).train()) as real:
        model(input_ids=torch.zeros(1, 64, dtype=torch.long), use_cache=False)
    found = memory.measure(model.config, precision, 64)
    assert real.total <= found.activation_bytes <= 1.03 * real.total
    assert len(real.by_layer) == 4
    assert 0 < found.checkpointed_bytes < 0.5 * found.activation_bytes


def test_checkpointing_keeps_what_the_estimate_says():
    """Layer inputs and what stands outside the layers; one layer at a time comes on top in the backward pass."""
    shape = preset_config("modern-tiny", 500, 64, 0, 1)
    model = AutoModelForCausalLM.from_config(shape, dtype=torch.float32).train()
    with memory.saved_bytes(model) as plain:
        model(input_ids=torch.zeros(1, 64, dtype=torch.long), use_cache=False)
    found = memory.measure(shape, "fp32", 64)
    outside = plain.total - sum(plain.by_layer)
    assert found.checkpointed_bytes == pytest.approx(outside + 4 * (64 * 192 * 4) + max(plain.by_layer), rel=0.03)


def test_work_is_six_times_the_weights_and_the_attention_by_hand(size):
    """12 layers of 4 x 768^2 and 3 x 768 x 2,048, and the output's 32,000 x 768; attention 12 x 12 x 768 x 1,024."""
    matrices = 12 * (4 * 768**2 + 3 * 768 * 2_048) + 32_000 * 768
    assert size.flops_per_token == 6 * matrices + 12 * 12 * 768 * 1_024
    found = memory.estimate(size, _config(workers=2))
    assert found.tokens_per_step == 2 * 10 * 4 * 1_024
    assert found.flops_per_step == found.tokens_per_step * size.flops_per_token
    seconds = memory.step_seconds(found, _config(workers=2), memory.GPUS["a100"], 0.4)
    assert seconds == pytest.approx(found.flops_per_step / (2 * 312e12 * 0.4))
    again = memory.step_seconds(found, _config(workers=2, activation_checkpointing=True), memory.GPUS["a100"], 0.4)
    assert again == pytest.approx(seconds * 4 / 3)


@pytest.mark.parametrize(
    ("stage", "bytes_per_parameter"),
    [(1, 2 + 2 + 12 / 4), (2, 2 + 2 / 4 + 12 / 4), (3, 2 + 2 / 4 + 2 / 4 + 12 / 4)],
)
def test_state_is_that_of_the_zero_paper_and_what_stage_3_gathers(size, stage, bytes_per_parameter):
    found = memory.estimate(size, _config(workers=4, zero_stage=stage))
    state = found.weights + found.gradients + found.optimizer
    assert state == pytest.approx(bytes_per_parameter * size.parameters)


def test_a_worker_has_room_while_nodes_are_away(size):
    """The same memory as of a run of so few, in the time of all."""
    few, elastic = _config(workers=2, zero_stage=2), _config(workers=8, min_workers=2, zero_stage=2)
    assert memory.estimate(size, elastic).total == memory.estimate(size, few).total
    assert memory.estimate(size, elastic).tokens_per_step == 4 * memory.estimate(size, few).tokens_per_step
    assert "8 workers (memory: with 2); 10 x 1,024" in memory.render("base", size, elastic, "h100")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.distributed.*deprecated:FutureWarning")
@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "fp32"), (1, "bf16"), (2, "bf16")])
def test_the_engine_holds_the_weights_and_the_optimizer_that_are_estimated(
    process_group, make_config, stage, precision
):
    """After a step, when gradients and activations are gone; 2% is left for norms' steps and the like."""
    config = make_config(zero_stage=stage, precision=precision, gradient_accumulation=1)
    shape = preset_config("tiny", 500, 32, 0, 1)
    before = _tensor_bytes()
    engine = Engine(AutoModelForCausalLM.from_config(shape, dtype=torch.float32), config)
    engine.train_step([(torch.ones(4, 33, dtype=torch.long), torch.ones(4, 33, dtype=torch.bool))], 1e-3)
    held = _tensor_bytes(before)
    found = memory.estimate(memory.measure(shape, precision, 32), config)
    assert held == pytest.approx(found.weights + found.optimizer, rel=0.02)


def test_the_bucket_is_as_large_as_the_engine_makes_it(size):
    for parameters in (1_000, 7_000_000_000):
        large = dataclasses.replace(size, parameters=parameters)
        options = engine_options(_config(), parameters, 1)
        in_bf16 = 2 * options["zero_optimization"]["reduce_bucket_size"]
        assert memory.estimate(large, _config()).buffers == in_bf16


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.distributed.*deprecated:FutureWarning")
def test_zero_3_holds_its_part_of_the_weights_and_all_that_a_forward_pass_gathered(process_group, make_config):
    """From the second pass on: in the first, DeepSpeed does not know yet what a backward pass reads again."""
    config = make_config(zero_stage=3, precision="bf16", gradient_accumulation=1)
    shape = preset_config("tiny", 500, 32, 0, 1)
    engine = Engine(AutoModelForCausalLM.from_config(shape, dtype=torch.float32), config)
    weights = list(engine._engine.module.parameters())
    held = []

    def add_up(*_):
        held.append(sum(weight.nbytes + weight.ds_tensor.nbytes for weight in weights))

    engine._engine.module.register_forward_hook(add_up)
    batch = (torch.ones(4, 33, dtype=torch.long), torch.ones(4, 33, dtype=torch.bool))
    for _ in range(2):
        engine.train_step([batch], 1e-3)
    assert held[1] == memory.estimate(memory.measure(shape, "bf16", 32), config).weights


def _tensor_bytes(before: frozenset[int] | None = None):
    """Storages of at least a kilobyte that are alive: their ids, or the bytes of those not in `before`."""
    gc.collect()
    storages = {
        found.untyped_storage()._cdata: found.untyped_storage().nbytes()
        for found in gc.get_objects()
        if type(found) in (torch.Tensor, torch.nn.Parameter)
        and found.device.type == "cpu"
        and found.layout == torch.strided  # weights laid out for oneDNN, of other tests, have no storage to ask
    }
    found = {key: count for key, count in storages.items() if count >= 1_000}
    return frozenset(found) if before is None else sum(count for key, count in found.items() if key not in before)


def test_advice_makes_it_fit_and_reads_the_same_rows(size):
    config = _config(micro_batch=40, gradient_accumulation=1)
    total = memory.estimate(size, config).total
    assert "By this estimate it fits" in memory.advice(size, config, total)
    assert memory.advice(size, config, 0.6 * total) == "Set micro_batch: 20, gradient_accumulation: 2."
    one = memory.estimate(size, _config(micro_batch=1)).total
    assert "activation_checkpointing: true" in memory.advice(size, config, one - 1e6)
    assert "zero_stage to 2" in memory.advice(size, _config(workers=8), 3.1e9)
    seven_billion = dataclasses.replace(size, parameters=7_000_000_000)
    assert "zero_stage to 3" in memory.advice(seven_billion, _config(workers=8), 25e9)
    assert "No setting makes it fit" in memory.advice(size, config, 1e9)


def test_a_shortage_is_told_with_its_numbers(size):
    config = _config(micro_batch=40, gradient_accumulation=1)
    text = memory.explain_shortage(size, config, 24e9)
    found = memory.estimate(size, config)
    assert f"estimated {found.total / 1e9:.1f} GB per worker" in text
    assert "there are 24.0 GB. Set micro_batch: " in text


def test_an_unknown_gpu_is_refused():
    with pytest.raises(ConfigError, match="--gpu k80: unknown; known are a100"):
        memory.gpu_named("k80")


@pytest.mark.parametrize(
    ("name", "vocabulary", "rows", "measured_gb"),
    [("modern-110m", 32_000, 32, 14.13), ("modern-110m", 32_000, 64, 26.2), ("pycodegpt-110m", 32_000, 32, 14.25)],
)
def test_compiled_peaks_are_those_of_an_h100(name, vocabulary, rows, measured_gb):
    """Most that was allocated, bf16, ZeRO 1, rows of 1,024 (docs/training.md); the shares were fitted to these."""
    size = memory.measure(preset_config(name, vocabulary, 1_024, 0, 1), "bf16", 1_024)
    found = memory.estimate(size, _config(micro_batch=rows, compile=True, use_gpu=True))
    assert measured_gb < (found.total - memory._RESERVED_BYTES) / 1e9 < 1.2 * measured_gb
