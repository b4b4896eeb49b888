"""Stop strings and blanks, on text and on tokens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cert_ray.serving.boundaries import (
    PAPER_STOPS,
    FirstTokens,
    StopWatch,
    cut_at,
    drop_start,
    split_trailing_blanks,
)
from cert_ray.sketching import prompt_format
from tests.serving.builders import small_tokenizer

_TOKENIZER = small_tokenizer()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" df.head()\n# more\nclass A: pass", " df.head()"),
        ("    return x\n\n\ndef f(): pass", "    return x\n\n"),
        ("class A", "class A"),
        ("\nclass A", ""),
        ("    if x:\n        print(x)\n", "    if x:\n        print(x)\n"),
        ("", ""),
    ],
)
def test_text_is_cut_at_the_first_of_the_papers_stops(text: str, expected: str) -> None:
    assert cut_at(text, PAPER_STOPS) == expected


@given(st.text(alphabet=" \tab\n"), st.text(alphabet=" \tab\n"))
def test_blanks_move_from_the_prompt_to_the_answer_and_back(prompt: str, answer: str) -> None:
    body, blanks = split_trailing_blanks(prompt)
    assert body + blanks == prompt
    assert not body.endswith((" ", "\t", "\n")) or len(blanks) > 32
    assert drop_start(blanks + answer, blanks) == answer


def test_of_many_blanks_the_last_lines_are_drawn_again() -> None:
    assert split_trailing_blanks("x = 1" + "\n" * 100 + "    ") == ("x = 1" + "\n" * 40, "\n" * 60 + "    ")
    assert split_trailing_blanks("x = 1" + " " * 1000) == ("x = 1" + " " * 936, " " * 64)
    assert split_trailing_blanks("x = 1\r\n\t") == ("x = 1", "\r\n\t")


def test_an_answer_too_short_for_its_blanks_is_empty() -> None:
    assert drop_start("  ", "    ") == ""


@given(st.text(max_size=20), st.text(min_size=1, max_size=4), st.text(max_size=20))
def test_a_stop_string_is_seen_with_the_token_that_completes_it(before: str, stop: str, after: str) -> None:
    ids = prompt_format.encode_code(_TOKENIZER, before + stop + after)
    watch = StopWatch(_TOKENIZER, [stop])
    for end in range(1, len(ids) + 1):
        if watch.seen(ids[:end]):
            break
        assert stop not in _TOKENIZER.decode(ids[:end])
    else:
        pytest.fail("never seen")


@given(st.text(alphabet=" \n", max_size=30), st.text(alphabet="\n #ab", max_size=30))
def test_a_stop_string_is_not_looked_for_where_it_begins_in_the_start(start: str, answer: str) -> None:
    ids = prompt_format.encode_code(_TOKENIZER, start + answer)
    watch = StopWatch(_TOKENIZER, PAPER_STOPS, start)
    assert any(watch.seen(ids[:end]) for end in range(1, len(ids) + 1)) == (cut_at(answer, PAPER_STOPS) != answer)


def test_a_placeholder_does_not_join_the_text_around_it_into_a_stop() -> None:
    number = _TOKENIZER.token_to_id(prompt_format.special_token("number"))
    ids = [*prompt_format.encode_code(_TOKENIZER, "\n"), number, *prompt_format.encode_code(_TOKENIZER, "#")]
    assert not StopWatch(_TOKENIZER, PAPER_STOPS).seen(ids)


@pytest.mark.parametrize("start", ["  ", "\n", "\n    ", "\n\n\t"])
def test_tokens_that_cannot_begin_an_answer_are_refused(start: str) -> None:
    first_tokens = FirstTokens(_TOKENIZER, _TOKENIZER.get_vocab_size())
    refused = first_tokens.refused(start)
    assert refused is not None
    for token, is_refused in enumerate(refused.tolist()):
        text = first_tokens.text_of(token)
        assert is_refused == (not text or not (text.startswith(start) or start.startswith(text)))
