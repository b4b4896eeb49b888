r"""A sketch as a constraint on an answer: its fixed text must come, its placeholders are holes for literals and names.

In: the winning sketch, as a `Template`. Out: for each beginning of an answer, the tokens that may come next. llguidance
works these out, over bytes: one regular expression holds the whole template, so a token need not end where a hole ends.
A token may close a string and go on with the fixed text (`').`), or open it (`['`); both are drawn as the model likes
them. Where fixed text can be spelled only in the tokenizer's own way, its tokens are known ahead (`Course.known`), up
to those that may merge with what follows.

A hole ends where its literal does. By kind, it takes digits, a float, ..., a string in its quotes on one line, with its
prefix, or several with a blank between; a plain name for `func`, `AnClass`, `variable` and `argument`, which may be a
keyword. A part of it has at most `_LONGEST` characters, after which only its end may come; so every hole ends. An
answer ends with the sketch's last character or, if the sketch ends in a hole, with the line. A sketch that was cut for
its length (`is_cut`) ends no answer: after its last character, an answer is drawn freely.

Where holes stand side by side, or what separates them may also stand in them, one answer has many readings. llguidance
follows all of them at once, within limits of its own; this module does not try them one after another.

A template says what must come, not whether the model would write it. `least_share` is the least probability that the
model may give to all allowed tokens together, among those that could come without the template. Below it, the model
wants to go elsewhere, and the sample is let go: it is drawn freely from there on. See `joint.py`.
"""

from __future__ import annotations

import logging
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

_log = logging.getLogger(__name__)

_LONGEST: Final = 200  # characters of one part of a literal; assumed

_NAME = rf"[A-Za-z_][0-9A-Za-z_]{{0,{_LONGEST}}}"
_DIGITS = rf"[0-9](?:_?[0-9]){{0,{_LONGEST}}}"
_WHOLE = rf"(?:0|[1-9](?:_?[0-9]){{0,{_LONGEST}}})"
_FLOAT = rf"(?:{_DIGITS}\.(?:{_DIGITS})?|\.{_DIGITS})"
_QUOTED = (
    rf"(?:'(?:[^'\\\r\n]|\\(?s:.)){{0,{_LONGEST}}}'"
    rf'|"(?:[^"\\\r\n]|\\(?s:.)){{0,{_LONGEST}}}")'
)


def _strings(prefix: str) -> str:
    """String literals with a given prefix, side by side."""
    return rf"(?:{prefix}{_QUOTED}(?: {prefix}{_QUOTED}){{0,8}})"


# The literals that `sketching.literals` replaces by these words. Those it leaves (hexadecimals, three quotes) fill no
# hole.
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
    is_cut: bool = False  # the sketch was cut for its length: more comes after it

    @classmethod
    def of(
        cls, start: str, text: str, placeholders: Sequence[Placeholder], least_share: float, *, is_cut: bool = False
    ) -> Template:
        """The template of a sketch that follows `start`."""
        ends = [0, *(place.end for place in placeholders)]
        starts = [*(place.start for place in placeholders), len(text)]
        fixed = [text[end:begin] for end, begin in zip(ends, starts, strict=True)]
        return cls((start + fixed[0], *fixed[1:]), tuple(place.kind for place in placeholders), least_share, is_cut)

    @cached_property
    def pattern(self) -> str:
        """The form of an answer, as a regular expression for llguidance."""
        holes = (*(f"({_HOLES[kind]})" for kind in self.kinds), "")
        return "".join(_escape(piece) + hole for piece, hole in zip(self.fixed, holes, strict=True))

    def end_in(self, text: str, *, is_over: bool) -> int | None:
        """Where the answer that `text` begins with ends, or the part of it that `is_cut` left; None if it is not whole.

        With `is_over`, nothing follows `text`, so a hole at its end has ended. Time grows with the text alone and is
        bounded by llguidance's limits; a text that exceeds these counts as not whole.
        """
        matcher = _over_bytes(self.pattern).deep_copy()
        for place, character in enumerate(text):
            if (self.is_cut or character == "\n") and matcher.is_accepting():
                return place
            if not matcher.consume_tokens(list(character.encode())):
                return None
        ends = is_over or self.is_cut or bool(self.fixed[-1])
        return len(text) if ends and matcher.is_accepting() else None

    @property
    def grammar(self) -> str:
        """For llguidance. Text after the answer begins with a line break, which the answer's last token may hold."""
        behind = r"(?s:.)*" if self.is_cut else r"(?:\n(?s:.)*)?"
        return str(llguidance.LLMatcher.grammar_from_regex(self.pattern + behind))


