"""The oracle sees what it is there to see: each of these sketches breaks one promise."""

from __future__ import annotations

import ast

import pytest

from cert_ray.sketching import SketchKind
from tests.sketching.properties import Comparison, violations

SOURCE = "import os\ndef f(a, *, b=1):\n    c = os.path.join(a, 'x')\n    return g(len(c), k=c)\nf(1, b=2)\n"
GOOD = (
    "import os\ndef func(argument, *, b=number):\n    variable = os.path.join(argument, string)\n"
    "    return g(len(variable), k=variable)\nfunc(number, b=number)\n"
)


def differences(sketch: str) -> list[str]:
    return Comparison(ast.parse(SOURCE), ast.parse(sketch), SketchKind.BOTH).differences()


def test_a_right_sketch_has_no_difference() -> None:
    assert differences(GOOD) == []
    assert violations(SOURCE, SketchKind.BOTH) == []


@pytest.mark.parametrize(
    ("right", "wrong", "said"),
    [
        ("import os", "import variable", "alias.name"),
        ("os.path.join", "os.variable.join", "Attribute.attr"),
        ("os.path.join", "variable.path.join", "os is none of the file's names"),
        ("len(", "func(", "len is none of the file's names"),
        ("g(len", "func(len", "g is none of the file's names"),
        ("k=variable", "argument=variable", "keyword.arg"),
        ("*, b=number", "*, argument=number", "passed by keyword"),
        ("def func", "def f", "the definition of f became f"),
        ("k=variable", "k=argument", "in one scope"),
        ("string)", "other)", "a literal became"),
        ("(argument, string)", "(argument, string, string)", "2 args became 3"),
        ("return g", "g", "Return became Expr"),
    ],
)
def test_a_broken_promise_is_told(right: str, wrong: str, said: str) -> None:
    assert GOOD.count(right) == 1
    assert any(said in line for line in differences(GOOD.replace(right, wrong)))
