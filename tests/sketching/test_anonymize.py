"""Sketches change only placeholders, and the project's own kinds parse wherever the source does."""

from __future__ import annotations

import json
import pickle
import sys
import warnings
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from cert_ray.errors import SketchError
from cert_ray.python_source import parse
from cert_ray.schemas import Dropped, DropReason
from cert_ray.sketching import PLACEHOLDER_KINDS, Sketched, SketchKind, sketch, sketch_source, sketch_spans
from tests.sketching.corpus import standard_library
from tests.sketching.properties import violations

OWN_KINDS = [SketchKind.CONSTANTS, SketchKind.NAMES, SketchKind.BOTH]

# Cases of the released code that Python 3 refuses, and why each is left out.
REFUSED = {
    "int_literals": "holds 10L and 0777, which are Python 2 (its Python 3 lines stand in other cases)",
    "int_py2_long": "10L is Python 2",
    "str_concat_mixed": "text and bytes cannot be concatenated in Python 3",
    "unicode_raw": "ur'' is Python 2",
    "print_py2": "the print statement is Python 2",
    "except_py2": "`except A, e:` is Python 2 (and means two types from 3.14 on)",
}
# Cases on which the released code fails: what a sensible sketch is, and since which Python.
MODERN = {
    "bytes_raw2": ("x = rb'abc'\n", (3, 0)),  # as the released rule leaves br''
    "nonascii_ident": ("é = number\n", (3, 0)),
    "walrus": ("if (n := len(a)) > number:\n    print(n)\n", (3, 8)),
    "def_posonly": ("def func(a, /, b, *, c):\n    pass\n", (3, 8)),
    "type_alias_312": ("type X = int\n", (3, 12)),
    "generics_312": ("def func[T](x: T) -> T:\n    return x\n", (3, 12)),
    "async_comp": ("async def func():\n    return [x async for x in y]\n", (3, 6)),
}


def check(source: str, sketched: Sketched, *, spaces: bool = True) -> None:
    """Outside placeholders the sketch is the source, except for single spaces beside a placeholder."""
    assert len(sketched.placeholders) == len(sketched.replaced)
    code_at = sketch_at = 0
    for placeholder, (start, end) in zip(sketched.placeholders, sketched.replaced, strict=True):
        assert code_at <= start < end
        assert placeholder.kind in PLACEHOLDER_KINDS
        assert sketched.text[placeholder.start : placeholder.end] == placeholder.kind
        check_gap(source[code_at:start], sketched.text[sketch_at : placeholder.start])
        code_at, sketch_at = end, placeholder.end
    check_gap(source[code_at:], sketched.text[sketch_at:])


def check_gap(code: str, text: str) -> None:
    if code != text:
        left = " " if code[:1].isalnum() and text[:1] == " " else ""
        right = " " if code[-1:].isalnum() and text[-1:] == " " else ""
        assert left + code + right == text


def sketched_source(source: str, kind: SketchKind) -> Sketched:
    outcome = sketch_source(source, kind)
    assert isinstance(outcome, Sketched), outcome
    return outcome


def test_the_released_kind_gives_what_the_released_code_gave(shared: Path) -> None:
    cases = json.loads((shared / "sketch_cases.json").read_text())
    comparable = [case for case in cases if case["ok"]]
    seen = set()
    for case in comparable:
        if isinstance(parse(case["input"]), Dropped):
            seen.add(case["name"])
            with pytest.raises(SketchError, match="not_python_3"):
                sketch(case["input"], "released")
        else:
            assert sketch(case["input"], "released") == case["expected"], case["name"]
    assert seen <= REFUSED.keys()
    assert len(comparable) - len(REFUSED) == 57


def test_what_the_released_code_cannot_read_has_a_sensible_sketch(shared: Path) -> None:
    cases = {case["name"]: case for case in json.loads((shared / "sketch_cases.json").read_text()) if not case["ok"]}
    assert cases.keys() == MODERN.keys()
    for name, (expected, since) in MODERN.items():
        if sys.version_info >= since:
            assert sketch(cases[name]["input"], "released") == expected
            assert sketch(cases[name]["input"], "constants") == expected


