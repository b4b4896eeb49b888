"""The API of a Python package as a file: one JSON object a line, `name`, `signature`, `description`.

In: a package, by its import name or its folder. Out: every public function, class and method, sorted by name, under the
shortest name that users can reach it by (`pandas.DataFrame.head`, not `pandas.core.generic.NDFrame.head`); its
signature without annotations; its documentation's prose, up to the first section or example. If a module says what it
exports (`__all__`), nothing else in it is public. Tests are not public.

griffe reads the source and runs nothing. So it cannot see what a package compiles, or makes while it is imported. With
`imports`, the package is imported and inspected for that, which runs what importing runs.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import logging
import re
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cert_ray import storage
from cert_ray.errors import InputError

if TYPE_CHECKING:
    import griffe

_log = logging.getLogger(__name__)

# Longer signatures take up the prompt: 98 of the 2,796 of pandas 3.1.1 are longer (2026-11-26). Assumed.
_SIGNATURE_CHARS = 120
_SUMMARY_CHARS = 120
_DEFAULT_CHARS = 20
_DESCRIPTION_CHARS = 600  # the text a doc is found by
_SECTION = re.compile(
    r"^\s*(?:-{3,}|={3,}|>>>.*|\.\. .*|:(?:param|return).*|(?:Args|Arguments|Returns|Raises|Examples?):)\s*$"
)
_CURE = "Give the name that Python imports it by, installed here or below --path FOLDER, or its folder."
_NOT_FOR_USERS = frozenset({"tests", "test", "testing", "conftest", "setup"})


@dataclass(frozen=True, slots=True)
class ApiDoc:
    """One function, class or method. `name` begins with the library, as prompts import it."""

    name: str
    signature: str  # "(by=None, axis=0)"; empty if not known
    description: str  # without line breaks; empty if nothing is documented

    @property
    def summary(self) -> str:
        """The first sentence of the description."""
        sentence, stop, _ = self.description.partition(". ")
        return _cut(sentence + stop.strip(), _SUMMARY_CHARS)

    @property
    def library(self) -> str:
        """The top-level package that a prompt imports."""
        return self.name.partition(".")[0]


@dataclass(frozen=True, slots=True)
class LibraryDocs:
    """What was found in a package. `unread` are public names without source: compiled, or made at import."""

    docs: tuple[ApiDoc, ...]
    unread: tuple[str, ...]


def collect_docs(
    package: str, shown_as: str | None = None, paths: Sequence[str] = (), imports: bool = False
) -> LibraryDocs:
    """The API of `package`: an import name, looked for in `paths` and then where this interpreter looks, or a folder.

    `shown_as` is the name by which prompts import it, if it differs.

    Raises:
        InputError: when there is no such package or folder, or it documents nothing.
    """
    package, paths = _place(package, paths)
    root = _load(package, paths, imports)
    reached = _reach(root)
    found = {path: ApiDoc(path, _signature(item), _description(item)) for path, item in reached.items.items()}
    unread = set(reached.unread)
    if imports:
        inspected, failed = _inspect(root.path, sorted(unread.union(reached.assigned)), paths)
        found, unread = found | inspected, (unread | failed) - inspected.keys()
    if not found:
        raise InputError(package, "no public function or class of it can be read", "Try --import.")
    name = shown_as or root.path
    docs = (replace(doc, name=name + path.removeprefix(root.path)) for path, doc in sorted(found.items()))
    return LibraryDocs(tuple(docs), tuple(sorted(unread)))


def write_docs(url: str, docs: Iterable[ApiDoc]) -> storage.Written:
    """Write `docs` to `url`, as `read_docs` reads them."""
    return storage.write_text(url, "".join(json.dumps(asdict(doc)) + "\n" for doc in docs))


def read_docs(url: str) -> tuple[ApiDoc, ...]:
    """The docs in the file at `url`.

    Raises:
        InputError: when there is none, or for the first line that cannot be used, with its number.
    """
    cure = "Make it with `cert-ray library-docs PACKAGE`."
    if not storage.exists(url) or storage.is_folder(url):
        raise InputError(url, "not a file of library documentation", cure)
    docs = []
    for number, line in enumerate(storage.read_text(url).splitlines(), start=1):
        try:
            row = json.loads(line)
            docs.append(ApiDoc(*(_text(row[field]) for field in ("name", "signature", "description"))))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{url}:{number}", f"not a line of library documentation: {error!r}", cure) from error
    if not docs:
        raise InputError(url, "it contains no documentation", cure)
    return tuple(docs)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a string")
    return value


def _place(package: str, paths: Sequence[str]) -> tuple[str, list[str]]:
    """The import name of `package`, and the folders searched before this interpreter's own path."""
    for path in paths:
        if not Path(path).is_dir():
            raise InputError(path, "no such folder", "Name an existing one with --path.")
    if "/" not in package and package != ".":
        return package, list(paths)
    folder = Path(package).resolve()
    if not (folder / "__init__.py").is_file():
        raise InputError(package, "not a package: it has no __init__.py", _CURE)
    return folder.name, [str(folder.parent), *paths]


