"""One parse tells what every later stage needs; what the interpreter refuses is a drop with its reason."""

from __future__ import annotations

import ast
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cert_ray.python_source import FunctionFacts, LineIndex, SourceFacts, byte_offsets, parse, read_source
from cert_ray.schemas import Dropped, DropReason


def read(source: str) -> SourceFacts:
    facts = read_source(source)
    assert isinstance(facts, SourceFacts), facts
    return facts


def blocks(source: str) -> list[tuple[str, str]]:
    return [(source[block.start : block.end], block.kind.value) for block in read(source).statements]


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("print 'x'\n", DropReason.NOT_PYTHON_3),
        ("x = 1\0\n", DropReason.NOT_PYTHON_3),
        ("x = '\ud800'\n", DropReason.NOT_PYTHON_3),
        ("x = " + "9" * 5000, DropReason.NOT_PYTHON_3),
        ("(" * 10_000 + ")" * 10_000, DropReason.TOO_DEEPLY_NESTED),
        ("-" * 100_000 + "1", DropReason.TOO_DEEPLY_NESTED),
        ("".join(" " * depth + "if x:\n" for depth in range(200)), DropReason.TOO_DEEPLY_NESTED),
    ],
)
def test_what_the_interpreter_refuses_is_dropped_with_its_reason(source: str, reason: DropReason) -> None:
    for outcome in (parse(source), read_source(source)):
        assert isinstance(outcome, Dropped)
        assert outcome.reason is reason
        assert outcome.detail


def test_a_warning_of_the_parser_drops_nothing_under_warnings_as_errors() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(parse(r"x = '\d'; y = 1if x is 'a' else 2"), ast.Module)


def test_deep_trees_are_read_without_recursion() -> None:
    chain = "if x:\n    pass\n" + "elif y:\n    pass\n" * 900
    assert len(read(chain).statements) == 1
    assert read("x = " + "+".join(["1"] * 900) + "\n").statements


def test_empty_and_comment_only_sources_have_no_blocks() -> None:
    assert read("") == SourceFacts((), (), ())
    assert read("# nothing here\n\n").statements == ()


def test_blocks_split_at_blank_lines_between_top_level_statements_only() -> None:
    source = "import os\nimport sys\n\nx = 1\ny = (\n\n    2)\n\n\ndef f():\n\n    return 1\nz = 3\n"
    assert blocks(source) == [
        ("import os\nimport sys", "import"),
        ("x = 1\ny = (\n\n    2)", "code"),
        ("def f():\n\n    return 1\nz = 3", "code"),
    ]


def test_free_comments_belong_to_the_following_block_and_at_the_end_to_the_last() -> None:
    source = (
        "#!/bin/python\n\n# licence\n\nimport os\n# right below\n\n"
        "# free\n\n# above\n@dec\ndef f(): pass\n    # tail\n\n# end\n\n"
    )
    assert blocks(source) == [
        ("#!/bin/python\n\n# licence\n\nimport os\n# right below", "import"),
        ("# free\n\n# above\n@dec\ndef f(): pass\n    # tail\n\n# end", "code"),
    ]


def test_a_block_that_mentions_dunder_name_is_main_whatever_else_it_holds() -> None:
    source = "import logging\nlog = logging.getLogger(__name__)\n\nif __name__ == '__main__':\n    main()\n"
    assert [kind for _, kind in blocks(source)] == ["main", "main"]


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_blocks_do_not_depend_on_line_ends(line_end: str) -> None:
    source = "# é\nimport os\n\n\nx = 'ü'; y = 1 \\\n    + 2\n\f\nclass A:\n    '''a\n\n    b'''\n"
    expected = [
        ("# é\nimport os", "import"),
        ("x = 'ü'; y = 1 \\\n    + 2", "code"),
        ("class A:\n    '''a\n\n    b'''", "code"),
    ]
    assert blocks(source.replace("\n", line_end)) == [(text.replace("\n", line_end), kind) for text, kind in expected]


def test_a_unicode_line_separator_is_no_line_end() -> None:
    assert blocks("x = '\u2028'\n\ny = 1\x0c\n") == [("x = '\u2028'", "code"), ("y = 1\x0c", "code")]


