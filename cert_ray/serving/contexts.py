"""The sketch of a context that ends anywhere: in an expression, after a colon, between brackets.

In: the prompt as the user sent it. Out: its `Sketched`, so that the sketcher reads when serving what it read in
training. There it saw sketches of whole files, so the sketch of a prompt must be the beginning of the sketch of every
file that begins with that prompt. A prompt seldom parses by itself, so it is completed (`return df[` becomes
`return df[_]`), sketched, and the completion is removed again.

If no completion parses, the longest run of leading lines that does is sketched, and the rest stays plain code. That
happens if the prompt is not Python 3, or ends inside a string, which then stays plain from its first line on. Without
any such lines, the prompt is its own sketch.
"""

from __future__ import annotations

import io
import tokenize
from collections.abc import Iterator
from typing import Final

from cert_ray.python_source import parse
from cert_ray.schemas import Dropped
from cert_ray.sketching import Placeholder, Sketched, SketchKind, sketch_source

_CLOSERS: Final = {"(": ")", "[": "]", "{": "}"}
# Attempts at ever shorter prefixes, each some twenty parses. Assumed: text with a syntax error before its last 32 lines
# is not Python 3.
_MAX_CUTS: Final = 32
# Characters in all those attempts, so that no prompt holds up the others for long: twenty times as many are parsed, at
# some megabytes a second. A prompt of 12 KB gets all its attempts.
_MOST_READ: Final = 400_000


def sketch_context(prompt: str, kind: SketchKind = SketchKind.CONSTANTS) -> Sketched:
    """The sketch of `prompt`, which may end anywhere. Never fails: at worst the text is its own sketch."""
    lines = prompt[: _open_string(prompt)].splitlines(keepends=True)
    for cut in range(min(len(lines), _MAX_CUTS, _MOST_READ // (len(prompt) + 1)) + 1):
        head = "".join(lines[: len(lines) - cut])
        if not head:
            break
        sketched = _sketch_prefix(head, kind)
        if sketched is not None:
            return Sketched(sketched.text + prompt[len(head) :], sketched.placeholders, sketched.replaced)
    return Sketched(prompt, (), ())


def _open_string(prompt: str) -> int | None:
    """Where the line that opens an unfinished multi-line string begins, if there is one.

    No completion ends it. Finding that out by cutting 32 lines one by one took half a second in a docstring.
    """
    try:
        for _ in _tokens(prompt):
            pass
    except tokenize.TokenError as error:
        problem, (row, _) = error.args
        if "string" in problem:
            return sum(len(line) + 1 for line in prompt.split("\n")[: row - 1])
    except SyntaxError:
        pass
    return None


def _tokens(text: str) -> Iterator[tokenize.TokenInfo]:
    """The tokens of `text` up to the first that is not one: for example, a quote that is not closed on its line.

    Python 3.11 would go on after it, and search the whole line for the end of each further quote: `'\\"` repeated took
    7 s for 10 KB, and four times that for twice as many.
    """
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.ERRORTOKEN and not token.string.isspace():
            return
        yield token


def _sketch_prefix(prefix: str, kind: SketchKind) -> Sketched | None:
    """The sketch of `prefix`, with the first completion that makes it parse."""
    for completion in _completions(prefix):
        completed = prefix + completion
        if isinstance(parse(completed), Dropped):
            continue
        sketched = sketch_source(completed, kind)
        if not isinstance(sketched, Dropped):
            head = _without_tail(sketched, prefix)
            if head is not None:
                return head
    return None


def _completions(prefix: str) -> Iterator[str]:
    """What may be written after `prefix` to make it parse, the likeliest first."""
    handlers = "".join(f"\n{indent}except: pass" for indent in _open_tries(prefix))
    yield from (ending + handlers for ending in _endings(prefix))


def _endings(prefix: str) -> Iterator[str]:
    """What may end the last statement of `prefix`."""
    closers = _open_brackets(prefix)
    operands = (closers, f" _{closers}")
    yield from operands
    code_line = next(_code_lines_backwards(prefix), "")
    indent = _indent(code_line)
    yield f"\n{indent} pass"  # after `def f():`, comments below it included
    yield from (f"{operand}: pass" for operand in operands)  # `if x`, `def f(a`, `while`
    yield f"=_{closers}: pass"  # `def f(a=1, b`
    yield f" in _{closers}: pass"  # `for i`
    yield f" _ in _{closers}: pass"  # `for`
    yield f" in _{closers}"  # `[x for i`
    yield f" _ in _{closers}"
    yield f" else _{closers}"  # `a if b`
    yield f" _ else _{closers}"
    yield f": _{closers}"  # `lambda x`, `{a: 1, b`
    yield from (f"{operand}\n{indent}def _(): pass" for operand in operands)  # a decorator
    yield " import _"
    yield f"{closers}(): pass"  # `def name`
    yield " _(): pass"  # `def`


def _open_tries(prefix: str) -> list[str]:
    """The indents of the `try` statements that enclose the end of `prefix`, innermost first."""
    indents: list[str] = []
    shallowest: int | None = None
    for line in _code_lines_backwards(prefix):
        indent = _indent(line)
        if shallowest is None or len(indent) < shallowest:
            shallowest = len(indent)
            if line.lstrip().startswith("try:"):
                indents.append(indent)
    return indents


def _code_lines_backwards(prefix: str) -> Iterator[str]:
    """The lines that hold more than blanks and a comment, from the last."""
    return (line for line in reversed(prefix.splitlines()) if line.strip() and not line.lstrip().startswith("#"))


def _indent(line: str) -> str:
    return line[: len(line) - len(line.lstrip())]


def _open_brackets(prefix: str) -> str:
    """What closes the brackets that are open at the end of `prefix`."""
    stack: list[str] = []
    try:
        for token in _tokens(prefix):
            if token.type == tokenize.OP and token.string in _CLOSERS:
                stack.append(_CLOSERS[token.string])
            elif token.type == tokenize.OP and stack and token.string == stack[-1]:
                stack.pop()
    except (tokenize.TokenError, SyntaxError):  # the end came early, as expected: what was read counts
        pass
    return "".join(reversed(stack))


def _without_tail(sketched: Sketched, prefix: str) -> Sketched | None:
    """The part of a completed prefix's sketch that belongs to `prefix`; None when a placeholder spans its end."""
    inside = sum(end <= len(prefix) for _, end in sketched.replaced)
    if any(start < len(prefix) < end for start, end in sketched.replaced):
        return None
    placeholders: tuple[Placeholder, ...] = sketched.placeholders[:inside]
    replaced = sketched.replaced[:inside]
    source_from = replaced[-1][1] if replaced else 0
    sketch_from = placeholders[-1].end if placeholders else 0
    tail = prefix[source_from:]
    # Sketching puts a space after a placeholder that would join the next word, and `released` loses form feeds.
    endings = (tail, " " + tail, tail.replace("\f", ""))
    shown = next((ending for ending in endings if sketched.text.startswith(ending, sketch_from)), tail)
    return Sketched(sketched.text[:sketch_from] + shown, placeholders, replaced)