def _load(package: str, paths: Sequence[str], imports: bool) -> griffe.Object:
    import griffe

    loader = griffe.GriffeLoader(allow_inspection=imports, search_paths=[*paths, *filter(None, sys.path)])
    logging.getLogger("griffe").setLevel(logging.ERROR)  # docstring sections that it cannot read do not matter here
    try:
        loaded = loader.load(package, try_relative_path=False)
        loader.resolve_aliases(implicit=True, external=False)
    except (ImportError, KeyError, griffe.GriffeError, OSError) as error:  # KeyError: a part that a package lacks
        raise InputError(package, f"no such package: {error}", _CURE) from error
    assert isinstance(loaded, griffe.Object)
    return loaded


@dataclass(slots=True)
class _Reached:
    items: dict[str, griffe.Object]  # by the shortest public path
    unread: list[str]
    assigned: list[str]  # names that a module assigns a value, which may be callable


def _inspect(package: str, names: Sequence[str], paths: Sequence[str]) -> tuple[dict[str, ApiDoc], set[str]]:
    """Which of `names` are callable once the package is imported, and which ones fail when looked up."""
    found, failed = {}, set()
    with _importing_from(paths):
        try:
            module = importlib.import_module(package)
        except Exception as error:  # a package may raise anything when imported
            raise InputError(package, f"cannot be imported: {error!r}", "Leave --import out.") from error
        for name in names:
            try:
                doc = _inspected(name, attrgetter(name.removeprefix(f"{package}."))(module))
            except AttributeError:
                continue
            except Exception as error:  # noqa: BLE001  a lazy attribute imports and does whatever it likes
                _log.warning("%s cannot be read: %r", name, error)
                failed.add(name)
                continue
            if doc is not None:
                found[name] = doc
    return found, failed


def _inspected(name: str, value: Any) -> ApiDoc | None:
    """The doc of `value`; None if it is not callable."""
    if not callable(value):
        return None
    try:
        parameters = inspect.signature(value).parameters.values()
    except (ValueError, TypeError):  # many compiled functions do not give theirs
        signature = ""
    else:
        told = ((one.name, one.kind.description, _default_of(one)) for one in parameters)
        signature = _shown(told)
    return ApiDoc(name, signature, _prose(inspect.getdoc(value) or "", name.rpartition(".")[2]))


def _default_of(parameter: inspect.Parameter) -> str | None:
    """The default as a literal or a type's name; any other object may look different in each process."""
    default = parameter.default
    if default is inspect.Parameter.empty:
        return None
    if isinstance(default, type):
        return default.__name__
    text = _default(repr(default))
    try:
        ordered = not isinstance(ast.literal_eval(text), set)
    except (ValueError, SyntaxError, TypeError):
        return "..."
    return text if ordered else "..."


@contextmanager
def _importing_from(paths: Sequence[str]) -> Iterator[None]:
    before = list(sys.path)
    sys.path[:0] = paths
    try:
        yield
    finally:
        sys.path[:] = before