def test_the_own_kinds_follow_the_released_rule_on_single_literals(shared: Path) -> None:
    for case in json.loads((shared / "sketch_cases.json").read_text()):
        one_literal_each = case["name"] not in ("str_concat_implicit", "form_feed")
        if case["ok"] and one_literal_each and not isinstance(parse(case["input"]), Dropped):
            assert sketch(case["input"]) == case["expected"], case["name"]


@pytest.mark.parametrize("kind", OWN_KINDS)
def test_sketches_of_the_standard_library_parse_and_change_only_placeholders(kind: SketchKind) -> None:
    # A third of the sample for each kind; `tests.sketching.everything` does the same to every installed file.
    for path, source in standard_library(300)[OWN_KINDS.index(kind) :: 3]:
        check(source, sketched_source(source, kind))
        assert not violations(source, kind), path


def test_line_ends_and_characters_beyond_ascii_move_nothing() -> None:
    for path, source in standard_library(300)[::10]:
        for kind in SketchKind:
            expected = sketched_source(source, kind).text
            crlf = source.replace("\n", "\r\n")
            assert sketched_source(crlf, kind).text == expected.replace("\n", "\r\n"), path
            assert sketched_source("# é\N{SNAKE}\n" + source, kind).text == "# é\N{SNAKE}\n" + expected, path


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        # A placeholder that would join a word.
        ('def f(x):\n    return"a"if x else.5\n', "def func(x):\n    return string if x else float\n"),
        ("x = 1if y else 2\n", "x = number if y else number\n"),
        ("x = 1.if y else(2)or 1or'a'in'b'\n", "x = float if y else(number)or number or string in string\n"),
        ("x = [0for y in'a']\n", "x = [number for y in string]\n"),
        ("x = lambda:0\n", "x = lambda:number\n"),
        ("assert'a',not'b'\n", "assert string,not string\n"),
        # Implicit concatenation.
        ("x = 'a' 'b'\n", "x = string\n"),
        ("x = 'a''b'\n", "x = string\n"),
        ("x = 'a' \\\n  'b'\n", "x = string\n"),
        ("x = 'a' \\\r\n  'b'\r\n", "x = string\r\n"),
        ("x = ('a'  # one\n     # two \\\n     'b'\n     )\n", "x = (string\n     )\n"),
        ("x = ('a' # 1)\n 'b' # 2)\n 'c' # 3)\n)\n'd'\n", "x = (string # 3)\n)\nstring\n"),
        ("'a' # (\n'b' # (\n'c'\n", "string # (\nstring # (\nstring\n"),
        ("x = 'a' f'{b}' r'c'\n", "x = interstring\n"),
        ("x = 'a' r'c'\n", "x = string\n"),
        ("x = r'a' r'c'\n", "x = rawstring\n"),
        ("x = b'a' B'c'\n", "x = binarystring\n"),
        ("x = b'a' rb'c', 'd'\n", "x = b'a' rb'c', string\n"),
        ("x = 'a' '''b''' 'c', 'd'\n", "x = 'a' '''b''' 'c', string\n"),
        ("x = 'a', 'b'\n", "x = string, string\n"),
        ("'a'\n'b'\n", "string\nstring\n"),
        ("x = 'a' # foo \\\n'b'\n", "x = string # foo \\\nstring\n"),
        ("def f():\n    'doc'\n    'more'\n", "def func():\n    string\n    string\n"),
        ("x = [\n  'a'\n  'b',\n  'c'\n]\n'd'\n", "x = [\n  string,\n  string\n]\nstring\n"),
        ("x = ')' ']'\n'a'\n", "x = string\nstring\n"),
        ("x = '(' \n'a'\n", "x = string \nstring\n"),
        # Docstrings and triple quotes.
        ('r"""a"""\nx = r"""a"""\n', 'r"""a"""\nx = rawstring\n'),
        ('# c\n\nr"""a"""\n', '# c\n\nr"""a"""\n'),
        (
            'class A:  # c:\n\n    # d\n    R"""a"""\n    1\n',
            'class AnClass:  # c:\n\n    # d\n    R"""a"""\n    number\n',
        ),
        ('def f():\n    x = 1\n    r"""a"""\n', "def func():\n    x = number\n    rawstring\n"),
        ('f"""a{b}"""\n', "interstring\n"),
        # Oddities.
        ("x = 1 .real + 1..real + 1.5.real\n", "x = number .real + float.real + float.real\n"),
        ("x = a[-1:2, ...] ** -1j\n", "x = a[-number:number, ...] ** -complex\n"),
        ("x = 0xFFif y else 0b1\n", "x = 0xFFif y else 0b1\n"),
        ("'a'.join(x)['b']\n", "string.join(x)[string]\n"),
        (
            "def f(a='x', *, b=1, c: 'T' = .5) -> 'R': ...\n",
            "def func(a=string, *, b=number, c: string = float) -> string: ...\n",
        ),
        ("from . import a1\nfrom ..b2 import c3\n", "from . import a1\nfrom ..b2 import c3\n"),
        ("async  def\tf(): await'a'\n", "async  def\tfunc(): await string\n"),
        ("print('def f(): 1')\n", "print(string)\n"),
        ("x = {'a': 1, 'a': 1}\n", "x = {string: number, string: number}\n"),
        ("number = 1\nstring = number\n", "number = number\nstring = number\n"),
        ("x = 1", "x = number"),
        ("x\f= 1\n\f\n", "x\f= number\n\f\n"),
        ("", ""),
        # Patterns.
        (
            "match x:\n    case 1 | 'a' 'b' | -1.5 | {'k': [2, *_]} if y == 3:\n        z = 4\n"
            "    case A(b='c') as d: 5\n",
            "match x:\n    case 1 | 'a' 'b' | -1.5 | {'k': [2, *_]} if y == number:\n        z = number\n"
            "    case A(b='c') as d: number\n",
        ),
        ("match 1, 'a':\n  case 2, 'é' if 'é': 3\n", "match number, string:\n  case 2, 'é' if string: number\n"),
        ("match = 1\ncase = {\n  case: 2}\n", "match = number\ncase = {\n  case: number}\n"),
    ],
)
def test_constants(source: str, expected: str) -> None:
    sketched = sketch_spans(source)
    assert sketched.text == expected
    check(source, sketched)
    assert sketch(expected) == expected


