"""Examples hold a document's code once, and the sketch of a part is that of the code which stands behind it."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from cert_ray.sketching import Placeholder, sketch_spans
from cert_ray.tokens.blocks import Block, blocks_of
from cert_ray.tokens.context_first import Example, examples_of, places_of
from tests.tokens.datasets import document, real_code, sketched_document

CODE = 'def head(df, n=5):\n    """Rows: a b."""\n    # the first ones\n    return df.head(n)[["a"]]'
SKETCH = 'def func(df, n=number):\n    """Rows: a b."""\n    # the first ones\n    return df.head(n)[[string]]'


def block(code: str, sketch: str | None, gap: str = "") -> Block:
    """Kinds spelled in `sketch` are its placeholders."""
    if sketch is None:
        return Block(code, None, gap)
    words = re.finditer(r"\b(?:number|string|func|AnClass)\b", sketch)
    return Block(code, (sketch, [Placeholder(*word.span(), word.group()) for word in words]), gap)


def shown(examples: Iterator[Example]) -> list[tuple[str, str | None, str]]:
    return [(one.context, None if one.sketch is None else one.sketch[0], one.code) for one in examples]


def test_a_part_begins_where_a_word_ends_outside_comments_and_docstrings() -> None:
    """Counted by hand: `def`, the four line ends but the last, `return`. Behind `head(df,` the sides differ."""
    begins = [(CODE[code:][:9], SKETCH[sketch:][:9]) for code, sketch in places_of(CODE, SKETCH)]
    assert begins == [
        ("def head(", "def func("),
        (" head(df,", " func(df,"),
        ('\n    """R', '\n    """R'),
        ("\n    # th", "\n    # th"),
        ("\n    retu", "\n    retu"),
        (" df.head(", " df.head("),
    ]


def test_of_a_long_block_only_the_end_is_sketched() -> None:
    lines = [f"x{number} = {number}" for number in range(20)]
    code, sketch = "\n".join(lines), "\n".join(re.sub("= .*", "= number", line) for line in lines)
    places = places_of(code, sketch)
    assert min(code[place:].count("\n") for place, _ in places) == 0
    assert max(code[place:].count("\n") for place, _ in places) == 7


def test_lines_that_do_not_belong_to_each_other_are_not_cut() -> None:
    assert places_of("x = ('a'\n     'b')\ny = x", "x = (string)\ny = x") == [(0, 0)]
    assert places_of("x", "x") == [(0, 0)]


@pytest.mark.parametrize("digest", ["a", "b", "c", "d", "e", "f", "g", "h"])
def test_the_examples_of_a_small_document_are_among_those_that_hand_would_make(digest: str) -> None:
    blocks = [block("import a", None), block("x = 1", "x = number", "\n\n"), block("y = 'b'", "y = string", "\n")]
    first = [
        [("import a", "\n\nx = number", "\n\nx = 1")],
        [("import a\n\nx", " = number", " = 1")],
        [("import a\n\nx =", " number", " 1")],
        [],
    ]
    parts = [("", "y = string", "y = 'b'"), ("y", " = string", " = 'b'"), ("y =", " string", " 'b'")]
    allowed = [
        [*ahead, (part[0] if ahead else f"import a\n\nx = 1\n{part[0]}".rstrip(), *part[1:])]
        for ahead in first
        for part in (parts if ahead else [("", "\ny = string", "\ny = 'b'"), *parts[1:]])
    ]
    assert shown(examples_of(blocks, digest)) in allowed


def test_draws_differ_from_document_to_document_and_not_from_run_to_run() -> None:
    blocks = [block(f"x{n} = {n}", f"x{n} = number") for n in range(30)]
    one, again, other = (shown(examples_of(blocks, digest)) for digest in ("a", "a", "b"))
    assert one == again != other


def test_documentation_is_context_of_the_first_example() -> None:
    (one,) = examples_of([block(CODE, SKETCH)], "a", "# Documentation\n\n")
    assert one.context.startswith("# Documentation")


def test_a_part_that_begins_with_a_placeholder_keeps_it() -> None:
    (example,) = examples_of([block("'a'+1", "string+number")], "a", ahead="# of a\n")
    assert example.sketch == ("\nstring+number", [Placeholder(1, 7, "string"), Placeholder(8, 14, "number")])


def test_a_class_is_taken_method_by_method() -> None:
    method = "    def one(self):\n        return 1"
    code = f"class A:\n    x = 1\n\n{method}\n\n    @property\n{method}"
    sketch = re.sub(r"\bone\b", "func", re.sub(r"\b1\b", "number", code)).replace("class A", "class AnClass")
    found = [one for digest in "abcdefgh" for one in examples_of([block(code, sketch)], digest)]
    assert {one.code.count("def one") for one in found} == {0, 1}
    assert max(len(list(examples_of([block(code, sketch)], digest))) for digest in "abcdefgh") == 3


def cuts(code: str, sketch: str) -> set[int]:
    """The numbers of examples that draws make of one block."""
    return {len(list(examples_of([block(code, sketch)], digest))) for digest in "abcdefghijklmnop"}


def test_a_class_is_not_cut_inside_a_text_in_three_quotes() -> None:
    """The example: what looks like a method stands in a docstring; the one method behind it is cut as ever."""
    code = (
        'class A:\n    """Use:\n\n    def f(a b):\n        pass c d\n    """\n\n    def g(self):\n        return 1\n\n'
        "    def h(self):\n        return 2"
    )
    sketch = re.sub(r"\b[12]\b", "number", code).replace("class A", "class AnClass")
    assert cuts(code, sketch) == {1, 2, 3}
    for digest in "abcdefghijklmnop":
        for one in examples_of([block(code, sketch)], digest):
            assert one.context.count('"""') % 2 == one.code.count('"""') % 2 == 0


@pytest.mark.parametrize(
    "lone",
    [
        "# it's ''' of Python",
        '# """',
        "a = \"'''\"",
        "b = '\"\"\"' # '''",
        'c = r"""" # ""',
        'd = """#\n    e\n    """',
    ],
)
def test_quotes_that_open_nothing_keep_no_method_from_being_cut(lone: str) -> None:
    """By hand: two methods behind the line, so up to three parts; and words end behind it as they do elsewhere."""
    code = f"class A:\n    {lone}\n\n    def g(self):\n        return x\n\n    def h(self):\n        return y"
    assert cuts(code, code) == {1, 2, 3}
    method = f"def g(self):\n    {lone}\n    return x"
    behind = method.index("return")
    assert {behind - 5, behind + 6} <= {place for place, _ in places_of(method, method)}


