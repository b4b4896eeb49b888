"""The scan finds literals exactly, as the tokenizer of the interpreter does."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cert_ray.sketching.literals import COMMENT, STAYS, scan


def found(source: str, *, nested_fstrings: bool = True) -> list[tuple[str, str]]:
    return [(source[start:end], kind) for start, end, kind in scan(source, nested_fstrings=nested_fstrings)]


@pytest.mark.parametrize(
    ("literal", "kind"),
    [
        ("7", "number"),
        ("1_000", "number"),
        ("00", "number"),
        ("1.", "float"),
        (".5", "float"),
        ("1_0.0_1", "float"),
        ("1e-5", "floatexponant"),
        (".5E+3", "floatexponant"),
        ("2.5J", "complex"),
        ("''", "string"),
        (r"'a\'b'", "string"),
        ("'a\\\n b'", "string"),
        ("'a\\\r\n b'", "string"),
        (r'R"\""', "rawstring"),
        ('u"""a"""', "unicodestring"),
        ("B'a'", "binarystring"),
        ("F'''a\n{b}'''", "interstring"),
        ("Rf'{a}'", "interrawstring"),
        ("t'{a}'", "interstring"),
        ("Tr'{a}'", "interrawstring"),
        ("'''a'b''c'''", STAYS),
        ('"""a\\""""', STAYS),
        ('\'"""\'', STAYS),
        ("bR'a'", STAYS),
        ("# 'a' 1", COMMENT),
    ],
)
def test_each_literal_has_its_kind(literal: str, kind: str) -> None:
    assert found(literal) == [(literal, kind)]
    assert found(f"(x,{literal}\n)") == [(literal, kind)]


@pytest.mark.parametrize("literal", ["0xFF", "0o17", "0B1_0", "1e3j"])
def test_numbers_that_the_released_code_leaves_are_not_found(literal: str) -> None:
    assert found(literal) == []


@pytest.mark.parametrize("word", ["x1", "_2", "é3", "a\u03014", "नमस्ते5", "x\u00b76", "define", "defx", "classy", "f"])
def test_digits_and_keywords_inside_words_are_not_found(word: str) -> None:
    assert found(f"{word} = {word}.{word}") == []


@pytest.mark.parametrize("between", [" ", "\t", " \\\n", "\\\r\n  "])
def test_definition_names_are_found(between: str) -> None:
    assert found(f"async def{between}f1(): pass") == [("f1", "func")]
    assert found(f"class{between}É(B): pass") == [("É", "AnClass")]


@pytest.mark.parametrize(
    "literal",
    [
        """f'{a['k']}'""",
        '''f"{f"{f"{1}"}"}"''',
        '''f"{x:{"a" + "b"}}"''',
        """f'{x!r:>{'1'}}'""",
        """f'{ {'a': 1}['a'] }'""",
        """f'{a[1:2]} {(lambda x: 'y')(1)}'""",
        """f'{x != 'a'}'""",
        """f'{{ {'a'} }}'""",
        r"""f'\N{DASH}{'a'}'""",
        r"""f'\'{'a'}'""",
        r"""rf'\{'a'}'""",
        "f'''{\n'a' # }'''\n}'''",
        '''f"""{"""a"""}"" """''',
        """f'{'\\n'.join(a)}'""",
        """t'{a['k']}'""",
        """f'{x:%H:%M}'""",
        """f'{x=}'""",
    ],
)
def test_fields_of_an_fstring_may_hold_its_own_quotes(literal: str) -> None:
    kind = "interrawstring" if literal.startswith("r") else "interstring"
    assert found(f"g({literal}, 'z')") == [(literal, kind), ("'z'", "string")]
    if sys.version_info >= (3, 12) and literal[0] != "t":
        compile(literal, "", "eval")


CODE = st.lists(
    st.sampled_from(
        ["'", '"', "'''", '"""', "{", "}", "{{", "}}", "\\", "\n", "#", "f", "rf", "x", "1", ":", "!r", " ", "("]
    ),
    max_size=30,
).map("".join)


@settings(deadline=None, max_examples=100)
@given(CODE)
def test_any_text_is_scanned_to_sorted_disjoint_spans(source: str) -> None:
    for nested in (False, True):
        at = 0
        for start, end, _ in scan(source, nested_fstrings=nested):
            assert at <= start < end <= len(source)
            at = end
