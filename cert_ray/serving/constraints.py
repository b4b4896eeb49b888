r"""A sketch as a constraint on an answer: its fixed text must come, its placeholders are holes for literals and names.

In: the sketch that won, as a `Template`. Out: for each beginning of an answer, the tokens that may come next. That is
llguidance's work, over bytes: one regular expression holds the whole template, so where a token ends has no say in
where a hole ends. A token may close a string and go on with the fixed text (`').`), or open it (`['`); both are drawn
as the model likes them. Where fixed text can be spelled in the tokenizer's own way only, its tokens are known ahead
(`Course.known`), up to those that what follows may join.

A hole ends where its literal does. By kind: digits, a float, ..., a string in its quotes on one line, with its prefix,
or several with a blank between; a plain name for `func`, `AnClass`, `variable` and `argument`, which may be a keyword.
A part of it has at most `_LONGEST` characters, after which only its end may come; so every hole ends. An answer ends
with the sketch's last character, or with the line where the sketch ends in a hole.

A template says what must come, not whether the model would write it: `least_share` is the least probability that the
model may give to all the tokens together that may come, among those that could come without the template. Below, the
model wants to go elsewhere, and a sample is let go: from there on it is drawn freely. See `joint.py`.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Final

import llguidance
import numpy as np
import torch
from tokenizers import Tokenizer

from cert_ray.errors import RequestError
from cert_ray.sketching import Placeholder

_LONGEST: Final = 200  # characters of a literal's part; assumed

_NAME = rf"[A-Za-z_][0-9A-Za-z_]{{0,{_LONGEST}}}"
_DIGITS = rf"[0-9](?:_?[0-9]){{0,{_LONGEST}}}"
_WHOLE = rf"(?:0|[1-9](?:_?[0-9]){{0,{_LONGEST}}})"
_FLOAT = rf"(?:{_DIGITS}\.(?:{_DIGITS})?|\.{_DIGITS})"
_QUOTED = (
    rf"(?:'(?:[^'\\\r\n]|\\(?s:.)){{0,{_LONGEST}}}'"
    rf'|"(?:[^"\\\r\n]|\\(?s:.)){{0,{_LONGEST}}}")'
)


def _strings(prefix: str) -> str:
    """String literals with one of some prefixes, side by side."""
    return rf"(?:{prefix}{_QUOTED}(?: {prefix}{_QUOTED}){{0,8}})"


# Those that `sketching.literals` gives these words; what it leaves in place (hexadecimals, three quotes) fills no hole.
_HOLES: Final = {
    "number": _WHOLE,
    "float": _FLOAT,
    "floatexponant": rf"(?:{_FLOAT}|{_DIGITS})[eE][-+]?{_DIGITS}",
    "complex": rf"(?:{_FLOAT}|{_DIGITS})[jJ]",
    "string": _strings(""),
    "rawstring": _strings("[rR]"),
    "interstring": _strings("[fF]"),
    "interrawstring": _strings("(?:[fF][rR]|[rR][fF])"),
    "binarystring": _strings("[bB]"),
    "unicodestring": _strings("[uU]"),
    "func": _NAME,
    "AnClass": _NAME,
    "variable": _NAME,
    "argument": _NAME,
}


@dataclass(frozen=True)
class Template:
    """Fixed text around holes: `fixed[0] kinds[0] fixed[1] ... fixed[-1]`, one piece more than there are holes."""

    fixed: tuple[str, ...]
    kinds: tuple[str, ...]
    least_share: float

    @classmethod
    def of(cls, start: str, text: str, placeholders: Sequence[Placeholder], least_share: float) -> Template:
        """The template of a sketch that stands behind `start`."""
        ends = [0, *(place.end for place in placeholders)]
        starts = [*(place.start for place in placeholders), len(text)]
        fixed = [text[end:begin] for end, begin in zip(ends, starts, strict=True)]
        return cls((start + fixed[0], *fixed[1:]), tuple(place.kind for place in placeholders), least_share)

    @cached_property
    def pattern(self) -> str:
        """What an answer looks like, as a regular expression of Python's and of Rust's."""
        holes = (*(f"({_HOLES[kind]})" for kind in self.kinds), "")
        return "".join(_escape(piece) + hole for piece, hole in zip(self.fixed, holes, strict=True))

    @cached_property
    def _answer(self) -> re.Pattern[str]:
        return re.compile(self.pattern)

    def end_in(self, text: str, *, is_over: bool) -> int | None:
        """Where the answer that `text` begins with ends; None when it is not whole.

        `is_over`: nothing follows `text`, so that a hole at its end is one that ended.
        """
        found = self._answer.match(text)
        if found is None:
            return None
        behind = text[found.end() : found.end() + 1]
        whole = behind == "\n" or (not behind and (is_over or bool(self.fixed[-1])))
        return found.end() if whole else None

    @property
    def grammar(self) -> str:
        """For llguidance. What stands behind the answer begins with a line break, which its last token may hold."""
        return str(llguidance.LLMatcher.grammar_from_regex(rf"{self.pattern}(?:\n(?s:.)*)?"))


def _escape(text: str) -> str:
    """`text` as a regular expression that both dialects read alike."""
    return "".join(one if one.isalnum() or ord(one) > 127 else f"\\x{ord(one):02x}" for one in text)


class Course:
    """What a template still asks for, after some tokens of an answer. Unchanging."""

    def __init__(self, matcher: Any, vocab_size: int, end_ids: frozenset[int]) -> None:
        self._matcher, self._vocab_size, self._end_ids = matcher, vocab_size, end_ids

    @cached_property
    def refused(self) -> torch.Tensor:
        """The tokens that must not come next, bool [V]."""
        packed = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed_V = np.unpackbits(packed, bitorder="little")[: self._vocab_size].astype(bool)
        allowed_V[list(self._end_ids)] = self._matcher.is_accepting()
        return torch.from_numpy(~allowed_V)

    @cached_property
    def known(self) -> tuple[int, ...]:
        """The tokens that come next whatever the model says; none where it has a choice."""
        return tuple(self._matcher.compute_ff_tokens())

    def after(self, token: int) -> Course | None:
        """The course after one more token; None where the template cannot be followed further."""
        matcher = self._matcher.deep_copy()
        if not matcher.consume_token(token):
            return None
        return Course(matcher, self._vocab_size, self._end_ids)


class Courses:
    """Begins courses for one model. Reading its tokenizer takes a second or two, once. Safe to call from threads."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_ids: frozenset[int]) -> None:
        self._tokenizer, self._vocab_size, self._end_ids = tokenizer, vocab_size, end_ids
        self._lock = threading.Lock()
        self._known: Any = None
        self._begun = lru_cache(maxsize=64)(self._begin)

    def begin(self, template: Template) -> Course:
        """The course at the beginning of an answer.

        Raises:
            RequestError: 400, when the tokenizer or the sketch is none that llguidance can read.
        """
        with self._lock:
            return self._begun(template)

    def _begin(self, template: Template) -> Course:
        try:
            if self._known is None:
                ends = sorted(self._end_ids) or None
                self._known = llguidance.LLTokenizer(self._tokenizer.to_str(), n_vocab=self._vocab_size, eos_token=ends)
            matcher = llguidance.LLMatcher(self._known, template.grammar, log_level=0)
        except ValueError as error:
            raise _unsupported(str(error)) from error
        if matcher.is_error():
            raise _unsupported(matcher.get_error())
        return Course(matcher, self._vocab_size, self._end_ids)


def _unsupported(problem: str) -> RequestError:
    return RequestError(400, f"mode constrained: {problem}. Ask for mode=cascade.", "mode", "unsupported_value")
