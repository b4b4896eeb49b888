"""Which names in a file are user-defined, and what each becomes: the scope analysis behind CERT-N and CERT-NC.

In: source text. Out: a lexeme (start, end, kind) for every use of a name that the file itself defines. The kind depends
on how its scope binds it: the first of `AnClass`, `func`, `argument` and `variable` that applies, so that all uses in a
scope agree. Names right after `def` and `class` come from `literals.scan`, since every kind of sketch replaces them.

These names stay, because replacing them would break a link to something outside, or they say nothing about the user:
names bound by an import anywhere in the scope, names that the file does not bind (builtins, star imports), attributes,
call keywords, parameters that some call in the file passes by keyword, variables of a class body (they are also
attributes), type parameters, `__dunders__`, `self`, `cls` and `_`.

Replacing names a second time changes nothing, since each placeholder word keeps its kind. `symtable` is not used: it
refuses files that `ast.parse` accepts. Names reached through strings (`globals()["x"]`, `__all__`) are not followed.
"""

from __future__ import annotations

import ast
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from cert_ray.possessive import compile_pattern
from cert_ray.python_source import LineIndex, parse
from cert_ray.schemas import Dropped
from cert_ray.sketching.fstrings import read_fstring
from cert_ray.sketching.literals import WORD, Lexeme, is_word, scan

_KEPT = "kept"
_STRONGEST_FIRST = (_KEPT, "AnClass", "func", "argument", "variable")
_CONVENTIONS = frozenset({"self", "cls", "_"})


def find_names(source: str, replaced: frozenset[int] = frozenset()) -> list[Lexeme] | Dropped:
    """The uses of user-defined names in `source`, sorted, without definitions.

    f-strings (and concatenations with one) that start at an offset in `replaced` are ignored: they become placeholders,
    so what they bind or pass does not count.
    """
    tree = parse(source)
    if isinstance(tree, Dropped):
        return tree
    uses = _Uses(source, replaced)
    uses.read(tree)
    return uses.lexemes()


def pattern_ranges(tree: ast.Module, lines: LineIndex) -> list[tuple[int, int]]:
    """The sorted code point ranges of the `case` patterns of a tree."""
    patterns: list[Any] = [node.pattern for node in ast.walk(tree) if isinstance(node, ast.match_case)]
    return sorted(
        (lines.offset(pattern.lineno, pattern.col_offset), lines.offset(pattern.end_lineno, pattern.end_col_offset))
        for pattern in patterns
    )


@dataclass(slots=True, eq=False)
class _Scope:
    form: str  # "module", "class", "function" (lambdas too) or "comprehension"
    parent: _Scope | None
    bound: dict[str, str] = field(default_factory=dict)  # name -> the strongest kind it is bound as
    declared: dict[str, str] = field(default_factory=dict)  # name -> "global" or "nonlocal"
    parameters: set[str] = field(default_factory=set)

    def enclosing(self) -> Iterator[_Scope]:
        """This scope and those around it, innermost first."""
        scope: _Scope | None = self
        while scope is not None:
            yield scope
            scope = scope.parent

    def owner(self, name: str, module: _Scope) -> _Scope | None:
        """The scope whose binding a use of `name` in this scope refers to; None for builtins and star imports."""
        scope: _Scope | None = self
        while scope is not None:
            if scope is self or scope.form != "class":
                if name in scope.bound:
                    return scope
                if scope.declared.get(name) == "global":
                    return module
            scope = scope.parent
        return None


@dataclass(frozen=True, slots=True)
class _FString:
    """[start, end) in code points, the scope around it, and by name the scopes inside it that use that name."""

    start: int
    end: int
    scope: _Scope
    uses: dict[str, list[_Scope]]