@lru_cache(maxsize=64)
def _over_bytes(pattern: str) -> Any:
    """A matcher of `pattern` byte by byte, at its beginning. Copy it before feeding it."""
    grammar = llguidance.LLMatcher.grammar_from_regex(pattern)
    return llguidance.LLMatcher(_byte_tokenizer(), grammar, log_level=0)


@lru_cache(maxsize=1)
def _byte_tokenizer() -> Any:
    return llguidance.LLTokenizer("byte")  # its token numbers are the bytes


def _escape(text: str) -> str:
    """`text` as a regular expression that matches it literally."""
    return "".join(one if one.isalnum() or ord(one) > 127 else f"\\x{ord(one):02x}" for one in text)


class Course:
    """What a template still asks for, after some tokens of an answer. Immutable.

    llguidance stops at limits of its own (many holes that can be read in many ways). What may come is unknown from
    there on, so the sample is let go as if the model wanted to go elsewhere, and this is logged.
    """

    def __init__(self, matcher: Any, vocab_size: int, end_ids: frozenset[int], *, is_cut: bool) -> None:
        self._matcher, self._vocab_size, self._end_ids, self._is_cut = matcher, vocab_size, end_ids, is_cut

    @cached_property
    def is_accepting(self) -> bool:
        """Whether the tokens hold a whole answer, although its last hole may go on."""
        return bool(self._matcher.is_accepting())

    @property
    def is_free(self) -> bool:
        """Whether all that a cut sketch asks for has come, so that anything may follow."""
        return self._is_cut and self.is_accepting

    @cached_property
    def refused(self) -> torch.Tensor:
        """The tokens that must not come next, bool [V]."""
        packed = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed_V = np.unpackbits(packed, bitorder="little")[: self._vocab_size].astype(bool)
        if self._matcher.is_error():
            _tell_limit(self._matcher.get_error())
        allowed_V[list(self._end_ids)] = self.is_accepting
        return torch.from_numpy(~allowed_V)

    @cached_property
    def known(self) -> tuple[int, ...]:
        """The tokens that must come next; none where the model has a choice."""
        return tuple(self._matcher.compute_ff_tokens())

    def after(self, token: int) -> Course | None:
        """The course after one more token; None where the template cannot be followed any further."""
        if self.is_free:
            return self
        matcher = self._matcher.deep_copy()
        if not matcher.consume_token(token):
            if not self.refused[token]:
                _tell_limit(matcher.get_error())
            return None
        return Course(matcher, self._vocab_size, self._end_ids, is_cut=self._is_cut)


def _tell_limit(error: str) -> None:
    _tell_once(error.partition("\n")[0])  # the rest is llguidance's state


@lru_cache(maxsize=64)
def _tell_once(problem: str) -> None:
    _log.warning("a sample cannot follow its sketch any further and is drawn freely: llguidance: %s", problem)


class Courses:
    """Begins courses for one model. Reading its tokenizer takes a second or two, once. Thread-safe."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_ids: frozenset[int]) -> None:
        self._tokenizer, self._vocab_size, self._end_ids = tokenizer, vocab_size, end_ids
        self._lock = threading.Lock()
        self._known: Any = None
        self._begun = lru_cache(maxsize=64)(self._begin)

    def begin(self, template: Template) -> Course:
        """The course at the beginning of an answer.

        Raises:
            RequestError: 400, when llguidance cannot read the tokenizer or the sketch.
        """
        _over_bytes(template.pattern)  # compiled here, not where all requests wait
        return self._begun(template)

    def _begin(self, template: Template) -> Course:
        try:
            matcher = llguidance.LLMatcher(self._read_tokenizer(), template.grammar, log_level=0)
        except ValueError as error:
            raise _unsupported(str(error)) from error
        if matcher.is_error():
            raise _unsupported(matcher.get_error())
        return Course(matcher, self._vocab_size, self._end_ids, is_cut=template.is_cut)

    def _read_tokenizer(self) -> Any:
        with self._lock:  # read once; sketches are compiled side by side
            if self._known is None:
                ends = sorted(self._end_ids) or None
                self._known = llguidance.LLTokenizer(self._tokenizer.to_str(), n_vocab=self._vocab_size, eos_token=ends)
            return self._known


def _unsupported(problem: str) -> RequestError:
    return RequestError(400, f"mode constrained: {problem}. Ask for mode=cascade.", "mode", "unsupported_value")
