"""Names that the file defines are renamed in step with their scopes; all others stay."""

from __future__ import annotations

import sys

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from cert_ray.python_source import parse
from cert_ray.schemas import Dropped
from cert_ray.sketching import Sketched, SketchKind, sketch, sketch_source, sketch_spans


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        # All uses of a binding become its kind's word.
        (
            "def f(a):\n    b = a\n    return b + f(a)\n",
            "def func(argument):\n    variable = argument\n    return variable + func(argument)\n",
        ),
        ("class A(B): pass\nx = A()\nprint(x)\n", "class AnClass(B): pass\nvariable = AnClass()\nprint(variable)\n"),
        ("f = None\ndef f(): pass\nf()\n", "func = None\ndef func(): pass\nfunc()\n"),
        ("def f(a): a = a + 1; del a\n", "def func(argument): argument = argument + 1; del argument\n"),
        ("for i, (j, *k) in x: i, j, k\n", "for variable, (variable, *variable) in x: variable, variable, variable\n"),
        ("with a() as b: b\n", "with a() as variable: variable\n"),
        ("try: pass\nexcept (A, B) as e: raise e\n", "try: pass\nexcept (A, B) as variable: raise variable\n"),
        ("try: pass\nexcept (A # as b\n) as e: e\n", "try: pass\nexcept (A # as b\n) as variable: variable\n"),
        ("x = [y + z for y in w if y]\n", "variable = [variable + z for variable in w if variable]\n"),
        (
            "f = lambda a, *b, c=1, **d: (a, b, c, d)\n",
            "variable = lambda argument, *argument, argument=1, **argument: (argument, argument, argument, argument)\n",
        ),
        ("if (n := len(x)) > 1: n\n", "if (variable := len(x)) > 1: variable\n"),
        ("x: int = 1\nx += 2\n", "variable: int = 1\nvariable += 2\n"),
        ("é = 1; print(é)\n", "variable = 1; print(variable)\n"),
        ("ﬁ = 1; print(fi)\n", "variable = 1; print(variable)\n"),  # one identifier after NFKC
        # Scopes.
        (
            "x = 1\ndef f():\n    global x, y\n    x = y = 2\ny\n",
            "variable = 1\ndef func():\n    global variable, variable\n    variable = variable = 2\nvariable\n",
        ),
        (
            "def f():\n    x = 1\n    def g():\n        nonlocal x\n        x = 2\n",
            "def func():\n    variable = 1\n    def func():\n        nonlocal variable\n        variable = 2\n",
        ),
        (
            "def f(a):\n    return [g(a) for b in a]\ndef g(c): return a\n",
            "def func(argument):\n    return [func(argument) for variable in argument]\ndef func(argument): return a\n",
        ),
        (
            "x = 1\nclass A:\n    x = 2\n    y = x\n    def f(self): return x\n",
            "variable = 1\nclass AnClass:\n    x = 2\n    y = x\n    def func(self): return variable\n",
        ),
        (
            "class A:\n    def g(self): pass\n    h = property(g)\n    def k(self): return self.g(), g\n",
            "class AnClass:\n    def func(self): pass\n    h = property(func)\n"
            "    def func(self): return self.g(), g\n",
        ),
        ("class A:\n    def f(self): return A.f\n", "class AnClass:\n    def func(self): return AnClass.f\n"),
        # What stays.
        (
            "import a.b, c as d\nfrom e import g\nx = a.b.c(d, g)\n",
            "import a.b, c as d\nfrom e import g\nvariable = a.b.c(d, g)\n",
        ),
        (
            "try:\n    import j\nexcept ImportError:\n    j = None\n",
            "try:\n    import j\nexcept ImportError:\n    j = None\n",
        ),
        ("from a import *\nb(len, True)\n", "from a import *\nb(len, True)\n"),
        ("x = 1\ny.x(x=x)\ny['x']\n", "variable = 1\ny.x(x=variable)\ny['x']\n"),
        ("def f(a, b): return a + b\nf(1, b=2)\n", "def func(argument, b): return argument + b\nfunc(1, b=2)\n"),
        ("def f(self, cls): _ = self; __all__ = [cls]\n", "def func(self, cls): _ = self; __all__ = [cls]\n"),
        ("class A(metaclass=M): pass\nM = 1\n", "class AnClass(metaclass=variable): pass\nvariable = 1\n"),
        ("class A:\n    a: int = 1\n    b = a\n", "class AnClass:\n    a: int = 1\n    b = a\n"),
        # f-strings.
        (
            "x = 1\nf'{x} x {x.x!r:>{x}} {f(x=x)} {x=} {\"x\"} {{x}}'\n",
            "variable = 1\nf'{variable} x {variable.x!r:>{variable}} {f(x=variable)} {variable=} {\"x\"} {{x}}'\n",
        ),
        (
            "def f(a):\n    return ('é' f'''\n{a + 1}''' rf\"{a == 1}\")\n",
            "def func(argument):\n    return ('é' f'''\n{argument + 1}''' rf\"{argument == 1}\")\n",
        ),
        (
            "f'{[a for a in b]} {(lambda c: c)(1)} {(d := 2)}'\nd\n",
            "f'{[variable for variable in b]} {(lambda argument: argument)(1)} {(variable := 2)}'\nvariable\n",
        ),
        (  # one name in two scopes of one f-string: the one that reaches out of it decides
            "def f(a):\n    return f'{[a for a in a]} {(lambda a: a)(a)} {a}', a, [a for a in a]\n",
            "def func(argument):\n    return f'{[argument for argument in argument]} "
            "{(lambda argument: argument)(argument)} {argument}', argument, [variable for variable in argument]\n",
        ),
        (  # the last name of a tuple is shown, and is no keyword of a call
            "a, b = 1, 2\nf'{a, b=} {a, b = !r} {a, b=:>9} {f(a, b = a)}'\n",
            "variable, variable = 1, 2\n"
            "f'{variable, variable=} {variable, variable = !r} {variable, variable=:>9} {f(variable, b = variable)}'\n",
        ),
        (
            "import a\nb = f'{[a for a in b]} {a}', a\n",
            "import a\nvariable = f'{[a for a in variable]} {a}', a\n",
        ),
        # Patterns.
        (
            "match a:\n  case [b, *c]: b, c\n  case {'k': d, ** e}: d, e\n"
            "  case A(f=g) | B(g) as h: g, h\n  case i: i\n",
            "match a:\n  case [variable, *variable]: variable, variable\n"
            "  case {'k': variable, ** variable}: variable, variable\n"
            "  case A(f=variable) | B(variable) as variable: variable, variable\n  case variable: variable\n",
        ),
        (
            "class A: pass\nmatch a:\n  case A(x=1) | A.y: pass\n  case _: pass\n",
            "class AnClass: pass\nmatch a:\n  case AnClass(x=1) | AnClass.y: pass\n  case _: pass\n",
        ),
    ],
)
def test_names(source: str, expected: str) -> None:
    assert sketch(source, "names") == expected
    assert sketch(expected, "names") == expected


