"""Linear layers laid out once, beside PyTorch's own."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cert_ray.serving.packed_linear import PackedLinear, pack_linear_layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_the_product_is_that_of_the_layer(dtype: torch.dtype, bias: bool) -> None:
    """Fails, too, when PyTorch no longer has the operators, which are not public."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(96, 160, bias=bias).to(dtype)
    for rows in (1, 3, 16, 100):
        given = torch.randn(1, rows, 96).to(dtype)
        with torch.inference_mode():
            torch.testing.assert_close(PackedLinear(layer)(given), layer(given), rtol=1e-2, atol=1e-2)


def test_a_model_with_tied_weights_says_the_same() -> None:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=100, tie_word_embeddings=True)).eval()
    packed = copy.deepcopy(model)
    assert pack_linear_layers(packed)
    assert any(isinstance(module, PackedLinear) for module in packed.modules())
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        torch.testing.assert_close(packed(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
