"""Which libraries files and prompts use: counts over files, the choice of one library's files, what a prompt imports.

In: the `libraries` column of documents (top-level packages that a file imports, guarded and local imports included).
A library's files are those that import it under that name. This is the project's own definition, since the paper's
filter was not published. `importlib.import_module("x")` counts, too; use through another package does not.
"""

from __future__ import annotations

import bisect
import re
from collections import Counter, defaultdict
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

# A line that imports, as far as one can tell in a prompt that ends anywhere and so seldom parses.
# Possessive, so that a long word without `import` after it is not retried letter by letter: 40 s for 20 KB of it.
_BEGIN = r"(?:^[ \t]*+(?:>>>[ \t]*+)?(?:try[ \t]*+:[ \t]*+)?|;[ \t]*+)"  # the beginning of a statement that may import
_FROM = re.compile(_BEGIN + r"from[ \t]+(\w++)[\w.]*+[ \t]+import\b[ \t]*+(\([\w\s,]*+|[\w \t,]*+)", re.MULTILINE)
_IMPORT = re.compile(_BEGIN + r"import[ \t]+(\w[\w. \t,]*)", re.MULTILINE)
_USE = re.compile(r"\b(\w++)([.(\[])")
_PART = re.compile(r"(\w+)(?:\.\w+)*(?:\s+as\s+(\w+))?")


def library_counts(libraries: pa.ChunkedArray) -> dict[str, int]:
    """Files by imported package, most frequent first, then by name."""
    counted = pc.value_counts(pc.list_flatten(libraries)).to_pylist()
    counts = {entry["values"]: entry["counts"] for entry in counted}
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def uses_any(libraries: pa.ChunkedArray, names: Sequence[str]) -> pa.BooleanArray:
    """For each file whether it imports one of `names`."""
    used = pc.is_in(pc.list_flatten(libraries), value_set=pa.array(list(names), pa.string()))
    rows = pc.unique(pc.list_parent_indices(libraries).filter(used))
    return pc.is_in(pa.array(range(len(libraries)), rows.type), value_set=rows)


def imported_libraries(prompt: str) -> Counter[str]:
    """Top-level packages that `prompt` imports, each with its number of imports and of uses of the names they bind.

    Time depends only on the prompt's length: a prompt may be a megabyte of imports.
    """
    of_modules: dict[str, list[int]] = defaultdict(list)  # positions of a name before a dot
    of_names: dict[str, list[int]] = defaultdict(list)  # positions of a name in use that is not an attribute
    for use in _USE.finditer(prompt):
        if use[2] == ".":
            of_modules[use[1]].append(use.start())
        if prompt[use.start() - 1 : use.start()] != ".":
            of_names[use[1]].append(use.start())
    uses: Counter[str] = Counter()
    for match in _FROM.finditer(prompt):
        uses[match[1]] += 1 + sum(_behind(match, of_names.get(name, ())) for name in _bound(match[2]))
    for match in _IMPORT.finditer(prompt):
        for library, alias in _PART.findall(match[1]):
            uses[library] += 1 + _behind(match, of_modules.get(alias or library, ()))
    return uses


def _bound(imported: str) -> set[str]:
    """The names that the list after `import` binds."""
    return {alias or name for name, alias in _PART.findall(imported)}


def _behind(match: re.Match[str], places: Sequence[int]) -> int:
    """How many of `places` come after the match."""
    return len(places) - bisect.bisect_left(places, match.end())
