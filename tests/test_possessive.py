"""Possessive groups mean what CPython's documentation says, also where its `re` has them wrong (before 3.11.5)."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cert_ray.corpus.cleaning import LITERALS
from cert_ray.possessive import _without_possessive_groups, compile_pattern

PACKAGE = Path(__file__).resolve().parents[1] / "cert_ray"
# What `LITERALS` says, without possessive groups.
PLAIN = LITERALS.replace(")*+", ")*")


@pytest.mark.parametrize("compiled", [compile_pattern, _without_possessive_groups])
@pytest.mark.parametrize(
    ("pattern", "text", "end"),
    [
        ("(?:ab?c)*+", "aca", 2),  # the fault's own report: the last `a` is not the group's
        ("(?:ab?c)++", "aca", 2),
        ("(?:ab?c)?+", "a", 0),
        ("(?:ab?c){1,3}+", "aca", 2),
        ("(?:(?!C).)++", "ABC", 2),
        ("(x(?:ab?c)*+)a", "xaca", 4),
        ("(?:ab?c)*+ac", "acac", None),  # nothing is given back
        ("(?:(?:ab?c)*+d)++", "acdaca", 3),
        ("[ab]*+c", "abc", 3),
    ],
)
def test_a_round_that_fails_halfway_leaves_nothing_behind(compiled, pattern: str, text: str, end: int | None) -> None:
    found = compiled(pattern).match(text)
    assert (None if found is None else found.end()) == end


@given(st.lists(st.sampled_from(['"""', '"', "'''", "'", "\\", "#", "\n", "x"]), max_size=20).map("".join))
def test_strings_and_comments_are_those_of_the_greedy_pattern(text: str) -> None:
    """Rounds differ in their first character or cannot be followed by the end, so giving back changes nothing."""
    flags = re.DOTALL | re.VERBOSE
    expected = [match.span() for match in re.compile(PLAIN, flags).finditer(text)]
    for compiled in (compile_pattern(LITERALS, flags), _without_possessive_groups(LITERALS, flags)):
        assert [match.span() for match in compiled.finditer(text)] == expected


def test_no_pattern_with_a_possessive_group_is_compiled_by_re() -> None:
    for path in PACKAGE.rglob("*.py"):
        source = path.read_text()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "re.compile":
                written = ast.get_source_segment(source, node) or ""
                assert not re.search(r"\)(?:[*+?]|\{[0-9,]+\})\+", written), f"{path}: compile_pattern, not {written}"
