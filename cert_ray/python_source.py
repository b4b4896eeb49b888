"""One pass over a Python file: the syntax check, and the facts that later stages share.

In: decoded source text. Out: `SourceFacts` (blocks of top-level statements, functions, imported packages), or the
`Dropped` that says why the running interpreter refuses the text. Offsets are code points; `byte_offsets` turns them
into the UTF-8 bytes that the schemas store.

"Parses" means `ast.parse` of the running interpreter. Symbol-table and compile errors (`return` outside a function)
are not detected. `sketching` handles literals and names, `quality` scores.
"""

from __future__ import annotations

import ast
import gc
import re
import symtable
import warnings
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

import numpy as np

from cert_ray.schemas import Dropped, DropReason, StatementKind

FunctionBody = Literal["empty", "plain", "docstring", "docstring_with_example"]
FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True)
class Statement:
    """A block: a run of top-level statements without a blank line between them. [start, end) in code points."""

    start: int
    end: int
    kind: StatementKind


@dataclass(frozen=True, slots=True)
class FunctionFacts:
    """What the quality scores need to know of one `def`; methods and nested functions count, too."""

    name: str
    body: FunctionBody
    calls_unittest_assert: bool


@dataclass(frozen=True, slots=True)
class SourceFacts:
    """Everything found in one parse. `functions` are in source order; `imports` are sorted top-level package names.

    They come from absolute imports anywhere in the file (guarded, local, `TYPE_CHECKING`), and from `import_module` and
    `__import__` with a constant.
    """

    statements: tuple[Statement, ...]
    functions: tuple[FunctionFacts, ...]
    imports: tuple[str, ...]