def _reach(root: griffe.Object) -> _Reached:
    """Everything public, breadth first, so that the shortest path to an object comes first."""
    import griffe

    found = _Reached({}, [], [])
    seen: set[str] = set()
    waiting: deque[tuple[str, griffe.Object]] = deque([(root.path, root)])
    while waiting:
        path, item = waiting.popleft()
        for name, member in sorted(_members(item).items()):
            if not _is_public(item, name, member):
                continue
            try:
                target = member.final_target if isinstance(member, griffe.Alias) else member
            except (griffe.AliasResolutionError, griffe.CyclicAliasError):
                if member.is_alias and _is_own(root, str(getattr(member, "target_path", ""))):
                    found.unread.append(f"{path}.{name}")
                continue
            if not isinstance(target, griffe.Object) or not _is_own(root, target.path):
                continue
            # A method that subclasses inherit counts once for each: `DataFrame.head`, `Series.head`.
            identity = target.path if item.is_module else f"{path}.{name}"
            if identity in seen:
                continue
            seen.add(identity)
            if target.is_attribute and item.is_module:
                found.assigned.append(f"{path}.{name}")
            if target.is_function or target.is_class:
                found.items[f"{path}.{name}"] = target
            # A class that another one only mentions has its own place; following the mention could go in circles.
            if target.is_module or (target.is_class and (item.is_module or target.parent is item)):
                waiting.append((f"{path}.{name}", target))
    return found


def _is_public(parent: griffe.Object, name: str, member: griffe.Object | griffe.Alias) -> bool:
    if name.startswith("_"):
        return False
    if not parent.is_module:
        return True
    if parent.exports is not None:
        return name in {str(one) for one in parent.exports}
    if member.is_alias and not parent.is_init_module:  # what a module imports for itself
        return False
    return name not in _NOT_FOR_USERS and not name.startswith("test_")


def _members(item: griffe.Object) -> dict[str, griffe.Object | griffe.Alias]:
    return dict(item.all_members) if item.is_class else dict(item.members)


def _is_own(root: griffe.Object, path: str) -> bool:
    return path == root.path or path.startswith(f"{root.path}.")


def _signature(item: griffe.Object) -> str:
    """Parameters and short defaults, `self` and annotations left out."""
    import griffe

    function = item
    if isinstance(item, griffe.Class):
        found = item.all_members.get("__init__")
        if found is None:
            return "()"
        function = found.final_target if isinstance(found, griffe.Alias) else found
    if not isinstance(function, griffe.Function):
        return ""
    return _shown(
        (one.name, "" if one.kind is None else one.kind.value, None if one.default is None else str(one.default))
        for one in function.parameters
    )


def _shown(parameters: Iterable[tuple[str, str, str | None]]) -> str:
    """Parameters by name, kind (in words that griffe and inspect share) and default."""
    shown: list[str] = []
    for name, kind, default in parameters:
        if name in ("self", "cls"):
            continue
        if kind == "keyword-only" and not any(one.startswith("*") for one in shown):
            shown.append("*")
        star = {"variadic positional": "*", "variadic keyword": "**"}.get(kind, "")
        shown.append(f"{star}{name}{'' if default is None or star else f'={_default(default)}'}")
    return f"({_cut(', '.join(shown), _SIGNATURE_CHARS)})"


def _default(text: str) -> str:
    return text if len(text) <= _DEFAULT_CHARS else "..."


def _description(item: griffe.Object) -> str:
    return "" if item.docstring is None else _prose(item.docstring.value, item.name)


def _prose(docstring: str, name: str) -> str:
    """What the documentation of `name` begins with, on one line."""
    text = docstring.strip()
    if text.startswith(f"{name}("):  # compiled functions begin with their signature
        text = text.partition("\n\n")[2]
    prose: list[str] = []
    for line in text.splitlines():
        if _SECTION.match(line):
            if set(line.strip()) <= set("-=") and prose:
                prose.pop()  # the section's title
            break
        prose.append(line)
    return _cut(" ".join(" ".join(prose).split()), _DESCRIPTION_CHARS)


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 4].rsplit(" ", 1)[0].rstrip(",") + " ..."
