"""Whether generated code changed what judges it: recorded before it runs, checked before and after the tests.

Runs inside the sandbox, under the environment's interpreter: the standard library of Python 3.8 only. A `Guard` holds
the attributes of builtins, of the preloaded libraries and their public classes, and of modules that tests rely on. It
also says whether the tests' own names (`all`, `np`) were bound to something else, and refuses trace functions.

It is a list of known tricks, not a proof: code in the same interpreter can still deceive (`sandbox.KNOWN_LIMITS`).
"""

from __future__ import annotations

import ast
import ctypes
import gc
import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

_LEANED_ON = ("builtins", "math", "operator", "functools", "itertools", "unittest.case", "copy", "json", "re")
_TESTING = ("testing", "_testing")  # submodules of a library that tests call
# With these a program could rewrite the judge's frames or search for its objects; no benchmarked code needs them.
_REFUSED_EVENTS = frozenset(
    ["sys.settrace", "sys.setprofile", "sys._current_frames", "gc.get_objects", "gc.get_referrers", "gc.get_referents"]
)
_REFUSED_FIELDS = frozenset(["__code__", "__defaults__", "__kwdefaults__"])
_OWN_FILES = frozenset(["<program>", "<tests>", "<string>"])  # "<string>": functions that namedtuple and others make
# Methods that a comparison of results calls: one added to a class hides the inherited one.
_COMPARISONS = frozenset(
    {"__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__bool__", "__len__", "__iter__", "__contains__"}
    | {"__hash__", "__getattribute__", "__getattr__", "__array__", "__array_ufunc__", "__array_function__"}
    | {"__instancecheck__", "equals", "compare", "all", "any"}
)
_VERSION_OFFSET = 24  # of ma_version_tag in PyDictObject, cpython/dictobject.h of 3.8 to 3.13
_ABSENT = object()


class Guard:
    """The state of a freshly loaded interpreter."""

    def __init__(self, preload: list[str]) -> None:
        """Record the modules of `preload`, which are already imported, and those that tests rely on."""
        self._modules: dict[str, types.ModuleType] = {}
        for name in (*_LEANED_ON, *preload, *(f"{one}.{part}" for one in preload for part in _TESTING)):
            try:
                self._modules[name] = importlib.import_module(name)
            except ImportError:  # a library without a module for testing
                continue
        own = tuple(name.partition(".")[0] for name in self._modules)
        classes = {id(one): one for module in self._modules.values() for one in _classes(module, own)}
        self._seen = [_Attributes(name, vars(module), False) for name, module in self._modules.items()]
        for one in classes.values():
            (attributes,) = gc.get_referents(vars(one))  # the dictionary behind the read-only view
            self._seen.append(_Attributes(f"{one.__module__}.{one.__qualname__}", attributes, True))
        self._builtins = vars(self._modules["builtins"]).copy()

    def changed(self, loaded: dict[str, Any]) -> str | None:
        """The first attribute that is not what it was, or None. `loaded` is `sys.modules`.

        Calls no builtin and no method that generated code could have replaced.
        """
        for name, module in self._modules.items():
            if loaded.get(name, module) is not module:
                return f"sys.modules[{name!r}]"
        for attributes in self._seen:
            found = attributes.changed()
            if found is not None:
                return found
        return None

    def shadowed(self, names: list[str], scope: dict[str, Any], job: dict[str, Any]) -> str | None:
        """The first of the tests' `names` that `scope` binds to something that deceives them, or None.

        That is: a builtin's name bound to something callable, or the prompt's alias of a library bound to something
        else. Ask only when nothing is `changed`.
        """
        for name in names:
            value = scope.get(name, _ABSENT)
            if value is _ABSENT:
                continue
            if name in self._builtins and name != job["entry_point"] and callable(value):
                return name
            real = self._modules.get(job["aliases"].get(name, ""))
            if real is not None and value is not real:
                return name
        return None


class _Attributes:
    """The attributes of one module or class, as they are now and as they were.

    Comparing them one by one costs a page fault for every page of objects that the fork shares (9 ms for pandas and
    NumPy). So where CPython counts a dictionary's changes, an unchanged count is taken to mean unchanged attributes.
    """

    def __init__(self, label: str, attributes: dict[str, Any], is_class: bool) -> None:
        self._label, self._attributes, self._is_class = label, attributes, is_class
        self._before = list(attributes.items())
        self._names = frozenset(attributes)
        self._version = ctypes.c_uint64.from_address(id(attributes) + _VERSION_OFFSET) if _COUNTED else None
        self._version_before = self._version.value if self._version is not None else 0

    def changed(self) -> str | None:
        """The name of an attribute that is not what it was, or None."""
        if self._version is not None and self._version.value == self._version_before:
            return None
        for name, value in self._before:
            if self._attributes.get(name, _ABSENT) is not value:
                return f"{self._label}.{name}"
        if self._is_class:
            for name in self._attributes:
                if name in _COMPARISONS and name not in self._names:
                    return f"{self._label}.{name}"
        return None


def _counts_changes() -> bool:
    """Whether this interpreter counts a dictionary's changes, in the expected place."""
    if sys.implementation.name != "cpython" or not (3, 8) <= sys.version_info[:2] <= (3, 13):
        return False
    tried: dict[str, int] = {"a": 1}
    version = ctypes.c_uint64.from_address(id(tried) + _VERSION_OFFSET)
    first = version.value
    unmoved = tried["a"] == 1 and version.value == first
    tried["a"] = 2
    return unmoved and version.value != first


_COUNTED = _counts_changes()


def loaded_names(source: str) -> list[str]:
    """The names that `source` reads, in alphabetical order; empty if it does not parse."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    return sorted({node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)})


def refuse_tricks() -> None:
    """From now on, forbid trace functions, searching the interpreter's objects, and new code in a function."""
    refused, fields, own, failure = _REFUSED_EVENTS, _REFUSED_FIELDS, _OWN_FILES, RuntimeError

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in refused:
            raise failure(f"{event} is not available to candidate programs")
        if event == "object.__setattr__" and arguments[1] in fields:
            function, name, new = arguments
            code = function.__code__
            # `types.coroutine` sets a flag of a function that is otherwise unchanged.
            same = name == "__code__" and new.co_code == code.co_code and new.co_consts is code.co_consts
            if not same and code.co_filename not in own:
                raise failure(f"{name} of a library's function cannot be replaced")

    sys.addaudithook(hook)


def _classes(module: types.ModuleType, own: tuple[str, ...]) -> Iterator[type]:
    """Public classes of `module` and their bases, as far as these belong to one of the libraries `own`."""
    for name, value in list(vars(module).items()):
        if isinstance(value, type) and not name.startswith("_"):
            for one in value.__mro__:
                if one.__module__.partition(".")[0] in own and one.__module__ != "builtins":
                    yield one