def test_nested_fstrings_are_one_placeholder() -> None:
    assert sketch("""x = f'{a["k"]!r:>{w}}' + f"{'}'}"\n""") == "x = interstring + interstring\n"
    if sys.version_info >= (3, 12):
        assert sketch("""x = f'{a['k']}', 'b'\n""") == "x = interstring, string\n"
        assert sketch("""x = f'{f'{1}' 'c'}' 'd', 'b'\n""") == "x = interstring, string\n"


def test_the_released_kind_loses_form_feeds_between_tokens_only() -> None:
    source = "x = 1\n\f\ny = '''\f'''  # \f\n"
    assert sketch(source, "released") == "x = number\n\ny = '''\f'''  # \f\n"


def test_spans_tell_a_placeholder_from_the_same_word_in_code() -> None:
    sketched = sketch_spans("number = number + 1\n")
    assert sketched.text == "number = number + number\n"
    assert sketched.placeholders == ((18, 24, "number"),)
    assert sketched.replaced == ((18, 19),)


@pytest.mark.parametrize("kind", SketchKind)
@pytest.mark.parametrize("source", ["print 'x'\n", "x = \0", "(" * 10_000, "x = '\ud800'", "f(\n", "x = 'a\n"])
def test_what_does_not_parse_has_no_sketch(source: str, kind: SketchKind) -> None:
    with pytest.raises(SketchError, match="only source that this Python parses") as caught:
        sketch(source, kind)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_an_unknown_kind_is_refused_with_the_known_ones() -> None:
    with pytest.raises(SketchError, match=r"'const'.*constants, names, both, released"):
        sketch("x = 1\n", "const")


