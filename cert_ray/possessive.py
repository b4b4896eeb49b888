"""Patterns with possessive groups, `(?:...)*+`, that match the same on every Python from 3.11 on.

In: a pattern as for `re.compile`. Out: the compiled pattern. Before 3.11.5 (Debian 12 has 3.11.2), `re` forgets to step
back when a round of a possessive group fails halfway: `(?:ab?c)*+` matches the `a` of `a` (CPython's issues 100061 and
106052). There, such a group becomes a greedy group in an atomic one, which CPython's documentation calls equivalent and
which keeps a stack entry per round. Possessive repeats of one character were never wrong.
"""

from __future__ import annotations

import re
import sys
from typing import Any

_WRONG = sys.version_info < (3, 11, 5)


def compile_pattern(pattern: str, flags: int = 0) -> re.Pattern[str]:
    """`re.compile(pattern, flags)`. If `re` has the fault, the result has no `.pattern` and cannot be pickled."""
    return _without_possessive_groups(pattern, flags) if _WRONG else re.compile(pattern, flags)


def _without_possessive_groups(pattern: str, flags: int = 0) -> re.Pattern[str]:
    # Private names, used only on versions that are released and will not change.
    from re import _compiler, _constants, _parser  # type: ignore[attr-defined]

    def rewrite(found: Any) -> Any:
        if isinstance(found, _parser.SubPattern):
            found.data = [rewrite(node) for node in found.data]
            return found
        if isinstance(found, list):
            return [rewrite(node) for node in found]
        if not isinstance(found, tuple):
            return found
        node = tuple(rewrite(part) for part in found)
        if node[0] is not _constants.POSSESSIVE_REPEAT or _compiler._simple(node[1][2]):
            return node
        greedy = _parser.SubPattern(node[1][2].state, [(_constants.MAX_REPEAT, node[1])])
        return _constants.ATOMIC_GROUP, greedy

    return _compiler.compile(rewrite(_parser.parse(pattern, flags)), flags)  # type: ignore[no-any-return]