class _Uses:
    """Collects bindings and uses in one walk, with an explicit stack: files nest deeper than Python can recurse."""

    def __init__(self, source: str, replaced: frozenset[int]) -> None:
        self._source = source
        self._replaced = replaced
        self._lines = LineIndex(source)
        self._module = _Scope("module", None)
        self._bindings: list[tuple[_Scope, str, str]] = []
        self._uses: list[tuple[_Scope, str, int]] = []  # with the code point offset
        self._call_keywords: set[str] = set()
        # Before 3.12, positions inside f-strings are wrong, so names in these are searched for in the text.
        self._fstrings: list[_FString] = []
        self._in_fstring: dict[str, list[_Scope]] | None = None
        self._stack: list[tuple[ast.AST, _Scope]] = []

    def read(self, tree: ast.Module) -> None:
        self._run([tree], self._module)
        for scope, name, kind in self._bindings:
            self._bind(scope, name, kind)

    def lexemes(self) -> list[Lexeme]:
        found: list[Lexeme] = []
        for scope, name, start in self._uses:
            if kind := self._kind(scope, name):
                end = start + len(name)
                if self._source[start:end] != name:  # ast normalises identifiers (NFKC), so lengths may differ
                    match = _IDENTIFIER.match(self._source, start)
                    assert match is not None, f"no identifier at {start}"
                    end = match.end()
                found.append((start, end, kind))
        found += self._inside_fstrings()
        return sorted(found)

    def _bind(self, scope: _Scope, name: str, kind: str) -> None:
        # A parameter is bound here even if it is declared, too: only the symbol table refuses that.
        declared = None if name in scope.parameters else scope.declared.get(name)
        if declared == "nonlocal":
            return  # already bound by an enclosing function
        if declared == "global":
            scope = self._module
        if (kind == "variable" and scope.form == "class") or (kind == "argument" and name in self._call_keywords):
            kind = _KEPT
        scope.bound[name] = min(kind, scope.bound.get(name, kind), key=_STRONGEST_FIRST.index)

    def _kind(self, scope: _Scope, name: str) -> str | None:
        if name in _CONVENTIONS or (name.startswith("__") and name.endswith("__")):
            return None
        owner = scope.owner(name, self._module)
        kind = owner.bound.get(name, _KEPT) if owner else _KEPT
        return None if kind == _KEPT else kind

    # The walk.

    def _run(self, nodes: Iterable[ast.AST], scope: _Scope) -> None:
        outer, self._stack = self._stack, [(node, scope) for node in nodes]
        while self._stack:
            node, scope = self._stack.pop()
            visit = _VISITORS.get(type(node).__name__)
            if visit:
                visit(self, node, scope)
            else:
                self._push(ast.iter_child_nodes(node), scope)
        self._stack = outer

    def _push(self, nodes: Iterable[ast.AST | None], scope: _Scope) -> None:
        self._stack += [(node, scope) for node in nodes if node is not None]

    def _use(self, scope: _Scope, name: str, start: int) -> None:
        if self._in_fstring is None:
            self._uses.append((scope, name, start))
        else:
            self._in_fstring.setdefault(name, []).append(scope)

    def _start(self, node: Any) -> int:
        return self._lines.offset(node.lineno, node.col_offset)

    def _end(self, node: Any) -> int:
        return self._lines.offset(node.end_lineno, node.end_col_offset)

    def _visit_name(self, node: ast.Name, scope: _Scope) -> None:
        if not isinstance(node.ctx, ast.Load):
            self._bindings.append((scope, node.id, "variable"))
        self._use(scope, node.id, self._start(node))

    def _visit_named_expression(self, node: ast.NamedExpr, scope: _Scope) -> None:
        self._push([node.value], scope)
        target = scope
        while target.form == "comprehension" and target.parent is not None:
            target = target.parent
        self._bindings.append((target, node.target.id, "variable"))
        self._use(scope, node.target.id, self._start(node.target))

    def _visit_keyword(self, node: ast.keyword, scope: _Scope) -> None:
        if node.arg is not None:
            self._call_keywords.add(node.arg)
        self._push([node.value], scope)

    def _visit_fstring(self, node: ast.AST, scope: _Scope) -> None:
        if self._in_fstring is not None:
            self._push(ast.iter_child_nodes(node), scope)
            return
        if self._start(node) in self._replaced:
            return
        self._in_fstring = {}
        self._run(ast.iter_child_nodes(node), scope)
        if self._in_fstring:
            self._fstrings.append(_FString(self._start(node), self._end(node), scope, self._in_fstring))
        self._in_fstring = None

    def _visit_import(self, node: ast.Import | ast.ImportFrom, scope: _Scope) -> None:
        for alias in node.names:
            self._bindings.append((scope, alias.asname or alias.name.partition(".")[0], _KEPT))

    def _visit_declaration(self, node: ast.Global | ast.Nonlocal, scope: _Scope) -> None:
        declared = "global" if isinstance(node, ast.Global) else "nonlocal"
        words = _IDENTIFIER.finditer(self._source, self._start(node), self._end(node))
        next(words)  # the keyword
        for name, word in zip(node.names, words, strict=False):
            scope.declared[name] = declared
            self._use(scope, name, word.start())

    def _visit_handler(self, node: ast.ExceptHandler, scope: _Scope) -> None:
        if node.name and node.type:
            found = _AS_NAME.match(self._source, self._end(node.type))
            assert found is not None, f"no `as {node.name}` in line {node.lineno}"
            self._bindings.append((scope, node.name, "variable"))
            self._use(scope, node.name, found.start(1))
        self._push([node.type, *node.body], scope)

    def _visit_capture(self, node: ast.MatchAs | ast.MatchStar, scope: _Scope) -> None:
        """`case NAME`, `case PATTERN as NAME`, `*NAME`: the name is the last word of the node."""
        if node.name:
            start = end = self._end(node)
            while is_word(self._source[start - 1]):
                start -= 1
            assert start < end
            self._bindings.append((scope, node.name, "variable"))
            self._use(scope, node.name, start)
        self._push(ast.iter_child_nodes(node), scope)

    def _visit_mapping_pattern(self, node: ast.MatchMapping, scope: _Scope) -> None:
        if node.rest:
            start = self._end(node.patterns[-1]) if node.patterns else self._start(node)
            found = _REST_NAME.search(self._source, start, self._end(node))
            assert found is not None, f"no `**{node.rest}` in line {node.lineno}"
            self._bindings.append((scope, node.rest, "variable"))
            self._use(scope, node.rest, found.start(1))
        self._push([*node.keys, *node.patterns], scope)

    def _visit_class(self, node: ast.ClassDef, scope: _Scope) -> None:
        self._bindings.append((scope, node.name, "AnClass"))
        self._push(node.decorator_list, scope)
        scope = self._type_parameters(node, scope)
        self._push([*node.bases, *node.keywords], scope)
        self._push(node.body, _Scope("class", scope))

    def _visit_function(self, node: ast.FunctionDef | ast.AsyncFunctionDef, scope: _Scope) -> None:
        self._bindings.append((scope, node.name, "func"))
        self._push(node.decorator_list, scope)
        scope = self._type_parameters(node, scope)
        self._push([node.returns], scope)
        self._push(node.body, self._parameters(node.args, scope))

    def _visit_lambda(self, node: ast.Lambda, scope: _Scope) -> None:
        self._push([node.body], self._parameters(node.args, scope))

    def _visit_type_alias(self, node: Any, scope: _Scope) -> None:  # 3.12
        self._push([node.name], scope)
        self._push([node.value], self._type_parameters(node, scope))

    def _type_parameters(self, node: Any, scope: _Scope) -> _Scope:
        """The scope that 3.12's `[T]` opens, otherwise `scope`. Type parameters stay."""
        parameters = getattr(node, "type_params", None)
        if not parameters:
            return scope
        inner = _Scope("function", scope)
        for parameter in parameters:
            self._bindings.append((inner, parameter.name, _KEPT))
            self._push(ast.iter_child_nodes(parameter), inner)
        return inner

    def _parameters(self, arguments: ast.arguments, scope: _Scope) -> _Scope:
        """A function's scope with its parameters; defaults and annotations belong to the enclosing one."""
        self._push([*arguments.defaults, *arguments.kw_defaults], scope)
        inner = _Scope("function", scope)
        single = [arg for arg in (arguments.vararg, arguments.kwarg) if arg]
        for arg in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, *single]:
            self._push([arg.annotation], scope)
            inner.parameters.add(arg.arg)
            self._bindings.append((inner, arg.arg, "argument"))
            self._use(inner, arg.arg, self._start(arg))
        return inner

    def _visit_comprehension(self, node: Any, scope: _Scope) -> None:
        inner = _Scope("comprehension", scope)
        first, *others = node.generators
        self._push([first.iter], scope)
        self._push([first.target, *first.ifs, *others], inner)
        self._push([node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt], inner)

    # Names in f-strings.

    def _inside_fstrings(self) -> Iterator[Lexeme]:
        if not self._fstrings:
            return
        self._fstrings.sort(key=lambda fstring: fstring.start)
        starts = [fstring.start for fstring in self._fstrings]
        for start, _, kind in scan(self._source):
            if kind not in ("interstring", "interrawstring"):
                continue
            index = bisect_right(starts, start) - 1
            if index >= 0 and start < self._fstrings[index].end:
                yield from self._inside_fstring(start, self._fstrings[index], raw=kind == "interrawstring")

    def _inside_fstring(self, start: int, fstring: _FString, *, raw: bool) -> Iterator[Lexeme]:
        quote_at = start
        while self._source[quote_at] not in "\"'":
            quote_at += 1
        _, stretches = read_fstring(self._source, quote_at, raw=raw)
        for stretch_start, stretch_end in stretches:
            for word in _WORD_OR_NUMBER.finditer(self._source, stretch_start, stretch_end):
                if word[0] not in fstring.uses or self._is_attribute_or_keyword(*word.span()):
                    continue
                if kind := self._kind(self._deciding(fstring, word[0]), word[0]):
                    yield word.start(), word.end(), kind

    def _deciding(self, fstring: _FString, name: str) -> _Scope:
        """The scope that decides what `name` becomes throughout an f-string: one that binds it outside, if any.

        Comprehensions and lambdas may bind a name anew, but are entirely inside the f-string, so their uses still
        agree.
        """
        for scope in fstring.uses[name]:
            owner = scope.owner(name, self._module)
            if owner is None or any(owner is around for around in fstring.scope.enclosing()):
                return scope
        return fstring.uses[name][0]

    def _is_attribute_or_keyword(self, start: int, end: int) -> bool:
        source, before = self._source, start - 1
        while source[before].isspace():
            before -= 1
        if source[before] == ".":
            return True
        return source[before] in "(," and _EQUALS.match(source, end) is not None