def test_imports_are_top_level_packages_of_absolute_imports_anywhere() -> None:
    source = (
        "import numpy as np, os.path\nfrom pandas.core import frame\nfrom . import sibling\nfrom .numba import x\n"
        "try:\n    import torch\nexcept ImportError:\n    torch = None\n"
        "def f():\n    with y:\n        for z in y:\n            import scipy.sparse\n"
    )
    assert read(source).imports == ("numpy", "os", "pandas", "scipy", "torch")


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("pass", "empty"),
        ("...", "empty"),
        ("'''Only words.'''", "empty"),
        ("'''Words.'''\n    pass", "empty"),
        ("return 1", "plain"),
        ("raise NotImplementedError", "plain"),
        ("'''Words.'''\n    return 1", "docstring"),
        ("'''Words.\n\n    >>> f()\n    '''\n    return 1", "docstring_with_example"),
        ("'''Words.\n\n    Examples\n    --------\n    '''\n    return 1", "docstring_with_example"),
        ("'''For example this.'''\n    return 1", "docstring"),
    ],
)
def test_bodies_of_functions_are_told_apart(body: str, expected: str) -> None:
    assert read(f"def f():\n    {body}\n").functions == (FunctionFacts("f", expected, False),)  # type: ignore[arg-type]


def test_only_assert_methods_of_self_count_as_unittest_asserts() -> None:
    source = (
        "class T:\n"
        "    def test_a(self):\n        self.assertEqual(1, 2)\n"
        "    async def test_b(self):\n        with self . assertRaises(E):\n            pass\n"
        "    def test_c(self):\n        assert self.x\n        np.testing.assert_equal(1, 1)\n"
        "    def test_d(self):\n        def inner():\n            self.assertTrue(1)\n        inner()\n"
        "    def test_e(self):\n        return 'self.assertTrue(1)'\n"
    )
    facts = [(function.name, function.calls_unittest_assert) for function in read(source).functions]
    assert facts == [
        ("test_a", True),
        ("test_b", True),
        ("test_c", False),
        ("test_d", True),
        ("inner", True),
        ("test_e", False),
    ]


@settings(deadline=None, max_examples=60)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])), st.data())
def test_byte_offsets_are_the_lengths_of_encoded_prefixes(text: str, data: st.DataObject) -> None:
    offsets = sorted(data.draw(st.lists(st.integers(0, len(text)))))
    assert byte_offsets(text, offsets) == [len(text[:offset].encode()) for offset in offsets]


def test_node_positions_become_code_points_on_lines_beyond_ascii() -> None:
    source = "ä = 1; b = 'ö'; c = 2\r\nd = 'é'; e = 3\n"
    lines = LineIndex(source)
    names = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)]
    assert [source[lines.offset(node.lineno, node.col_offset)] for node in names] == ["ä", "b", "c", "d", "e"]


@pytest.mark.parametrize(
    ("source", "imports"),
    [
        ("import polars", ("polars",)),
        ("import polars as pl, duckdb", ("duckdb", "polars")),
        ("import polars.selectors as cs", ("polars",)),
        ("from polars import col as c, lit", ("polars",)),
        ("from polars.testing.asserts import assert_frame_equal", ("polars",)),
        ("from polars import *", ("polars",)),
        ("try:\n    import polars\nexcept ImportError:\n    import pandas", ("pandas", "polars")),
        (
            "try:\n    pass\nexcept* OSError:\n    import a\nelse:\n    import b\nfinally:\n    import c",
            ("a", "b", "c"),
        ),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import polars", ("polars", "typing")),
        ("if x:\n    pass\nelif y:\n    import a\nelse:\n    import b", ("a", "b")),
        ("def f():\n    for x in y:\n        with z:\n            import polars", ("polars",)),
        ("class A:\n    async def f(self):\n        while x:\n            from polars import col", ("polars",)),
        ("match x:\n    case 1:\n        import polars", ("polars",)),
        ("import importlib\npl = importlib.import_module('polars.selectors')", ("importlib", "polars")),
        ("from importlib import import_module\nf(x=[import_module('polars')])", ("importlib", "polars")),
        ("pl = __import__('polars')", ("polars",)),
        ("def f(): return builtins.__import__('polars.x', globals())", ("polars",)),
        ("from . import polars", ()),
        ("from .polars import col", ()),
        ("from ..polars import col", ()),
        ("import importlib\nimportlib.import_module('.polars', __package__)", ("importlib",)),
        ("import importlib\nimportlib.import_module(name)\nimportlib.import_module(f'{x}.y')", ("importlib",)),
        ("import importlib\nimportlib.import_module('not a name')\nimport_module()", ("importlib",)),
        ("polars = 1\nx = 'import polars'\n# import_module('polars')", ()),
    ],
)
def test_imports_are_found_however_they_are_written(source: str, imports: tuple[str, ...]) -> None:
    assert read(source).imports == imports