def test_kinds_that_parse_drop_what_does_not() -> None:
    for source, kind in [
        ("f(\n", SketchKind.NAMES),
        ("f(\n", SketchKind.BOTH),
        ("f(\n match\n case\n", SketchKind.CONSTANTS),
    ]:
        outcome = sketch_source(source, kind)
        assert isinstance(outcome, Dropped)
        assert outcome.reason is DropReason.NOT_PYTHON_3


def test_warnings_of_the_parser_are_no_failure() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kind in SketchKind:
            assert "x is" in sketch("x is 1\nmatch x:\n  case '\\d': 1\n", kind).replace("variable", "x")


@pytest.mark.parametrize(
    "source",
    [
        "x = [" + "'a', " * 30_000 + "]\n",
        "x = (" + "'a'  # c\n" * 20_000 + ")\n",
        "x = 'a' " + "\\\n" * 20_000 + "'b'\n",
        "x = ('a'\n" + "#" * 200_000 + "\n)\n",
        "ä = [" + "é1, " * 20_000 + "]\n",
        "x = '" + "{" * 100_000 + "'\n",
        "x = f'" + "{{" * 100_000 + "'\n",
        "x = f'" + "{x}" * 5_000 + "'\n",
        "\n\n".join(["f(x)"] * 5_000) + "\n",
    ],
    ids=lambda source: source[:12],
)
def test_long_lines_and_runs_take_linear_time(source: str) -> None:
    # The suite's time limit is the assertion: anything quadratic here would take minutes.
    for kind in OWN_KINDS:
        check(source, sketched_source(source, kind))


ATOMS = st.sampled_from(
    ["1", "0xF", ".5", "1e3", "2j", "'a'", '"b"', "r'c'", "f'{x}'", "'''d'''", "x", "y.z", "f('a', k=1)", "not 1"]
)
EXPRESSIONS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.builds(
            "({}{}{})".format, inner, st.sampled_from([" ", "\n", "+", " if ", "if", " or", ",", " #c\n"]), inner
        ),
        st.builds(
            "{}{}{}".format, inner, st.sampled_from([" + ", "or ", " \\\n", "if y else", ", ", "\n", ";"]), inner
        ),
        st.builds("[{} for x in{}]".format, inner, inner),
        st.builds("(lambda x=1:{})".format, inner),
    ),
    max_leaves=8,
)
STATEMENTS = st.lists(
    st.one_of(
        st.builds("{}\n".format, EXPRESSIONS),
        st.builds("x = {}\n".format, EXPRESSIONS),
        st.builds("def f(x, y={}):\n    global z\n    z ={}\n    return{}\n".format, ATOMS, ATOMS, EXPRESSIONS),
        st.builds("match {}:\n  case 'a' | [1, x] if{}:\n    x = y\n".format, EXPRESSIONS, EXPRESSIONS),
    ),
    max_size=3,
).map("".join)


@settings(
    deadline=None,
    derandomize=True,
    max_examples=60,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)
@given(STATEMENTS, st.sampled_from(OWN_KINDS))
def test_sketches_of_made_up_programs_parse_and_are_their_own_sketch(source: str, kind: SketchKind) -> None:
    assume(not isinstance(parse(source), Dropped))
    sketched = sketched_source(source, kind)
    check(source, sketched)
    assert not isinstance(parse(sketched.text), Dropped)
    assert sketched_source(sketched.text, kind).text == sketched.text
    assert all(first.end <= second.start for first, second in pairwise(sketched.placeholders))