_IDENTIFIER = re.compile(WORD)
_WORD_OR_NUMBER = re.compile(r"[0-9A-Za-z_\x80-\U0010ffff]++")
_EQUALS = re.compile(r"\s*+=(?!=|\s*+[}!:])")  # after a keyword: a value follows, unlike in `f"{one, two=}"`
_AS_NAME = compile_pattern(rf"(?:[\s\\)]|\#[^\r\n]*+)*+as[\s\\]+({WORD})")
_REST_NAME = re.compile(rf"\*\*[\s\\]*({WORD})")

# By name, since some classes exist only in later versions. For all other nodes, children are visited in the same scope.
_VISITORS: dict[str, Callable[[_Uses, Any, _Scope], None]] = {
    "Name": _Uses._visit_name,
    "NamedExpr": _Uses._visit_named_expression,
    "keyword": _Uses._visit_keyword,
    "JoinedStr": _Uses._visit_fstring,
    "TemplateStr": _Uses._visit_fstring,
    "Import": _Uses._visit_import,
    "ImportFrom": _Uses._visit_import,
    "Global": _Uses._visit_declaration,
    "Nonlocal": _Uses._visit_declaration,
    "ExceptHandler": _Uses._visit_handler,
    "MatchAs": _Uses._visit_capture,
    "MatchStar": _Uses._visit_capture,
    "MatchMapping": _Uses._visit_mapping_pattern,
    "ClassDef": _Uses._visit_class,
    "FunctionDef": _Uses._visit_function,
    "AsyncFunctionDef": _Uses._visit_function,
    "Lambda": _Uses._visit_lambda,
    "TypeAlias": _Uses._visit_type_alias,
    "ListComp": _Uses._visit_comprehension,
    "SetComp": _Uses._visit_comprehension,
    "DictComp": _Uses._visit_comprehension,
    "GeneratorExp": _Uses._visit_comprehension,
}
