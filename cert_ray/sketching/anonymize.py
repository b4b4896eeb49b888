"""Source in, sketch out: replaces literals and names by placeholders, in one pass.

In: Python source text. Out: `Sketched` (the sketch as text, the spans of its placeholders, the source ranges they
stand for), or the `Dropped` that says why not. Outside placeholders, a sketch equals its source to the code point,
except for a space added where a placeholder would join a word (`return"a"if x` -> `return string if x`).

Four kinds: `constants` (CERT) replaces literals and the names at `def` and `class`; `names` (CERT-N) replaces
user-defined names (`names.py` says which); `both` (CERT-NC) replaces all of these; `released` does byte for byte what
the authors' code does, so about a quarter of its sketches do not parse. The other three parse if the source does:

- adjacent string literals become one placeholder, with the comments between them; a run with a part that stays (a
  triple-quoted one, `br''`) stays whole;
- literals in the patterns of `case` stay: a name there would capture;
- a prefixed triple-quoted docstring stays, as a plain one does. Other literals follow the released rule
  (`literals.py`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from itertools import accumulate
from typing import NamedTuple, cast

from cert_ray.errors import SketchError
from cert_ray.possessive import compile_pattern
from cert_ray.python_source import LineIndex, parse, refusal
from cert_ray.schemas import Dropped
from cert_ray.sketching.literals import COMMENT, STAYS, STRING_KINDS, Lexeme, is_word, scan
from cert_ray.sketching.names import find_names, pattern_ranges

PLACEHOLDER_KINDS: tuple[str, ...] = (
    "number",
    "float",
    "floatexponant",
    "complex",
    "string",
    "rawstring",
    "interstring",
    "interrawstring",
    "binarystring",
    "unicodestring",
    "func",
    "AnClass",
    "variable",  # these two only in the kinds `names` and `both`
    "argument",
)


class SketchKind(StrEnum):
    """What a sketch replaces: the ablations of the paper, and the authors' code to the byte."""

    CONSTANTS = "constants"
    NAMES = "names"
    BOTH = "both"
    RELEASED = "released"


class Placeholder(NamedTuple):
    """[start, end) in code points of the sketch; `kind` is a word of PLACEHOLDER_KINDS and also the placeholder's text.

    A named tuple, not a dataclass: sketching makes one per literal, and a tuple takes a third of the time.
    """

    start: int
    end: int
    kind: str


def moved(placeholders: Iterable[Placeholder], shift: int) -> list[Placeholder]:
    """The same placeholders, `shift` code points further on."""
    return [Placeholder(spot.start + shift, spot.end + shift, spot.kind) for spot in placeholders]


@dataclass(frozen=True, slots=True)
class Sketched:
    """A sketch: `placeholders[i]` of `text` stands for the source range `replaced[i]` (code points, half open)."""

    text: str
    placeholders: tuple[Placeholder, ...]
    replaced: tuple[tuple[int, int], ...]


def sketch(source: str, kind: str = "constants") -> str:
    """The sketch of `source` as text.

    Raises:
        SketchError: when this interpreter refuses `source`, or `kind` is not a `SketchKind`.
    """
    return sketch_spans(source, kind).text


def sketch_spans(source: str, kind: str = "constants") -> Sketched:
    """The sketch of `source` with the spans of its placeholders.

    Raises:
        SketchError: when this interpreter refuses `source`, or `kind` is not a `SketchKind`.
    """
    try:
        checked_kind = SketchKind(kind)
    except ValueError:
        allowed = ", ".join(SketchKind)
        raise SketchError(f"unknown kind of sketch {kind!r}: use one of {allowed}") from None
    outcome: Sketched | Dropped
    outcome = refusal(source) or sketch_source(source, checked_kind)
    if isinstance(outcome, Dropped):
        raise SketchError(f"only source that this Python parses has a sketch ({outcome.reason}: {outcome.detail})")
    return outcome


