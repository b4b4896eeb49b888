"""New tokens start as the words they stand for, in every table once, and leave what the base knows as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, CodeGenConfig, LlamaConfig

from cert_ray.sketching.prompt_format import SPECIAL_TOKENS, add_special_tokens
from cert_ray.tokens.vocabulary import adopt_tokenizer, load_tokenizer
from cert_ray.training import warm_start
from tests.serving.builders import small_tokenizer


def plain_tokenizer():
    """The serving tests' tokenizer with the words `number` and `func`, without the project's special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(["number func " * 20], trainer)
    return tokenizer


def model(rows: int, tied: bool):
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return AutoModelForCausalLM.from_config(
        LlamaConfig(**shape, vocab_size=rows, max_position_embeddings=32, tie_word_embeddings=tied)
    )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("padding", [0, 40])
def test_placeholders_start_as_their_words(tied: bool, padding: int) -> None:
    tokenizer = plain_tokenizer()
    known = tokenizer.get_vocab_size()
    made = model(known + padding, tied)
    before = made.get_input_embeddings().weight.detach().clone()
    add_special_tokens(tokenizer)
    total = tokenizer.get_vocab_size()
    warm_start.add_tokens(made, range(known, total), tokenizer)
    tables = [made.get_input_embeddings().weight, made.get_output_embeddings().weight]
    assert (tables[0] is tables[1]) == tied
    for weight in tables:
        mean = weight[:known].mean(dim=0)
        for word in ("number", "func", "string"):  # `string` has several tokens here
            ids = tokenizer.encode(word, add_special_tokens=False).ids
            found = weight[tokenizer.token_to_id(f"<|{word}|>")]
            torch.testing.assert_close(found, weight[ids].mean(dim=0))
        torch.testing.assert_close(weight[tokenizer.token_to_id("<|pad|>")], mean)
        torch.testing.assert_close(weight[total:], mean.expand(len(weight) - total, -1))
        assert len(weight) % warm_start.ROWS_MULTIPLE == 0 or len(weight) == known + padding
    torch.testing.assert_close(tables[0][:known], before[:known])
    assert made.config.vocab_size == len(tables[0]) >= total


@pytest.mark.parametrize("padding", [0, 40])
def test_a_heads_bias_starts_as_the_words_too(padding: int) -> None:
    """Pre-training lowers the bias of rows that no token has: kept, it would bar the new tokens."""
    tokenizer = plain_tokenizer()
    known = tokenizer.get_vocab_size()
    shape = CodeGenConfig(
        vocab_size=known + padding, n_positions=64, n_ctx=64, n_embd=32, n_layer=1, n_head=4, rotary_dim=4,
        tie_word_embeddings=False,
    )  # fmt: skip
    made = AutoModelForCausalLM.from_config(shape)
    before = torch.randn(known, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        made.lm_head.bias[:known], made.lm_head.bias[known:] = before, -12.0
    add_special_tokens(tokenizer)
    total = tokenizer.get_vocab_size()
    warm_start.add_tokens(made, range(known, total), tokenizer)
    bias = made.lm_head.bias
    assert torch.equal(bias[:known], before)
    for word in ("number", "string"):
        ids = tokenizer.encode(word, add_special_tokens=False).ids
        torch.testing.assert_close(bias[tokenizer.token_to_id(f"<|{word}|>")], before[ids].mean())
    torch.testing.assert_close(bias[tokenizer.token_to_id("<|pad|>")], before.mean())
    torch.testing.assert_close(bias[total:], before.mean().expand(len(bias) - total))


def test_nothing_is_touched_when_no_token_is_new() -> None:
    tokenizer = small_tokenizer()
    made = model(tokenizer.get_vocab_size(), tied=True)
    before = made.get_input_embeddings().weight.detach().clone()
    size = tokenizer.get_vocab_size()
    warm_start.add_tokens(made, range(size, size), tokenizer)
    assert torch.equal(made.get_input_embeddings().weight, before)


def test_the_adopted_tokenizer_extends_the_bases(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    plain_tokenizer().save(str(tmp_path / "base" / "tokenizer.json"))
    adopt_tokenizer(str(tmp_path / "base"), str(tmp_path / "run"), 32)
    adopted = load_tokenizer(str(tmp_path / "run")).get_vocab()
    assert all(adopted[token] == number for token, number in plain_tokenizer().get_vocab().items())
    assert set(SPECIAL_TOKENS) <= set(adopted)


def codegen(folder: Path) -> str:
    """A CodeGen-mono in small: its blocks, rotary dimension and untied, biased head, as transformers has them."""
    tokenizer = plain_tokenizer()
    torch.manual_seed(0)
    shape = CodeGenConfig(
        vocab_size=tokenizer.get_vocab_size() + 10,  # CodeGen's table has rows beyond its tokenizer
        n_positions=64, n_ctx=64, n_embd=32, n_layer=2, n_head=4, rotary_dim=4,
        bos_token_id=0, eos_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(shape).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder)
