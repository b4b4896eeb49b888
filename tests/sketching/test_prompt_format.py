"""Special tokens are reached through spans only, and text comes back as it went in."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from cert_ray.sketching import PLACEHOLDER_KINDS, Placeholder, sketch_spans
from cert_ray.sketching.prompt_format import (
    END_OF_TEXT,
    PAD,
    RELEASED_SEPARATOR,
    SEPARATOR,
    SPECIAL_TOKENS,
    add_special_tokens,
    code_prompt,
    decode_code,
    decode_sketch,
    encode_code,
    encode_code_batch,
    encode_context_first_batch,
    encode_pair,
    encode_pair_batch,
    encode_sketch,
    encode_sketch_batch,
    has_placeholder,
    released_has_placeholder,
    released_pair,
    separator_id,
    sketch_prompt,
    special_token,
)

SOURCE = "# <|number|> string <|endoftext|>\nnumber = f('é' 'b')or 1if number else'\N{SNAKE}'\n\tx = string(<|pad|>)\n"
SPANS = [Placeholder(5, 11, "string"), Placeholder(13, 19, "number")]


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([SOURCE] * 3, trainer)
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    tokenizer = byte_level()
    add_special_tokens(tokenizer)
    return tokenizer


def test_the_special_tokens_start_with_the_three_and_cover_every_kind() -> None:
    assert SPECIAL_TOKENS[:3] == (END_OF_TEXT, PAD, SEPARATOR)
    assert SPECIAL_TOKENS[3:] == tuple(special_token(kind) for kind in PLACEHOLDER_KINDS)


def test_only_missing_special_tokens_are_added() -> None:
    tokenizer = byte_level()
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True)])
    size = tokenizer.get_vocab_size()
    assert add_special_tokens(tokenizer) == len(SPECIAL_TOKENS) - 1
    assert tokenizer.token_to_id(END_OF_TEXT) == size - 1
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS[1:]] == list(
        range(size, tokenizer.get_vocab_size())
    )
    assert add_special_tokens(tokenizer) == 0


def test_code_never_holds_a_special_token_and_comes_back(tokenizer: Tokenizer) -> None:
    ids = encode_code(tokenizer, SOURCE)
    assert not {tokenizer.token_to_id(token) for token in SPECIAL_TOKENS} & set(ids)
    assert not has_placeholder(tokenizer, ids)
    assert decode_code(tokenizer, ids) == SOURCE
    assert decode_sketch(tokenizer, ids).text == SOURCE
    assert decode_sketch(tokenizer, ids).placeholders == ()


def test_each_placeholder_is_one_special_token_and_comes_back_with_its_span(tokenizer: Tokenizer) -> None:
    ids = encode_sketch(tokenizer, "x = [string, number, string, <|number|>]", SPANS)
    special = [i for i in ids if i in {tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}]
    assert special == [tokenizer.token_to_id("<|string|>"), tokenizer.token_to_id("<|number|>")]
    assert has_placeholder(tokenizer, ids)
    decoded = decode_sketch(tokenizer, ids)
    assert decoded.text == "x = [string, number, string, <|number|>]"
    assert decoded.placeholders == tuple(SPANS)


def test_a_sketch_of_source_that_spells_special_tokens_comes_back(tokenizer: Tokenizer) -> None:
    sketched = sketch_spans(SOURCE.replace("\tx", "x").replace("<|pad|>", "'<|pad|>'"))
    decoded = decode_sketch(tokenizer, encode_sketch(tokenizer, sketched.text, sketched.placeholders))
    assert (decoded.text, decoded.placeholders) == (sketched.text, sketched.placeholders)


def test_a_pair_is_sketch_separator_code(tokenizer: Tokenizer) -> None:
    ids = encode_pair(tokenizer, "x = [string, number]", SPANS, SOURCE)
    at = ids.index(tokenizer.token_to_id(SEPARATOR))
    assert ids.count(tokenizer.token_to_id(SEPARATOR)) == 1
    assert decode_sketch(tokenizer, ids[:at]).text == "x = [string, number]\n"
    assert decode_sketch(tokenizer, ids[:at]).placeholders == tuple(SPANS)
    assert decode_code(tokenizer, ids[at + 1 :]) == "\n" + SOURCE


def test_batches_give_what_single_calls_give(tokenizer: Tokenizer) -> None:
    sketches = [("x = [string, number]", SPANS), ("", []), ("x = 1\n", [])]
    codes = [SOURCE, "", "x"]
    assert list(encode_code_batch(tokenizer, codes)) == [encode_code(tokenizer, code) for code in codes]
    assert list(encode_sketch_batch(tokenizer, sketches)) == [encode_sketch(tokenizer, *one) for one in sketches]
    pairs = [(*one, SOURCE) for one in sketches]
    assert list(encode_pair_batch(tokenizer, pairs)) == [encode_pair(tokenizer, *one) for one in pairs]
    for encode in (encode_code_batch, encode_sketch_batch, encode_pair_batch):
        assert list(encode(tokenizer, [])) == []


def test_of_a_batch_the_ids_of_one_text_at_a_time_are_python_integers(tokenizer: Tokenizer) -> None:
    made = [encode_code_batch(tokenizer, [SOURCE]), encode_pair_batch(tokenizer, [("x = 1\n", [], SOURCE)])]
    assert all(isinstance(one, Iterator) for one in made)


def test_the_tokenizer_itself_is_neither_changed_nor_trusted_with_its_settings() -> None:
    tokenizer = byte_level()
    add_special_tokens(tokenizer)
    expected = encode_pair(tokenizer, "x = [string, number]", SPANS, SOURCE)
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=5000)
    before = tokenizer.to_str()
    assert encode_pair(tokenizer, "x = [string, number]", SPANS, SOURCE) == expected
    assert tokenizer.to_str() == before
    assert not tokenizer.encode_special_tokens
    assert tokenizer.encode(special_token("number")).ids[0] == tokenizer.token_to_id("<|number|>")


def test_tokens_added_after_the_first_use_are_seen() -> None:
    tokenizer = byte_level()
    add_special_tokens(tokenizer)
    assert encode_code(tokenizer, "        ") != [tokenizer.get_vocab_size()]
    tokenizer.add_tokens([AddedToken("        ", normalized=False)])
    assert encode_code(tokenizer, "        ") == [tokenizer.get_vocab_size() - 1]


def test_other_special_tokens_of_a_base_model_are_ordinary_text_too() -> None:
    tokenizer = byte_level()
    tokenizer.add_special_tokens([AddedToken("<|fim_middle|>", special=True)])
    add_special_tokens(tokenizer)
    ids = encode_code(tokenizer, "x = '<|fim_middle|>'")
    assert tokenizer.token_to_id("<|fim_middle|>") not in ids
    assert decode_code(tokenizer, ids) == "x = '<|fim_middle|>'"
    assert decode_sketch(tokenizer, [*ids, tokenizer.token_to_id("<|fim_middle|>")]).text == "x = '<|fim_middle|>'"


def test_end_padding_and_separator_are_left_out_of_what_is_read(tokenizer: Tokenizer) -> None:
    ids = encode_sketch(tokenizer, "x = [string, number]", SPANS)
    tail = [tokenizer.token_to_id(token) for token in (SEPARATOR, END_OF_TEXT, PAD, PAD)]
    assert decode_sketch(tokenizer, [*ids, *tail]).text == "x = [string, number]"
    assert decode_code(tokenizer, [*encode_code(tokenizer, "x"), *tail]) == "x"


def test_half_a_character_is_replaced_not_an_error(tokenizer: Tokenizer) -> None:
    first_byte = tokenizer.token_to_id(pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("é")[0][0][0])
    number = tokenizer.token_to_id("<|number|>")
    decoded = decode_sketch(tokenizer, [first_byte, number])
    assert decoded.text == "\ufffdnumber"
    assert decoded.placeholders == ((1, 7, "number"),)


ANY = byte_level()  # a fixture would be made anew for each example
add_special_tokens(ANY)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.one_of(st.sampled_from(PLACEHOLDER_KINDS), st.text(max_size=8), st.sampled_from(SPECIAL_TOKENS))))
def test_any_text_with_any_spans_comes_back(parts: list[str]) -> None:
    text, spans = "", []
    for part in parts:
        if part in PLACEHOLDER_KINDS and len(text) % 2:
            spans.append(Placeholder(len(text), len(text) + len(part), part))
        text += part
    decoded = decode_sketch(ANY, encode_sketch(ANY, text, spans))
    assert (decoded.text, decoded.placeholders) == (text, tuple(spans))


def test_the_released_format_is_plain_text_that_misroutes() -> None:
    assert released_pair("x = number", "x = 1") == f"x = number\n{RELEASED_SEPARATOR}\nx = 1"
    assert released_has_placeholder("df.astype(float)")
    assert not released_has_placeholder("df.head()")


def test_with_the_context_first_each_stages_prompt_begins_the_training_text(tokenizer: Tokenizer) -> None:
    sketch, code = "x = number + string", "x = 1 + 'a'"
    (ids,) = encode_context_first_batch(tokenizer, [(SOURCE, sketch, [Placeholder(4, 10, "number")], code)])
    context = encode_code(tokenizer, SOURCE)
    first = sketch_prompt(tokenizer, context)
    second = code_prompt(tokenizer, context, sketch, [Placeholder(4, 10, "number")])
    assert second[: len(first)] == first
    assert ids == second + encode_code(tokenizer, code)
    assert tokenizer.decode(second[len(context) :], skip_special_tokens=False) == (
        f"{SEPARATOR}x = <|number|> + string{SEPARATOR}"
    )
    assert ids.count(separator_id(tokenizer)) == 2