def test_a_string_is_not_cut_inside_wherever_it_ends() -> None:
    """The text in three quotes stands behind a comment with three others, and holds these, too."""
    text = '"""a b\n  c \'\'\' d # """'
    code = f"x = 1  # it's ''' of Python\ny = {text} + z w"
    start = code.index(text)
    places = {place for place, _ in places_of(code, code)}
    assert not places & set(range(start + 1, start + len(text)))
    assert {start - 1, start + len(text), start + len(text) + 2} <= places
    comment = range(code.index("#") + 1, code.index("\n"))
    assert not places & set(comment)
    assert {code.index("  #"), comment.stop} <= places


def test_blank_lines_and_definitions_inside_a_replaced_text_do_not_keep_a_class_whole() -> None:
    code = 'class A:\n    x = """\n\n    def f"""\n\n    def g(self):\n        return 1'
    sketch = "class AnClass:\n    x = string\n\n    def func(self):\n        return number"
    assert cuts(code, sketch) == {1, 2}


@pytest.mark.parametrize("blank", ["\n", " \n", "\t \n", " \n\n"])
def test_a_very_long_run_of_blank_lines_is_read_once(blank: str) -> None:
    """Were it read again from each of its lines, this would take minutes."""
    for end in ("y = 2", "    def f(self):\n        return 2"):
        code = f"class A:\n    x = 1\n{blank * 100_000}{end}"
        found = list(examples_of([block(code, re.sub(r"\b[12]\b", "number", code))], "a"))
        assert "".join(one.context + one.code for one in found).split() == code.split()


def test_a_class_of_very_many_methods_keeps_each_ones_placeholders() -> None:
    """Were all placeholders read again for each method, that would be 400 million comparisons."""
    code = "class A:\n    x = 0" + "".join(f"\n\n    def f(self):\n        return {n}" for n in range(20_000))
    sketch = re.sub(r"\b\d+\b", "number", code)
    pairs = [one.sketch for one in examples_of([block(code, sketch)], "a") if one.sketch is not None]
    assert len(pairs) > 5_000
    assert all([text[spot.start : spot.end] for spot in spots] == ["number"] for text, spots in pairs)


def test_code_without_sketches_is_one_context() -> None:
    assert shown(examples_of([block("import a", None), block("import b", None, "\n")], "a")) == [
        ("import a\nimport b", None, "")
    ]
    assert list(examples_of([Block("", None)], "a")) == []


def test_real_files_stand_whole_in_their_examples() -> None:
    for source in real_code(12):
        row = sketched_document(source)
        examples = list(examples_of(blocks_of(row), row["content_hash"]))
        text = "\n".join(one.context + one.code for one in examples)
        assert [line for line in text.split("\n") if line.strip()] == [
            line for line in source.split("\n") if line.strip()
        ]


def test_the_sketch_of_a_part_is_that_of_its_code() -> None:
    """By a pattern in which a placeholder is any text; and a context ends where serving ends a prompt."""
    pairs = 0
    for source in real_code(12):
        row = sketched_document(source)
        for one in examples_of(blocks_of(row), row["content_hash"]):
            if one.sketch is None:
                continue
            pairs += 1
            text, placeholders = one.sketch
            assert one.context == one.context.rstrip()
            assert all(text[spot.start : spot.end] == spot.kind for spot in placeholders)
            ends = [0, *(spot.end for spot in placeholders)]
            starts = [*(spot.start for spot in placeholders), len(text)]
            fixed = [re.escape(text[end:start]) for end, start in zip(ends, starts, strict=True)]
            assert re.fullmatch("(?s:.+?)".join(fixed), one.code)
    assert pairs > 100


def test_a_small_part_is_the_sketch_that_sketching_it_gives() -> None:
    for digest in "abcdefgh":
        (one,) = examples_of([block("df = f(1, 'a')\nx = 2", "df = f(number, string)\nx = number")], digest)
        assert one.sketch is not None
        whole = sketch_spans("df = f(1, 'a')\nx = 2")
        assert whole.text.endswith(one.sketch[0])
        assert len(one.sketch[1]) == sum(
            spot.start >= len(whole.text) - len(one.sketch[0]) for spot in whole.placeholders
        )


def test_blocks_know_the_blank_lines_ahead_of_them() -> None:
    row = document(
        "import é\n\nx = 1\ny = 2\n",
        "import é\n\nx = number\ny = number\n",
        [("number", "number"), ("number", "number")],
        [("import é", "import é", False), ("x = 1", "x = number", True), ("y = 2\n", "y = number\n", True)],
    )
    assert [found.gap for found in blocks_of(row)] == ["", "\n\n", "\n"]
