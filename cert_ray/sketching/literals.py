r"""One left-to-right scan over Python source: its literals and the names after `def` and `class`.

In: source that parses. Out: `Lexeme`s in source order. No parser is involved: a scan of strings, comments, numbers and
words is exact for these, and several times faster than `ast.parse` (figures in docs/benchmarks.md).

The placeholder words, and what stays, are those of the released CERT code: unprefixed triple-quoted strings, plain
strings that hold three quotes, `br''`, hexadecimal, octal and binary integers and `1e3j` stay.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator

from cert_ray.possessive import compile_pattern
from cert_ray.sketching.fstrings import read_fstring

# (start, end, kind): kind is a word of PLACEHOLDER_KINDS, or one of the two below. A plain tuple, because there is one
# per literal in 96 GB of text.
Lexeme = tuple[int, int, str]
STAYS = ""  # a string that no kind of sketch replaces
COMMENT = "#"

STRING_KINDS = frozenset(
    {"string", "rawstring", "interstring", "interrawstring", "binarystring", "unicodestring", STAYS}
)

# Since 3.12 (PEP 701) an f-string's fields may hold its own quotes, so the plain string pattern can end too early.
NESTED_FSTRINGS = sys.version_info >= (3, 12)

# Every alternative starts with a fixed character or set, so that `re` can skip to the next candidate. Possessive
# quantifiers keep the time linear for a megabyte on one line. Outside strings and comments, all non-ASCII characters
# are part of identifiers (`\w` would miss combining marks). Words are matched so that their digits are not taken for
# numbers, and consecutive words in one match (measured on installed packages: 106 MB per CPU-second, 61 with a match
# per word).
WORD = r"[A-Za-z_\x80-\U0010ffff][0-9A-Za-z_\x80-\U0010ffff]*+"
_SIGNS = r"[^0-9A-Za-z_\x80-\U0010ffff\"'\#.]"
_LEXEME = compile_pattern(
    rf"""\#[^\r\n]*+
    |"(?:""[^"\\]*+(?:(?:\\.|"(?!""))[^"\\]*+)*+\"""|[^"\\\r\n]*+(?:\\(?:\r\n|.)[^"\\\r\n]*+)*+")
    |'(?:''[^'\\]*+(?:(?:\\.|'(?!''))[^'\\]*+)*+'''|[^'\\\r\n]*+(?:\\(?:\r\n|.)[^'\\\r\n]*+)*+')
    |[0-9](?:[xXoObB][0-9a-fA-F_]++[lL]?|[0-9_]*+\.?[0-9_]*+(?:[eE][-+]?[0-9][0-9_]*+)?[jJlL]?)
    |\.[0-9][0-9_]*+(?:[eE][-+]?[0-9][0-9_]*+)?[jJ]?
    |(?:def|class)(?:[\ \t\f]|\\(?:\r\n?|\n))++({WORD})
    |{WORD}(?:(?:\.|{_SIGNS}++)(?!(?:def|class)[\ \t\f\\]){WORD})*+{_SIGNS}*+""",
    re.VERBOSE | re.DOTALL,
)


def _prefixes() -> dict[str, str]:
    """The placeholder word for each string prefix, in any case and order of letters."""
    words = {"": "string", "r": "rawstring", "u": "unicodestring", "b": "binarystring"}
    words |= {"f": "interstring", "t": "interstring"}
    words |= {"fr": "interrawstring", "rf": "interrawstring", "tr": "interrawstring", "rt": "interrawstring"}
    words |= {"br": STAYS, "rb": STAYS}
    cased = {}
    for prefix, word in words.items():
        for first in {prefix[:1], prefix[:1].upper()}:
            for second in {prefix[1:], prefix[1:].upper()}:
                cased[first + second] = word
    return cased


_KIND_OF_PREFIX = _prefixes()
_PREFIX_ENDS = frozenset(prefix[-1] for prefix in _KIND_OF_PREFIX if prefix)


def number_kind(literal: str) -> str:
    """The placeholder word of a number, or STAYS if the released code leaves it."""
    lower = literal.lower()
    if lower[:2] in ("0x", "0o", "0b") or lower[-1] == "l":
        return STAYS
    if lower[-1] == "j":
        return STAYS if "e" in lower else "complex"
    if "e" in lower:
        return "floatexponant"
    if "." in lower:
        return "float"
    if len(lower) > 1 and lower[0] == "0" and lower.strip("0_"):  # 0777 is Python 2
        return STAYS
    return "number"


def scan(source: str, *, nested_fstrings: bool = NESTED_FSTRINGS) -> Iterator[Lexeme]:
    """Literals (with string prefixes), definition names and comments of `source`, in order."""
    numbers: dict[str, str] = {}  # cached: a file repeats the same few numbers
    at = 0
    while True:  # repeats only after an f-string that ends later than the pattern says
        for match in _LEXEME.finditer(source, at):
            text = match[0]
            first = text[0]
            if first >= "A":
                if match.lastindex:
                    yield match.start(1), match.end(), "func" if first == "d" else "AnClass"
            elif first >= ".":
                kind = numbers.get(text)
                if kind is None:
                    kind = numbers[text] = number_kind(text)
                if kind:
                    yield match.start(), match.end(), kind
            elif first == "#":
                yield match.start(), match.end(), COMMENT
            else:
                start, end = match.span()
                prefix = _prefix_before(source, start) if source[start - 1 : start] in _PREFIX_ENDS else ""
                if prefix:
                    if nested_fstrings and "{" in text and _interpolates(prefix):
                        true_end, _ = read_fstring(source, start, raw="r" in prefix.lower())
                        if true_end != end:
                            yield start - len(prefix), true_end, _KIND_OF_PREFIX[prefix]
                            at = true_end
                            break
                    yield start - len(prefix), end, _KIND_OF_PREFIX[prefix]
                elif '"""' in text or "'''" in text:
                    yield start, end, STAYS
                else:
                    yield start, end, "string"
        else:
            return


def _prefix_before(source: str, quote_at: int) -> str:
    """The word that ends at a quote if it is a string prefix, else the empty string."""
    for size in (2, 1):
        start = quote_at - size
        if start >= 0 and source[start:quote_at] in _KIND_OF_PREFIX:
            return "" if start and is_word(source[start - 1]) else source[start:quote_at]
    return ""


def is_word(character: str) -> bool:
    """Whether a character of code, outside strings and comments, is part of a word or number."""
    return character.isalnum() or character == "_" or character >= "\x80"


def _interpolates(prefix: str) -> bool:
    return _KIND_OF_PREFIX[prefix].startswith("inter")
