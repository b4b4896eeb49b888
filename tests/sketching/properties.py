"""What holds of every sketch of a file that parses, checked on the syntax trees: an answer from outside of sketching.

In: a source, and a kind. Out: what does not hold, in words; nothing when all is well. The trees of source and sketch
are walked side by side; the scan and the scope analysis under test take no part in it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any

from cert_ray.python_source import collector_paused, parse
from cert_ray.schemas import Dropped
from cert_ray.sketching import PLACEHOLDER_KINDS, Sketched, SketchKind, sketch_source

RENAMED = frozenset({"variable", "argument", "func", "AnClass"})
LITERALS = frozenset(PLACEHOLDER_KINDS) - RENAMED
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
# Fields that hold one name of a binding or a use; every other text in a tree stays as it is.
NAME_FIELDS = {
    ("Name", "id"), ("arg", "arg"), ("FunctionDef", "name"), ("AsyncFunctionDef", "name"), ("ClassDef", "name"),
    ("ExceptHandler", "name"), ("MatchAs", "name"), ("MatchStar", "name"), ("MatchMapping", "rest"),
}  # fmt: skip


def violations(source: str, kind: SketchKind) -> list[str]:
    """What is wrong with the sketch of `source`, which parses."""
    with collector_paused():
        tree = parse(source)
        assert isinstance(tree, ast.Module)
        sketched = sketch_source(source, kind)
        if isinstance(sketched, Dropped):
            return [f"no sketch: {sketched.reason} {sketched.detail}"]
        found = list(_outside_placeholders(source, sketched))
        again = parse(sketched.text)
        if isinstance(again, Dropped):
            return [*found, f"the sketch does not parse: {again.detail}"]
        twice = sketch_source(sketched.text, kind)
        if not isinstance(twice, Sketched) or twice.text != sketched.text:
            found.append("the sketch of the sketch is another one")
        return [*found, *Comparison(tree, again, kind).differences()]


def _outside_placeholders(source: str, sketched: Sketched) -> Iterator[str]:
    """Equal to the byte outside of placeholders, but for a space that keeps one from joining a word."""
    code_at = text_at = 0
    for placeholder, (start, end) in zip(sketched.placeholders, sketched.replaced, strict=True):
        if sketched.text[placeholder.start : placeholder.end] != placeholder.kind:
            yield f"span {placeholder} holds other text"
        yield from _gap(source[code_at:start], sketched.text[text_at : placeholder.start])
        code_at, text_at = end, placeholder.end
    yield from _gap(source[code_at:], sketched.text[text_at:])


def _gap(code: str, text: str) -> Iterator[str]:
    if code == text or (code and text.strip(" ") == code.strip(" ") and len(text) - len(code) <= 2):
        joins = code[:1].isalnum() or code[-1:].isalnum() or not code.isascii()
        if code == text or joins:
            return
    yield f"{code!r} became {text!r} outside of placeholders"


def _is_shown_expression(one: ast.AST, other: ast.AST) -> bool:
    texts = [str(node.value).rstrip() for node in (one, other) if isinstance(node, ast.Constant)]
    return len(texts) == 2 and all(text.endswith("=") for text in texts)


def _bindings(tree: ast.Module) -> set[str]:
    """Names that the file binds itself anywhere, other than by an import."""
    own: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            own |= set() if isinstance(node.ctx, ast.Load) else {node.id}
        else:
            own |= {value for field, value in ast.iter_fields(node) if (type(node).__name__, field) in NAME_FIELDS}
    return own


class Comparison:
    """One walk over two trees of which the second is the sketch's."""

    def __init__(self, tree: ast.Module, sketch: ast.Module, kind: SketchKind) -> None:
        self._tree, self._sketch = tree, sketch
        self._renames = kind in (SketchKind.NAMES, SketchKind.BOTH)
        self._literals = kind in (SketchKind.CONSTANTS, SketchKind.BOTH)
        self._own = _bindings(tree)
        # Of the sketch: what only a replaced f-string passes is gone.
        self._passed = {node.arg for node in ast.walk(sketch) if isinstance(node, ast.keyword)}
        self._words: dict[tuple[int, str], str] = {}  # (scope, name) -> what it became there
        self._found: list[str] = []

    def differences(self) -> list[str]:
        stack: list[tuple[Any, Any, int]] = [(self._tree, self._sketch, 0)]
        while stack and len(self._found) < 5:
            stack += self._compare(*stack.pop())
        return self._found

    def _say(self, node: Any, text: str) -> None:
        self._found.append(f"line {getattr(node, 'lineno', '?')}: {text}")

    def _compare(self, one: Any, other: Any, scope: int) -> list[tuple[Any, Any, int]]:
        if isinstance(one, ast.Constant | ast.JoinedStr) and type(one) is not type(other):
            if not (self._literals and isinstance(other, ast.Name) and other.id in LITERALS):
                self._say(one, f"a literal became {ast.dump(other)[:60]}")
            return []
        if type(one) is not type(other):
            self._say(one, f"{type(one).__name__} became {type(other).__name__}")
            return []
        pairs = []
        inner = id(one) if isinstance(one, (*DEFINITIONS, ast.Lambda, *COMPREHENSIONS)) else scope
        for name, value in ast.iter_fields(one):
            new = getattr(other, name)
            if isinstance(one, ast.JoinedStr):  # `f"{name=}"`: the text before a field is the field's own
                kept = [(a, b) for a, b in zip(value, new, strict=False) if not _is_shown_expression(a, b)]
                value, new = [a for a, _ in kept], [b for _, b in kept]
            if isinstance(value, list):
                if len(value) != len(new):
                    self._say(one, f"{len(value)} {name} became {len(new)}")
                pairs += [self._pair(one, name, a, b, scope, inner) for a, b in zip(value, new, strict=False)]
            else:
                pairs.append(self._pair(one, name, value, new, scope, inner))
        return [pair for pair in pairs if pair is not None]

    def _pair(self, node: Any, field: str, value: Any, new: Any, scope: int, inner: int) -> tuple[Any, Any, int] | None:
        """Two children to compare further, in the scope where their names are looked up."""
        if isinstance(value, ast.AST):
            outside = isinstance(node, DEFINITIONS) and field != "body"  # defaults, decorators, bases
            outside |= isinstance(node, ast.Lambda) and field == "args"
            if isinstance(node, ast.comprehension) and field == "iter":
                return value, new, id(value)  # the first one's names are looked up outside
            return value, new, scope if outside else inner
        if isinstance(node, ast.Global | ast.Nonlocal) or (type(node).__name__, field) in NAME_FIELDS:
            if value is not None:
                self._name(node, value, new, scope)
        elif value != new and not (isinstance(value, float) and value != value):
            self._say(node, f"{type(node).__name__}.{field} {value!r} became {new!r}")
        return None

    def _name(self, node: Any, name: str, new: str, scope: int) -> None:
        if isinstance(node, DEFINITIONS):
            wanted = "AnClass" if isinstance(node, ast.ClassDef) else "func"
            if new != wanted:
                self._say(node, f"the definition of {name} became {new}")
            return
        if name != new and not (self._renames and new in RENAMED):
            self._say(node, f"{name} became {new}")
        if name != new and name not in self._own:
            self._say(node, f"{name} is none of the file's names, and became {new}")
        if name != new and isinstance(node, ast.arg) and name in self._passed:
            self._say(node, f"{name} is passed by keyword, and became {new}")
        if name != new and (name in ("self", "cls", "_") or (name.startswith("__") and name.endswith("__"))):
            self._say(node, f"{name} became {new}")
        if not isinstance(node, ast.arg) and self._words.setdefault((scope, name), new) != new:
            self._say(node, f"{name} became {new} and {self._words[scope, name]} in one scope")