@pytest.mark.skipif(sys.version_info < (3, 12), reason="type parameters came with 3.12")
def test_type_parameters_stay() -> None:
    source = "T = 1\ndef f[T](a: T) -> T: return T\ntype X[T] = list[T]\nclass A[T](B[T]): pass\nT\n"
    expected = (
        "variable = 1\ndef func[T](argument: T) -> T: return T\n"
        "type variable[T] = list[T]\nclass AnClass[T](B[T]): pass\nvariable\n"
    )
    assert sketch(source, "names") == expected


def test_both_is_constants_and_names_together() -> None:
    source = "import numpy as np\ndef f(a, b=1):\n    x = f'{a}' 'b'\n    return np.zeros(b, x)\nf(2)\n"
    assert sketch(source, "both") == (
        "import numpy as np\ndef func(argument, argument=number):\n    variable = interstring\n"
        "    return np.zeros(argument, variable)\nfunc(number)\n"
    )


def test_files_that_only_the_symbol_table_refuses_have_a_sketch() -> None:
    for source in ("def f(a, a): return a\n", "return x\n", "def f():\n    x = 1\n    global x\n", "nonlocal x\n"):
        assert not isinstance(parse(sketch(source, "both")), Dropped)


def test_deep_trees_are_renamed_without_recursion() -> None:
    source = "x = 1\ny = " + "+".join(["x"] * 900) + "\n" + "if x: pass\n" + "elif y: pass\n" * 900
    assert sketch_spans(source, "names").text.count("variable") == 2 + 900 + 901


NAMES = st.sampled_from(["a", "b", "func", "AnClass", "argument", "variable", "self", "__d__", "print"])
USES = st.one_of(
    NAMES,
    st.builds("g({}={})".format, NAMES, NAMES),
    st.builds("{}.{}".format, NAMES, NAMES),
    st.builds("[{} for {} in {}]".format, NAMES, NAMES, NAMES),
    st.builds("(lambda {}, b={}: {})".format, NAMES, NAMES, NAMES),
    st.builds("f'{{{}}} {{f({}={})!r}}'".format, NAMES, NAMES, NAMES),
    st.builds("({} := {})".format, NAMES, NAMES),
)
SIMPLE = st.one_of(
    st.builds("{} = {}".format, NAMES, USES),
    st.builds("import {}".format, NAMES),
    st.builds("from x import y as {}".format, NAMES),
    st.builds("global {}".format, NAMES),
    st.builds("nonlocal {}".format, NAMES),
    st.builds("del {}".format, NAMES),
    st.builds("return {}".format, USES),
)


def indented(lines: list[str]) -> str:
    return "\n".join("    " + line for part in lines for line in part.split("\n"))


BLOCKS = st.recursive(
    SIMPLE,
    lambda inner: st.one_of(
        st.builds("def {}({}, *{}):\n{}".format, NAMES, NAMES, NAMES, st.lists(inner, min_size=1).map(indented)),
        st.builds("class {}({}):\n{}".format, NAMES, USES, st.lists(inner, min_size=1).map(indented)),
        st.builds("try: pass\nexcept {} as {}:\n{}".format, NAMES, NAMES, st.lists(inner, min_size=1).map(indented)),
        st.builds("match {}:\n  case {} if {}: {}".format, NAMES, NAMES, USES, SIMPLE),
    ),
    max_leaves=12,
)


@settings(
    deadline=None,
    derandomize=True,
    max_examples=60,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)
@given(st.lists(BLOCKS, max_size=6).map("\n".join), st.sampled_from([SketchKind.NAMES, SketchKind.BOTH]))
def test_a_renamed_program_parses_and_renames_to_itself(source: str, kind: SketchKind) -> None:
    assume(not isinstance(parse(source), Dropped))
    sketched = sketch_source(source, kind)
    assert isinstance(sketched, Sketched)
    assert not isinstance(parse(sketched.text), Dropped)
    assert sketch(sketched.text, kind) == sketched.text