def parse(source: str) -> ast.Module | Dropped:
    """`ast.parse` that neither warns nor raises: source that the interpreter refuses becomes a drop with its reason."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # '\d' in a corpus file must not drop it under -W error
            return ast.parse(source)
    except SyntaxError as error:
        # "too many nested parentheses" (200), "too many levels of indentation" (100): CPython's tokenizer limits.
        if error.msg.startswith("too many"):
            return Dropped(DropReason.TOO_DEEPLY_NESTED, error.msg)
        return Dropped(DropReason.NOT_PYTHON_3, f"line {error.lineno}: {error.msg}")
    except ValueError as error:  # NUL characters, lone surrogates
        return Dropped(DropReason.NOT_PYTHON_3, str(error))
    except (RecursionError, MemoryError) as error:
        return Dropped(DropReason.TOO_DEEPLY_NESTED, str(error) or type(error).__name__)


def refusal(source: str) -> Dropped | None:
    """Why the running interpreter refuses `source`, or None: as `parse`, at half the cost.

    `symtable` builds no tree of Python objects, but refuses more (a `return` outside a function); then `parse` decides.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            symtable.symtable(source, "<corpus>", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        tree = parse(source)
        return tree if isinstance(tree, Dropped) else None
    return None


def read_source(source: str) -> SourceFacts | Dropped:
    """Parse once and read blocks, functions and imports from the tree."""
    with collector_paused():
        tree = parse(source)
        return tree if isinstance(tree, Dropped) else facts_of(source, tree)


@contextmanager
def collector_paused() -> Iterator[None]:
    """Pause the garbage collector while making objects without cycles: it would take at least a fifth of the time."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def facts_of(source: str, tree: ast.Module) -> SourceFacts:
    """Blocks, functions and imports of `source`, which parses as `tree`."""
    lines = LineIndex(source)
    interesting = _interesting_lines(source, lines)
    imports: set[str] = set()
    functions: list[FunctionNode] = []
    assert_lines: list[int] = []  # first lines of statements that call `self.assert...`
    for statement in _statements(tree):
        if isinstance(statement, ast.Import):
            imports.update([alias.name.partition(".")[0] for alias in statement.names])
        elif isinstance(statement, ast.ImportFrom):
            if statement.level == 0 and statement.module:
                imports.add(statement.module.partition(".")[0])
        elif isinstance(statement, FunctionNode):
            functions.append(statement)
        if interesting and _any_within(interesting, *_lines_of(statement)):
            for call in _calls(statement):
                if _is_unittest_assert(call.func):
                    assert_lines.append(_lines_of(statement)[0])
                elif (package := _imported_by_name(call)) is not None:
                    imports.add(package)
    assert_lines.sort()
    facts = [FunctionFacts(node.name, _body(node), _any_within(assert_lines, *_lines_of(node))) for node in functions]
    return SourceFacts(_blocks(source, tree, lines), tuple(facts), tuple(sorted(imports)))


_ASSERT_METHOD = re.compile(r"self[\s\\]*\.[\s\\]*assert")
_IMPORTS_BY_NAME = re.compile(r"import_module|__import__")


def _interesting_lines(source: str, lines: LineIndex) -> list[int]:
    """The sorted lines of the calls that matter here: few files have any, and most statements have none."""
    matches = [*_ASSERT_METHOD.finditer(source)] if "assert" in source else []
    if "import_module" in source or "__import__" in source:
        matches += _IMPORTS_BY_NAME.finditer(source)
    return sorted({lines.line_at(match.start()) for match in matches})


def _lines_of(statement: Any) -> tuple[int, int]:
    """The first and last line of a statement, decorators included, or of the head of a `case`."""
    if isinstance(statement, ast.match_case):
        return statement.pattern.lineno, (statement.guard or statement.pattern).end_lineno or 0
    return _first_line(statement), statement.end_lineno


def _any_within(lines: Sequence[int], first: int, last: int) -> bool:
    """Whether any of `lines` (sorted) is between `first` and `last`, both included."""
    found = bisect_left(lines, first)
    return found < len(lines) and lines[found] <= last


def _calls(statement: ast.AST) -> Iterator[ast.Call]:
    """The calls in the expressions of a statement, but not those in its nested statements."""
    suites = _SUITES_REVERSED.get(type(statement), ())
    for name in statement._fields:
        if name in suites:
            continue
        value = getattr(statement, name)
        for child in value if isinstance(value, list) else (value,):
            if isinstance(child, ast.AST):
                yield from (node for node in ast.walk(child) if isinstance(node, ast.Call))


def _imported_by_name(call: ast.Call) -> str | None:
    """The package of `importlib.import_module("x.y")`, `import_module("x")` or `__import__("x")`, if `call` is one."""
    name = call.args[0] if call.args and _name_of(call.func) in ("import_module", "__import__") else None
    if isinstance(name, ast.Constant) and isinstance(name.value, str):
        package = name.value.partition(".")[0]  # empty for a relative import
        return package if package.isidentifier() else None
    return None


def _name_of(function: ast.expr) -> str | None:
    """The last part of the name of a called function."""
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else None


def _is_unittest_assert(function: ast.expr) -> bool:
    return (
        isinstance(function, ast.Attribute)
        and function.attr.startswith("assert")
        and isinstance(function.value, ast.Name)
        and function.value.id == "self"
    )


def byte_offsets(source: str, offsets: Sequence[int]) -> list[int]:
    """UTF-8 byte offsets of sorted code point offsets into `source`."""
    if source.isascii():
        return list(offsets)
    result, seen, size = [], 0, 0
    for offset in offsets:
        size += len(source[seen:offset].encode("utf-8", "surrogatepass"))
        seen = offset
        result.append(size)
    return result


def code_points(text: str, byte_offsets: Sequence[int]) -> Sequence[int]:
    """Offsets into the UTF-8 bytes of `text` as offsets into its code points; equal for ASCII text."""
    if text.isascii():
        return byte_offsets
    is_start = (np.frombuffer(text.encode(), np.uint8) & 0xC0) != 0x80
    starts_before = np.concatenate([[0], np.cumsum(is_start)])
    offsets: list[int] = starts_before[np.asarray(byte_offsets, np.int64)].tolist()
    return offsets


class LineIndex:
    """From the positions of `ast` nodes (line from 1, UTF-8 byte column) to code point offsets."""

    def __init__(self, source: str) -> None:
        self.source = source
        # Only the tokenizer's line ends: str.splitlines would also split at form feeds and U+2028.
        if "\r" in source:
            self.starts = [0, *(match.end() for match in _LINE_END.finditer(source))]
        else:
            lengths = map(len, source.split("\n"))
            self.starts = list(accumulate(map((1).__add__, lengths), initial=0))[:-1]
        self._ascii = source.isascii()
        self._columns: dict[int, list[int]] = {}  # line -> the byte column of each of its code points

    def offset(self, line: int, column: int) -> int:
        """Code point offset of a node position."""
        start = self.starts[line - 1]
        if self._ascii or column == 0:
            return start + column
        columns = self._columns.get(line)
        if columns is None:  # once per line: a line of a megabyte must not be encoded for each of its nodes
            end = self.starts[line] if line < len(self.starts) else len(self.source)
            sizes = (len(character.encode()) for character in self.source[start:end])
            columns = self._columns[line] = list(accumulate(sizes, initial=0))
        return start + bisect_left(columns, column)

    def line_end(self, line: int) -> int:
        """Code point offset of the end of a line, without its line end."""
        if line >= len(self.starts):
            return len(self.source)
        end = self.starts[line] - 1
        return end - 1 if self.source[end - 1 : end + 1] == "\r\n" else end

    def line_at(self, offset: int) -> int:
        """The line, from 1, that holds a code point offset."""
        return bisect_right(self.starts, offset)


_LINE_END = re.compile(r"\r\n?|\n")
_EXAMPLE = re.compile(r">>>|^\s*(?:usage\s+)?examples?\b", re.IGNORECASE | re.MULTILINE)


_NESTING: list[type[ast.AST]] = [*ast.stmt.__subclasses__(), ast.ExceptHandler, ast.match_case]
# By type of node, the fields that hold statements, or parts with statements in them; last field first.
_SUITES_REVERSED: dict[type[ast.AST], tuple[str, ...]] = {
    kind: tuple(field for field in ("cases", "finalbody", "orelse", "handlers", "body") if field in kind._fields)
    for kind in _NESTING
}


def _statements(tree: ast.Module) -> Iterator[ast.AST]:
    """Every statement, nested ones included, in source order. Expressions are skipped: they contain no statements."""
    stack: list[ast.AST] = tree.body[::-1]  # type: ignore[assignment]
    while stack:
        node = stack.pop()
        yield node
        for field in _SUITES_REVERSED.get(type(node), ()):
            stack += getattr(node, field)[::-1]


def _body(function: FunctionNode) -> FunctionBody:
    """Empty: only `pass`, `...` and a docstring. An example is `>>>` or a line that starts with Example."""
    docstring = ast.get_docstring(function, clean=False)
    rest = function.body[docstring is not None :]
    if all(isinstance(node, ast.Pass) or _is_ellipsis(node) for node in rest):
        return "empty"
    if docstring is None:
        return "plain"
    return "docstring_with_example" if _EXAMPLE.search(docstring) else "docstring"


def _is_ellipsis(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and node.value.value is ...


def _blocks(source: str, tree: ast.Module, lines: LineIndex) -> tuple[Statement, ...]:
    """Group the top-level statements; a blank line between two of them starts a new block.

    A block consists of whole lines. Comments directly below a statement stay with it; all others belong to the next
    block, or to the last one at the end of the file. So there are only blank lines between blocks.
    """
    if not tree.body:
        return ()
    texts = source.split("\n")
    if len(texts) != len(lines.starts):  # other line ends
        texts = [source[start : lines.line_end(number)] for number, start in enumerate(lines.starts, 1)]

    def is_blank(line: int) -> bool:
        text = texts[line - 1]
        return not text or text.isspace()

    groups: list[list[ast.stmt]] = [[tree.body[0]]]
    first_blanks: list[int] = []  # the first blank line after each group but the last
    for node in tree.body[1:]:
        before = groups[-1][-1].end_lineno or 1
        blank = next((line for line in range(before + 1, _first_line(node)) if is_blank(line)), None)
        if blank is None:
            groups[-1].append(node)
        else:
            groups.append([node])
            first_blanks.append(blank)
    blocks, first_line = [], 1
    for nodes, end_line in zip(groups, [*(blank - 1 for blank in first_blanks), len(lines.starts)], strict=True):
        while is_blank(first_line):
            first_line += 1
        last_line = end_line
        while is_blank(last_line):
            last_line -= 1
        start, end = lines.starts[first_line - 1], lines.line_end(last_line)
        blocks.append(Statement(start, end, _kind(nodes, source[start:end])))
        first_line = end_line + 1
    return tuple(blocks)


def _first_line(node: ast.stmt) -> int:
    """The line that a statement starts in; if it is decorated, `lineno` is the line of `def` or `class`."""
    decorators: list[ast.expr] = getattr(node, "decorator_list", [])
    return min([node.lineno, *[decorator.lineno for decorator in decorators]]) if decorators else node.lineno


def _kind(nodes: Sequence[ast.stmt], text: str) -> StatementKind:
    if "__name__" in text:
        return StatementKind.MAIN
    if all(isinstance(node, ast.Import | ast.ImportFrom) for node in nodes):
        return StatementKind.IMPORT
    return StatementKind.CODE
