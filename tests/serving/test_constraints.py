"""Templates: which answers are a sketch with its placeholders filled, and which tokens lead there."""

from __future__ import annotations

import logging
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import llguidance
import pytest

from cert_ray.errors import RequestError
from cert_ray.schemas import Dropped
from cert_ray.serving import constraints
from cert_ray.serving.constraints import Course, Courses, Template
from cert_ray.sketching import Sketched, SketchKind, sketch_source
from tests.serving.builders import small_tokenizer

TOKENIZER = small_tokenizer()
COURSES = Courses(TOKENIZER, TOKENIZER.get_vocab_size(with_added_tokens=True) + 5, frozenset({0}))
CODE = ["df = pd.DataFrame({'a': [1, 2]})", "x = 1.5", "def head(df, n):\n    return df[1e-5 + 2j:'é', r'a' + b\"b\"]"]


def sketched(source: str, kind: SketchKind = SketchKind.CONSTANTS) -> Sketched:
    outcome = sketch_source(source, kind)
    assert not isinstance(outcome, Dropped)
    return outcome


def template(source: str, start: str = "") -> Template:
    found = sketched(source)
    return Template.of(start, found.text, found.placeholders, 0.001)


def follow(course: Course, text: str) -> Course | None:
    going: Course | None = course
    for token in TOKENIZER.encode(text, add_special_tokens=False).ids:
        going = None if going is None or going.refused[token] else going.after(token)
    return going


LITERALS = ["0", "12", "1_000", "1.", ".5", "0.25", "1e5", ".5E-3", "2.5J", "3j", "''", "'a'", '"it\'s"', r"'a\'b'",
            "'a' 'b'", "R'\\d'", "f'{a}'", "rF'{a}'", "B'a'", "U'a'"]  # fmt: skip


@pytest.mark.parametrize("literal", LITERALS)
def test_a_hole_is_filled_by_the_literals_of_its_kind(literal: str) -> None:
    """The kind comes from sketching, which shares no code with the template's expressions."""
    wanted = sketched(f"x = f({literal}, y)").placeholders
    for other in LITERALS:
        answer = f"x = f({other}, y)"
        fits = template(f"x = f({literal}, y)").end_in(answer, is_over=False) == len(answer)
        same = [place.kind for place in sketched(answer).placeholders] == [place.kind for place in wanted]
        assert fits == same, other
        assert (follow(COURSES.begin(template(f"x = f({literal}, y)")), answer) is not None) == same, other


@pytest.mark.parametrize("not_one", ["", "01", "0x1F", "x", "-1", "1)", "'a\nb'", "'''a'''"])
def test_a_hole_is_filled_by_nothing_else(not_one: str) -> None:
    for literal in ("1", "1.5", "'a'"):
        assert template(f"x = f({literal}, y)").end_in(f"x = f({not_one}, y)", is_over=True) is None


@pytest.mark.parametrize("source", CODE)
@pytest.mark.parametrize("seed", range(6))
def test_whatever_is_drawn_among_the_allowed_tokens_is_the_sketch_with_its_holes_filled(source: str, seed: int) -> None:
    dice, asked = random.Random(seed), template(source, "  ")
    course: Course | None = COURSES.begin(asked)
    ids: list[int] = []
    while asked.end_in(TOKENIZER.decode(ids), is_over=False) is None:
        assert course is not None
        assert len(ids) < 1000  # every hole ends
        allowed = (~course.refused).nonzero()[:, 0].tolist()
        if course.known:
            assert allowed == [course.known[0]]
        # Letters that are tokens by themselves, so that what is drawn is text; else whatever may come.
        plain = [token for token in allowed if TOKENIZER.decode([token]).isascii() and token > 15]
        ids.append(dice.choice(plain or allowed))
        if ids[-1] == 0:
            ids.pop()
            break
        course = course.after(ids[-1])
    text = TOKENIZER.decode(ids)
    end = asked.end_in(text, is_over=True)
    assert end is not None
    answer = text[:end]
    at = 0
    for piece in asked.fixed:
        assert piece == answer[answer.index(piece, at) :][: len(piece)]
        at = answer.index(piece, at) + len(piece)
    assert answer.startswith(asked.fixed[0])
    assert answer.endswith(asked.fixed[-1])


def test_a_token_may_reach_from_fixed_text_into_a_hole_and_out_of_it() -> None:
    course = COURSES.begin(template("x = df['a'].head()"))
    assert follow(course, "x = df['a'].head()") is not None
    inside = follow(course, "x = df")
    assert inside is not None
    starts = {TOKENIZER.decode([token]) for token in (~inside.refused).nonzero()[:, 0].tolist()}
    assert "['" in starts
    closing = follow(course, "x = df['b")
    assert closing is not None
    ends = {TOKENIZER.decode([token]) for token in (~closing.refused).nonzero()[:, 0].tolist()}
    assert {"'", "']", "b"} <= ends


