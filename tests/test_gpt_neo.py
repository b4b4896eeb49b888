"""Fused attention against transformers' eager one: logits, gradients, caches, padding, windows, and what is saved."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPTNeoConfig, GPTNeoForCausalLM
from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoSelfAttention

from cert_ray.gpt_neo import FusedSelfAttention, fuse_attention

VOCABULARY, TOKENS = 97, 24
# Of fp32 logits whose deviation is about 1. Sums are in another order; the largest difference seen was 2e-6.
TOLERANCE = 2e-5


def _pair(window: int = 8, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, Any]:
    """An eager GPT-Neo of two global and two local layers, and the same fused. Large weights: sharp attention."""
    torch.manual_seed(1)
    shape = GPTNeoConfig(
        vocab_size=VOCABULARY, max_position_embeddings=32, hidden_size=48, num_layers=4, num_heads=4,
        attention_types=[[["global", "local"], 2]], window_size=window, initializer_range=0.15,
        bos_token_id=0, eos_token_id=0, pad_token_id=1, **options,
    )  # fmt: skip
    eager = GPTNeoForCausalLM(shape).to(dtype).eval()
    return eager, fuse_attention(copy.deepcopy(eager))


def _ids(rows: int = 3) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (rows, TOKENS), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("window", [1, 8, TOKENS, TOKENS + 1])
def test_logits_and_gradients_are_the_eager_ones(window):
    eager, fused = _pair(window)
    ids = _ids()
    losses = []
    for model in (eager, fused):
        output = model(ids, labels=ids)
        output.loss.backward()
        losses.append(output.logits.detach())
    torch.testing.assert_close(losses[1], losses[0], atol=TOLERANCE, rtol=0)
    gradients = dict(eager.named_parameters())
    for name, parameter in fused.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name].grad, atol=TOLERANCE, rtol=0, msg=name)


def test_a_window_changes_the_logits():
    """So the comparison above can fail."""
    narrow, wide = _pair(window=8)[1], _pair(window=TOKENS)[1]
    with torch.no_grad():
        assert (narrow(_ids()).logits - wide(_ids()).logits).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_for_the_tokens_beside_it(side):
    eager, fused = _pair()
    ids, mask = _ids(), torch.ones(3, TOKENS, dtype=torch.long)
    mask[1, :5], mask[2, :20] = 0, 0
    if side == "right":
        mask = mask.flip(1)
    logits = []
    for model in (eager, fused):
        output = model(ids, attention_mask=mask).logits
        output[mask.bool()].square().sum().backward()
        logits.append(output[mask.bool()].detach())
    torch.testing.assert_close(logits[1], logits[0], atol=TOLERANCE, rtol=0)
    for name, parameter in fused.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("window", [4, 8, 32])
@pytest.mark.parametrize("chunk", [1, 3])
@torch.no_grad()
def test_cached_decoding_gives_the_logits_of_one_pass(window, chunk):
    eager, fused = _pair(window)
    ids = _ids()
    whole = eager(ids, use_cache=False).logits
    first = fused(ids[:, :6], use_cache=True)
    found, cache = [first.logits], first.past_key_values
    found += [
        fused(ids[:, start : start + chunk], past_key_values=cache, use_cache=True).logits
        for start in range(6, TOKENS, chunk)
    ]
    torch.testing.assert_close(torch.cat(found, dim=1), whole, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("padded", [False, True])
def test_greedy_generation_is_the_eager_one(padded):
    eager, fused = _pair()
    ids, mask = _ids()[:, :6], torch.ones(3, 6, dtype=torch.long)
    if padded:
        mask[0, :3] = 0
    options = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    assert torch.equal(fused.generate(ids, **options), eager.generate(ids, **options))


@torch.no_grad()
def test_bf16_is_as_near_to_fp32_as_the_eager_path_with_its_casts():
    exact = _pair()[0](_ids()).logits
    eager, fused = _pair(dtype=torch.bfloat16)
    errors = [(model(_ids()).logits.float() - exact).square().mean().sqrt().item() for model in (eager, fused)]
    assert 0 < errors[1] < 1.1 * errors[0]


def test_dropout_drops_while_training_only():
    _, fused = _pair(attention_dropout=0.5)
    with torch.no_grad():
        assert torch.equal(fused(_ids()).logits, fused(_ids()).logits)
        fused.train()
        assert not torch.equal(fused(_ids()).logits, fused(_ids()).logits)


def test_what_is_saved_is_a_plain_gpt_neo(tmp_path):
    eager, fused = _pair()
    assert any(type(module) is FusedSelfAttention for module in fused.modules())
    for name, model in (("eager", eager), ("fused", fused)):
        model.save_pretrained(tmp_path / name)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("eager", "fused")]
    assert configs[0] == configs[1]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("eager", "fused")]
    assert weights[0] == weights[1]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "fused")
    assert {type(block.attn.attention) for block in loaded.transformer.h} == {GPTNeoSelfAttention}


def test_other_architectures_come_back_as_they_are():
    model = torch.nn.Linear(2, 2)
    assert fuse_attention(model) is model
