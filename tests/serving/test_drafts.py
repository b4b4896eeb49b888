"""Drafts: which tokens of a sketch are expected to follow."""

from __future__ import annotations

import pytest

from cert_ray.serving.drafts import HOLE, following, source
from cert_ray.sketching import Placeholder, sketch_spans
from tests.serving.builders import small_tokenizer

TOKENIZER = small_tokenizer()
A, B, C, D, E, X, Y = range(10, 17)
SKETCH = (A, B, HOLE, C, B, D, E)


@pytest.mark.parametrize(
    ("ids", "most", "expected"),
    [
        ([], 9, [A, B]),
        ([A], 9, [B]),
        ([A, B], 9, []),  # a hole is not guessed
        ([A, B, X], 9, [C, B, D, E]),  # but that it ends
        ([A, B, X, Y], 9, [C, B, D, E]),
        ([A, B, X, C], 9, [B, D, E]),
        ([A, B, X, C], 2, [B, D]),
        ([C, B], 9, [D, E]),  # two tokens decide
        ([X, D], 9, [E]),  # whatever was drawn before
        ([A, X], 9, []),  # off the sketch, and not in a hole
        ([X], 9, []),
        ([D, E], 9, []),
        ([A], 0, []),
    ],
)
def test_what_follows_the_last_tokens_is_drafted(ids: list[int], most: int, expected: list[int]) -> None:
    assert following(SKETCH, ids, most) == expected


def test_nothing_is_drafted_without_a_sketch() -> None:
    assert following((), [], 5) == following((), [A], 5) == []


@pytest.mark.parametrize("quote", ["'", '"'])
def test_the_tokens_are_those_of_code_with_a_literal_in_each_hole(quote: str) -> None:
    code = f" df[{quote}name{quote}].astype(float).head(1)"
    spans = sketch_spans("x =" + code)
    moved = [Placeholder(start - 3, end - 3, kind) for start, end, kind in spans.placeholders]
    drafts = source(TOKENIZER, "", spans.text[3:], moved)
    begun = TOKENIZER.encode(f" df[{quote}name", add_special_tokens=False).ids
    assert TOKENIZER.decode(following(drafts, begun, 20)) == f"{quote}].astype(float).head("
    assert TOKENIZER.decode(following(drafts, [], 20)) in (" df['", " df[")