def test_fixed_text_is_known_ahead_up_to_what_may_join_what_follows() -> None:
    course = COURSES.begin(template("import pandas as pd\nx = 1"))
    known = TOKENIZER.decode(list(course.known))
    assert known.startswith("import pandas as pd")
    assert "import pandas as pd\nx = ".startswith(known)


def test_an_answer_ends_with_the_sketch_or_where_a_hole_is_last_with_its_line() -> None:
    closed, is_open = template("x = f(1)"), template("x = 1")
    assert closed.end_in("x = f(20)", is_over=False) == len("x = f(20)")
    assert closed.end_in("x = f(20).y", is_over=False) is None
    assert is_open.end_in("x = 20", is_over=False) is None
    assert is_open.end_in("x = 20", is_over=True) == is_open.end_in("x = 20\ny", is_over=False) == len("x = 20")
    ends = follow(COURSES.begin(is_open), "x = 20")
    assert ends is not None
    assert not ends.refused[0]  # the end of text
    assert follow(COURSES.begin(closed), "x = f(2")
    assert COURSES.begin(closed).refused[0]


def test_a_sketch_that_cannot_be_a_grammar_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Template, "grammar", "start: /(/")
    with pytest.raises(RequestError, match="mode=cascade"):
        COURSES.begin(Template(("x",), (), 0.5))


@pytest.mark.timeout(60)
@pytest.mark.parametrize("between", ["", "_"])
def test_holes_with_many_readings_end_in_time(between: str) -> None:
    """Tried one after another, the readings of so many characters outlast any test."""
    many = Template(("", *[between] * 7, " ="), ("func",) * 8, 0.001)
    name = ("a" + between) * 60
    assert many.end_in(name + ":", is_over=True) is None
    assert many.end_in(name, is_over=False) is None
    assert many.end_in(f"{name}a =\nb", is_over=False) == len(name) + 3
    course = follow(COURSES.begin(many), name + "a =")
    assert course is not None
    assert course.is_accepting


@pytest.mark.timeout(120)
def test_the_limits_of_what_follows_a_sketch_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    many = Template(("",) * 40 + (" =",), ("func",) * 40, 0.001)
    letter = TOKENIZER.encode("a", add_special_tokens=False).ids[0]
    constraints._tell_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            course: Course | None = COURSES.begin(many)
            for _ in range(2000):
                course = None if course is None or course.refused.all() else course.after(letter)
            assert course is None
    assert len(caplog.records) == 1
    assert "lexer error" in caplog.text
    assert COURSES.begin(many).after(TOKENIZER.encode("+", add_special_tokens=False).ids[0]) is None
    assert len(caplog.records) == 1  # to leave the sketch is nothing of that kind


def test_behind_a_sketch_that_was_cut_anything_may_come() -> None:
    found = sketched("x = f(1)\ny.ast")
    cut = Template.of("", found.text, found.placeholders, 0.001, is_cut=True)
    begun = follow(COURSES.begin(cut), "x = f(20)")
    assert begun is not None
    assert not begun.is_free
    assert begun.refused[0]
    course = follow(begun, "\ny.astype(float)\nz")
    assert course is not None
    assert course.is_free
    assert cut.end_in("x = f(20)\ny.as", is_over=True) is None
    for text in ("x = f(20)\ny.ast", "x = f(20)\ny.astype(float)\nz"):
        assert cut.end_in(text, is_over=False) == len("x = f(20)\ny.ast")


def test_a_sketch_waits_for_no_other_to_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    slow, begun, done = Template(("slow",), (), 0.001), threading.Event(), threading.Event()
    compiled = llguidance.LLMatcher

    class Compiling:
        grammar_from_regex = staticmethod(compiled.grammar_from_regex)

        def __new__(cls, tokenizer: Any, grammar: str, **options: Any) -> Any:
            if grammar == slow.grammar:
                begun.set()
                assert done.wait(60)
            return compiled(tokenizer, grammar, **options)

    monkeypatch.setattr(constraints.llguidance, "LLMatcher", Compiling)
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(COURSES.begin, slow)
        try:
            assert begun.wait(60)
            pool.submit(COURSES.begin, Template(("quick",), (), 0.001)).result(20)
            assert not waiting.done()
        finally:
            done.set()
        assert waiting.result(60).known
