"""The workaround that keeps start-up short, and the weights that come back from a saved engine."""

from __future__ import annotations

import copy
import importlib
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from cert_ray.training.deepspeed_engine import Engine, avoid_op_compilation, fp32_weights
from cert_ray.training.presets import preset_config
from cert_ray.training.step import summed_loss

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("process_group"),
    # DeepSpeed 0.19 calls collectives that torch 2.13 renamed.
    pytest.mark.filterwarnings("ignore:`torch.distributed.*deprecated:FutureWarning"),
]


def test_no_operation_is_compiled_when_an_engine_starts():
    """Should this fail, DeepSpeed no longer looks where the workaround tells it to, and compiles for 100 s."""
    avoid_op_compilation()
    assert importlib.import_module("deepspeed.comm.torch").build_shm_op() is None


@pytest.mark.parametrize(("zero_stage", "precision"), [(0, "fp32"), (1, "fp32"), (2, "bf16"), (3, "fp32")])
def test_saved_weights_are_the_engines_own(make_config, tmp_path, zero_stage, precision):
    torch.manual_seed(0)
    shape = preset_config("tiny", 50, 16, 0, 1)
    engine = Engine(AutoModelForCausalLM.from_config(shape), make_config(zero_stage=zero_stage, precision=precision))
    ids = torch.randint(0, 50, (4, 17))
    mask = torch.ones_like(ids, dtype=torch.bool)
    for _ in range(2):
        engine.train_step([(ids, mask)], 1e-2)
    nats, tokens = engine.summed_eval_loss([(ids, mask)])
    engine.save(tmp_path)
    weights = fp32_weights(tmp_path, zero_stage)
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    plain = AutoModelForCausalLM.from_config(shape, dtype=torch.float32 if precision == "fp32" else torch.bfloat16)
    plain.load_state_dict(weights)
    plain.eval()
    with torch.no_grad():
        logits = plain(ids[:, :-1]).logits.float()
    peer = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    assert tokens == 64
    assert nats == float(peer)


@pytest.mark.parametrize("group", ["matrices", "vectors"])
@pytest.mark.parametrize(("zero_stage", "precision"), [(1, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")])
def test_the_norm_tells_of_one_gradient_that_is_not_finite(make_config, zero_stage, precision, group):
    """The loss of such a step is finite: by the norm alone the run ends before its weights are saved."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(preset_config("tiny", 50, 16, 0, 1))
    engine = Engine(model, make_config(zero_stage=zero_stage, precision=precision))
    ids = torch.randint(0, 50, (4, 17))
    batch = (ids, torch.ones_like(ids, dtype=torch.bool))
    assert math.isfinite(engine.train_step([batch], 1e-2)[2])
    name = "transformer.h.0.mlp.c_fc." + ("weight" if group == "matrices" else "bias")
    dict(model.named_parameters())[name].register_hook(lambda gradient: gradient * torch.inf)
    loss, _, norm = engine.train_step([batch], 1e-2)
    assert math.isfinite(loss)
    assert not math.isfinite(norm)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_gradients_are_clipped_to_the_recipes_norm_and_the_norm_before_is_told(make_config, zero_stage):
    """Adam's first moment, from zero, is a tenth of the first gradient: weights hardly tell, they move by its sign."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(preset_config("tiny", 50, 16, 0, 1))
    ids = torch.randint(0, 50, (4, 17))
    batch = (ids, torch.ones_like(ids, dtype=torch.bool))
    told, learned_from = [], []
    for most in (None, 0.25):
        engine = Engine(copy.deepcopy(model), make_config(zero_stage=zero_stage, max_gradient_norm=most))
        told.append(engine.train_step([batch], 1e-3)[2])
        optimizer = engine._engine.optimizer
        moments = [state["exp_avg"] for state in getattr(optimizer, "optimizer", optimizer).state.values()]
        learned_from.append(10 * math.sqrt(sum(float(moment.square().sum()) for moment in moments)))
    assert told[1] == pytest.approx(told[0], rel=1e-5)
    assert told[0] > 1
    assert learned_from == pytest.approx([told[0], 0.25], rel=1e-4)


@pytest.mark.parametrize(
    ("zero_stage", "precision", "most_off"),
    [(0, "fp32", 1e-5), (1, "fp32", 1e-5), (1, "bf16", 0.01), (2, "bf16", 0.01), (3, "bf16", 0.01)],
)
def test_passes_of_different_length_add_up_to_the_gradient_of_the_steps_mean(
    make_config, zero_stage, precision, most_off
):
    """Every token of the step weighs the same. In bf16 the sum is rounded after each pass (docs/training.md)."""
    torch.manual_seed(0)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    model = AutoModelForCausalLM.from_config(preset_config("tiny", 50, 16, 0, 1))
    peer = copy.deepcopy(model).to(dtype).train()
    ids = torch.randint(0, 50, (8, 4, 17))
    masks = [(torch.arange(17) < 3 + 2 * number).expand(4, 17) for number in range(8)]
    batches = list(zip(ids, masks, strict=True))
    tokens = sum(int(mask[:, 1:].sum()) for mask in masks)
    exact = [torch.zeros_like(parameter, dtype=torch.float64) for parameter in peer.parameters()]
    for batch in batches:
        peer.zero_grad()
        (summed_loss(peer, *batch) / tokens).backward()
        for total, parameter in zip(exact, peer.parameters(), strict=True):
            total += parameter.grad.double()
    options = {"zero_stage": zero_stage, "precision": precision, "max_gradient_norm": None}
    engine = Engine(model, make_config(**options, gradient_accumulation=8))
    engine.train_step(batches, 1e-3)
    matrices_first = sorted(exact, key=lambda total: total.ndim <= 1)  # as the optimizer has them
    expected = torch.cat([total.flatten() for total in matrices_first])
    optimizer = engine._engine.optimizer
    states = getattr(optimizer, "optimizer", optimizer).state.values()
    found = 10 * torch.cat([state["exp_avg"].flatten() for state in states]).double()
    assert float((found - expected).norm() / expected.norm()) < most_off