def sketch_source(source: str, kind: SketchKind) -> Sketched | Dropped:
    """The sketch of a source that is known to parse (`python_source.read_source` said so).

    `constants` and `released` scan without a parser: they do not notice that a source does not parse, and return some
    text. For `names` and `both`, and for files with `case`, the source is parsed here, and dropped if that fails.
    """
    if kind is SketchKind.RELEASED:
        return _splice(source, (lexeme for lexeme in scan(source) if lexeme[2] not in (COMMENT, STAYS)), released=True)
    found: Iterable[Lexeme]
    if kind is SketchKind.NAMES:
        found = (lexeme for lexeme in scan(source) if lexeme[2] in ("func", "AnClass"))
    else:
        found = _joined(source, scan(source))
        if _may_have_case(source):
            tree = parse(source)
            if isinstance(tree, Dropped):
                return tree
            found = _outside(found, pattern_ranges(tree, LineIndex(source)))
    if kind is not SketchKind.CONSTANTS:
        found = list(found)
        names = find_names(source, frozenset(start for start, _, word in found if word.startswith("inter")))
        if isinstance(names, Dropped):
            return names
        found = sorted([*found, *names])
    return _splice(source, found)


_BETWEEN_PARTS = compile_pattern(r"(?:[ \t\f\r\n]++|\\(?:\r\n?|\n)|#[^\r\n]*+)*+")
_CONTINUED_LINE = re.compile(r"\\(?:\r\n?|\n)")
_MAY_JOIN = frozenset(" \t\f\\\r\n#\"'rRbBuUfFtT")  # after a string: blanks, a comment, or the next string
_DOCSTRING_KINDS = frozenset({"rawstring", "unicodestring"})
_TRIPLE = frozenset({'"""', "'''"})


def _may_have_case(source: str) -> bool:
    """Whether lines start with `match` and with `case`. A false alarm only costs a parse."""
    return _starts_a_line("case", source) and _starts_a_line("match", source)


def _starts_a_line(word: str, source: str) -> bool:
    at = source.find(word)
    while at >= 0:
        before = at - 1
        while before >= 0 and source[before] in " \t\f":
            before -= 1
        after = source[at + len(word) : at + len(word) + 1]
        if (before < 0 or source[before] in "\r\n") and not (after and is_word(after)):
            return True
        at = source.find(word, at + 1)
    return False


def _joined(source: str, lexemes: Iterable[Lexeme]) -> Iterator[Lexeme]:
    """What `constants` replaces: each implicit concatenation as one lexeme, without those that stay."""
    brackets = _Brackets(source)
    skip = brackets.skips.append
    run: Lexeme | None = None
    for lexeme in lexemes:
        start, end, kind = lexeme
        if kind not in STRING_KINDS:
            if kind == COMMENT:
                skip(lexeme)
                continue
            if run:
                if run[2]:
                    yield run
                run = None
            yield lexeme
            continue
        if kind in _DOCSTRING_KINDS and source[start + 1 : start + 4] in _TRIPLE and _is_docstring(source, start):
            kind = STAYS
        if run:
            # A quick test first: most neighbours have a comma or a call between them.
            if source[run[1]] in _MAY_JOIN and brackets.join(source[run[1] : start], start):
                skip(lexeme)
                run = (run[0], end, _kind_of_run(run[2], kind))
                continue
            if run[2]:
                yield run
        skip(lexeme)
        run = (start, end, kind)
    if run and run[2]:
        yield run


def _kind_of_run(one: str, other: str) -> str:
    """The kind of two adjacent literals: if one stays, both do; otherwise an f-string decides."""
    if one == other or STAYS in (one, other):
        return one if one == other else STAYS
    if one.startswith("inter") or other.startswith("inter"):
        return "interstring"
    return "string"


class _Brackets:
    """Whether a position is inside brackets (outside, a newline ends the statement). Counted only on demand."""

    def __init__(self, source: str) -> None:
        self._source = source
        self.skips: list[Lexeme] = []  # strings and comments since the last count, to be appended in order
        self._counted = 0
        self._depth = 0

    def join(self, between: str, start: int) -> bool:
        """Whether two strings with `between` them, the second at `start`, are one implicit concatenation."""
        if not _BETWEEN_PARTS.fullmatch(between):
            return False
        rest = _CONTINUED_LINE.sub("", between)
        ends_line = "\n" in rest or "\r" in rest or "#" in rest  # a backslash in a comment continues nothing
        return not ends_line or self._inside(start)

    def _inside(self, position: int) -> bool:
        at, source = self._counted, self._source
        for start, end, _ in [*self.skips, (position, position, STAYS)]:
            code = source[at:start]
            self._depth += code.count("(") + code.count("[") + code.count("{")
            self._depth -= code.count(")") + code.count("]") + code.count("}")
            at = end
        self.skips.clear()
        self._counted = at
        return self._depth > 0


