"""Drafts: which tokens of a sketch are expected to follow."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cert_ray.serving.drafts import HOLE, Expected, source
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
    assert Expected(SKETCH).following(ids, most) == expected


def test_nothing_is_drafted_without_a_sketch() -> None:
    assert Expected(()).following([], 5) == Expected(()).following([A], 5) == []


@pytest.mark.parametrize("quote", ["'", '"'])
def test_the_tokens_are_those_of_code_with_a_literal_in_each_hole(quote: str) -> None:
    code = f" df[{quote}name{quote}].astype(float).head(1)"
    spans = sketch_spans("x =" + code)
    moved = [Placeholder(start - 3, end - 3, kind) for start, end, kind in spans.placeholders]
    drafts = Expected(source(TOKENIZER, "", spans.text[3:], moved))
    begun = TOKENIZER.encode(f" df[{quote}name", add_special_tokens=False).ids
    assert TOKENIZER.decode(drafts.following(begun, 20)) == f"{quote}].astype(float).head("
    assert TOKENIZER.decode(drafts.following([], 20)) in (" df['", " df[")


def place_behind(drafts: Sequence[int], ids: Sequence[int]) -> int | None:
    for size in range(min(3, len(ids)), 0, -1):
        for place in range(size, len(drafts)):
            if tuple(drafts[place - size : place]) == tuple(ids[-size:]):
                return place
    return None


def following_by_scanning(drafts: Sequence[int], ids: Sequence[int], most: int) -> list[int]:
    """The rule, told by looking through the sketch for each tail."""

    def until_hole(place: int) -> list[int]:
        return list(takewhile(lambda token: token >= 0, drafts[place : place + most]))

    if not ids:
        return until_hole(0)
    for drawn in range(min(6, len(ids) - 1) + 1):  # tokens in a hole
        place = place_behind(drafts, ids[: len(ids) - drawn])
        if place is not None and drawn == 0:
            return until_hole(place)
        if place is not None:
            return until_hole(place + 1) if drafts[place] == HOLE else []
    return until_hole(1) if drafts and drafts[0] == HOLE and len(ids) <= 6 else []


@given(
    st.lists(st.sampled_from([HOLE, -2, A, B, C]), max_size=20).map(tuple),
    st.lists(st.sampled_from([A, B, C, D]), max_size=12).map(tuple),
    st.integers(0, 5),
)
def test_what_is_found_at_once_is_what_looking_through_the_sketch_finds(
    drafts: tuple[int, ...], ids: tuple[int, ...], most: int
) -> None:
    assert Expected(drafts).following(ids, most) == following_by_scanning(drafts, ids, most)
