"""Where an f-string (or a 3.14 t-string) ends, and which parts of it are code.

In: source text and the position of an opening quote. Out: the end of the literal, and the stretches of code in its
replacement fields, including those of nested f-strings, without strings and comments.

Follows PEP 701 (fields may hold the outer quotes, comments, newlines and further f-strings); f-strings that older
interpreters accept mean the same under it. Assumes that the source parses; otherwise the end may be the end of the
text.
"""

from __future__ import annotations

import re

from cert_ray.possessive import compile_pattern

# What matters in literal text and in a format specification. `\N{DASH}` is not a field; `\{` opens one.
_TEXT = re.compile(r"\\N\{[^{}]*\}|\\[^{}]|\{\{|\}\}|[{}]|'''|\"\"\"|['\"]", re.DOTALL)
_RAW_TEXT = re.compile(r"\\[^{}]|\{\{|\}\}|[{}]|'''|\"\"\"|['\"]", re.DOTALL)
# What matters in a replacement field.
_CODE = re.compile(r"([A-Za-z]*)('''|\"\"\"|['\"])|#[^\r\n]*|!=|[(\[{)\]}:!]|[0-9A-Za-z_\x80-\U0010ffff]+")
_PLAIN = {
    '"': compile_pattern(r'[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL),
    "'": compile_pattern(r"[^'\\]*+(?:\\.[^'\\]*+)*+'", re.DOTALL),
    '"""': compile_pattern(r'[^"\\]*+(?:(?:\\.|"(?!""))[^"\\]*+)*+"""', re.DOTALL),
    "'''": compile_pattern(r"[^'\\]*+(?:(?:\\.|'(?!''))[^'\\]*+)*+'''", re.DOTALL),
}

Stretches = list[tuple[int, int]]


def read_fstring(source: str, quote_at: int, *, raw: bool) -> tuple[int, Stretches]:
    """The end (after the closing quote) of the f-string whose opening quote is at `quote_at`, and its code."""
    quote = source[quote_at : quote_at + 3]
    quote = quote if quote in ("'''", '"""') else quote[0]
    code: Stretches = []
    end = _read_text(source, quote_at + len(quote), quote, raw=raw, in_format=False, code=code)
    return end, code


def _read_text(source: str, at: int, quote: str, *, raw: bool, in_format: bool, code: Stretches) -> int:
    """Read literal text through `quote`, or a format specification through the `}` that ends its field."""
    pattern = _RAW_TEXT if raw else _TEXT
    while match := pattern.search(source, at):
        token, at = match[0], match.end()
        if token == quote:
            return at
        if token[0] == quote:  # three quotes, the first of which ends a single-quoted string
            return match.start() + 1
        if token == "{":
            at = _read_field(source, at, quote, raw=raw, code=code)
        elif in_format and token[0] == "}":
            return match.start() + 1
        elif in_format and token == "{{":
            at = _read_field(source, match.start() + 1, quote, raw=raw, code=code)
        elif len(token) == 3 and token[0] in "'\"":
            at = match.start() + 1  # three of the other quote: our quote may start inside the match
    return len(source)


def _read_field(source: str, at: int, quote: str, *, raw: bool, code: Stretches) -> int:
    """Read a replacement field, from after its `{` to after its `}`."""
    depth, start = 0, at
    while match := _CODE.search(source, at):
        token, at = match[0], match.end()
        if match[2]:
            code.append((start, match.start()))
            start = at = _read_string(source, match[1].lower(), match[2], at, code)
        elif token[0] == "#":
            code.append((start, match.start()))
            start = at
        elif token in "([{":
            depth += 1
        elif depth and token in ")]}":
            depth -= 1
        elif not depth and token in ("}", ":", "!"):
            code.append((start, match.start()))
            if token == "!":  # a conversion: `!r`, then `:` or `}`
                conversion = _CONVERSION.match(source, at)
                at = conversion.end() if conversion else at
                token = source[at - 1]
            return at if token == "}" else _read_text(source, at, quote, raw=raw, in_format=True, code=code)
    return len(source)


_CONVERSION = re.compile(r"\s*\w+\s*[:}]")


def _read_string(source: str, prefix: str, quote: str, at: int, code: Stretches) -> int:
    if "f" in prefix or "t" in prefix:
        return _read_text(source, at, quote, raw="r" in prefix, in_format=False, code=code)
    end = _PLAIN[quote].match(source, at)
    return end.end() if end else len(source)