def _is_docstring(source: str, start: int) -> bool:
    """Whether a string starts a suite or the file: nothing precedes it on its line, only comments up to a colon."""
    line_at = max(source.rfind("\n", 0, start), source.rfind("\r", 0, start)) + 1
    while not source[line_at:start].strip():
        if line_at == 0:
            return True
        start = line_at - 1
        line_at = max(source.rfind("\n", 0, start), source.rfind("\r", 0, start)) + 1
        line = source[line_at:start].split("#", 1)[0].strip()
        if line:
            return line.endswith(":")
        start = line_at
    return False


def _outside(lexemes: Iterable[Lexeme], ranges: list[tuple[int, int]]) -> Iterator[Lexeme]:
    """The lexemes outside all of the sorted ranges."""
    index = 0
    for lexeme in lexemes:
        while index < len(ranges) and ranges[index][1] <= lexeme[0]:
            index += 1
        if index == len(ranges) or lexeme[0] < ranges[index][0]:
            yield lexeme


# What a placeholder cannot join with: nothing, or ASCII other than letters, digits and the underscore.
_SEPARATES_OR_NOTHING = frozenset(["", *(character for character in map(chr, range(128)) if not is_word(character))])


def _splice(source: str, found: Iterable[Lexeme], *, released: bool = False) -> Sketched:
    """Insert the placeholders, and a space where one would join a word. The released code instead loses form feeds."""
    lexemes = list(found)
    if not lexemes:
        return Sketched(without_form_feeds(source) if released else source, (), ())
    starts, ends, kinds = zip(*lexemes, strict=True)
    gaps = [source[end:start] for end, start in zip((0, *ends), (*starts, len(source)), strict=True)]
    if released:
        gaps = [without_form_feeds(gap) for gap in gaps]
    elif not _all_separate(gaps):
        gaps = [_apart(gap, index > 0, index < len(kinds)) for index, gap in enumerate(gaps)]
    parts = [""] * (len(gaps) + len(kinds))
    parts[::2], parts[1::2] = gaps, kinds
    offsets = list(accumulate(map(len, parts)))
    spans = zip(offsets[:-1:2], offsets[1::2], kinds, strict=True)
    return Sketched("".join(parts), tuple(map(_make_placeholder, spans)), tuple(zip(starts, ends, strict=True)))


# Makes a `Placeholder` from a tuple; calling `Placeholder(...)` runs a Python function, which is slower.
_make_placeholder = cast("Callable[[tuple[int, int, str]], Placeholder]", partial(tuple.__new__, Placeholder))


def _all_separate(gaps: Sequence[str]) -> bool:
    """Whether no placeholder between `gaps` would join a word. Two placeholders have an empty gap between them."""
    last = {gap[-1:] for gap in gaps[:-1]}
    return last | {gap[:1] for gap in gaps[1:]} <= _SEPARATES_OR_NOTHING


def _apart(gap: str, after: bool, before: bool) -> str:
    """`gap` with spaces to separate it from placeholders: it comes `after` one, `before` one, or both."""
    if after and gap[:1] not in _SEPARATES_OR_NOTHING:
        gap = " " + gap
    return gap + " " if before and gap[-1:] not in _SEPARATES_OR_NOTHING else gap


def without_form_feeds(code: str) -> str:
    """`code` as the released kind leaves it: form feeds stay only in strings and comments."""
    if "\f" not in code:
        return code
    out: list[str] = []
    last = 0
    for start, end, _ in scan(code):
        out += (code[last:start].replace("\f", ""), code[start:end])
        last = end
    return "".join([*out, code[last:].replace("\f", "")])
