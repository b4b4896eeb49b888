"""The loss against a count by hand and against transformers' own."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from cert_ray.training.presets import preset_config
from cert_ray.training.step import predicted_tokens, summed_loss


def test_a_model_that_knows_nothing_loses_log_v_per_token():
    def uniform(input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 50))

    ids_BT1 = torch.arange(22).reshape(2, 11)
    mask_BT1 = torch.ones_like(ids_BT1, dtype=torch.bool)
    mask_BT1[1, 4:] = False
    assert predicted_tokens(mask_BT1) == 10 + 3
    assert float(summed_loss(uniform, ids_BT1, mask_BT1)) == pytest.approx(13 * math.log(50))


def test_equals_the_mean_loss_of_transformers():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(preset_config("tiny", 50, 16, 0, 1))
    ids_BT1 = torch.randint(0, 50, (3, 17))
    mask_BT1 = torch.rand(3, 17) < 0.7
    with torch.no_grad():
        # transformers shifts the labels itself, so it is given one position more than it can predict from
        padded = torch.nn.functional.pad(ids_BT1[:, 1:].masked_fill(~mask_BT1[:, 1:], -100), (1, 0), value=-100)
        logits = model(ids_BT1[:, :-1]).logits
        peer = model.loss_function(logits, None, 50, shift_labels=padded[:, 1:].contiguous())
        mine = summed_loss(model, ids_BT1, mask_BT1) / predicted_tokens(mask_BT1)
    assert float(mine) == pytest.approx(float(peer), rel=1e-5)
