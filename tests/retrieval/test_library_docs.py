"""A package's API, read from its source."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from cert_ray.errors import InputError
from cert_ray.retrieval.library_docs import ApiDoc, collect_docs, read_docs, write_docs
from tests.retrieval.builders import DOCS, write_library

EXPECTED = (
    ApiDoc("monkey.Frame", "(rows, *, names=None, **more)", "Rows and columns."),
    ApiDoc("monkey.Frame.peek", "(count=5)", "First rows. Of all columns."),
    ApiDoc("monkey.Frame.undocumented", "(way=...)", ""),
    ApiDoc("monkey.Line", "()", "One column."),
    ApiDoc("monkey.Line.peek", "(count=5)", "First rows. Of all columns."),
    ApiDoc("monkey.read", "(path, sep=',', *args)", "Read a file."),
)


def test_the_public_api_is_read_without_running_it(tmp_path: Path) -> None:
    found = collect_docs(str(write_library(tmp_path)))
    assert found.docs == EXPECTED
    assert found.unread == ("monkey.fast_sum",)
    assert "monkey" not in sys.modules


def test_what_has_no_source_is_inspected_when_the_package_may_be_imported(tmp_path: Path) -> None:
    (tmp_path / "swift_sums").mkdir()
    (tmp_path / "swift_sums" / "__init__.py").write_text(
        "from math import hypot\nfrom swift_sums._made import fsum, nothing\nLIMIT = 3\nlength = hypot\n"
        "__all__ = ['LIMIT', 'fsum', 'length', 'nothing']\n"
    )
    (tmp_path / "swift_sums" / "_made.py").write_text("import math\nglobals().update(fsum=math.fsum, nothing=None)\n")
    folder = str(tmp_path / "swift_sums")
    with pytest.raises(InputError, match="Try --import"):
        collect_docs(folder)
    found = collect_docs(folder, imports=True)
    assert [(doc.name, doc.signature) for doc in found.docs] == [
        ("swift_sums.fsum", "(seq)"),
        ("swift_sums.length", ""),  # which does not tell its own
    ]
    assert found.docs[0].summary == "Return an accurate floating point sum of values in the iterable seq."
    assert found.unread == ("swift_sums.nothing",)
    del sys.modules["swift_sums"], sys.modules["swift_sums._made"]


def test_what_is_inspected_is_shown_as_what_is_read_and_the_same_in_every_process(tmp_path: Path) -> None:
    (tmp_path / "swift_made").mkdir()
    (tmp_path / "swift_made" / "__init__.py").write_text(
        "import swift_made._made\n__all__ = ['Made', 'odd', 'total']\nfrom swift_made._made import Made, odd, total\n"
    )
    (tmp_path / "swift_made" / "_made.py").write_text(
        "def _total(values: list[int], /, kind=int, *, start: int = 0, way=object(), some={'a', 'b'}) -> None:\n"
        "    'The sum.'\n"
        "def _odd(first, *rest: int, **more: int) -> 'str': ...\n"
        "class _Made:\n"
        "    def __init__(self, rows: list[int] | None = None) -> None: ...\n"
        "globals().update(total=_total, odd=_odd, Made=_Made)\n"
    )
    found = collect_docs(str(tmp_path / "swift_made"), imports=True)
    assert {doc.name: doc.signature for doc in found.docs} == {
        "swift_made.Made": "(rows=None)",
        "swift_made.odd": "(first, *rest, **more)",
        "swift_made.total": "(values, kind=int, *, start=0, way=..., some=...)",
    }
    del sys.modules["swift_made"], sys.modules["swift_made._made"]


def test_one_attribute_that_fails_is_unread_and_a_package_that_fails_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "swift_lazy").mkdir()
    (tmp_path / "swift_lazy" / "__init__.py").write_text(
        "from math import hypot\nfrom swift_lazy._made import plot\nlength = hypot\n__all__ = ['length', 'plot']\n"
        "del plot\n"
        "def __getattr__(name):\n"
        "    if name == 'plot': raise ImportError('plot wants another package')\n"
        "    raise AttributeError(name)\n"
    )
    (tmp_path / "swift_lazy" / "_made.py").write_text("globals().update(plot=print)\n")
    found = collect_docs(str(tmp_path / "swift_lazy"), imports=True)
    assert [doc.name for doc in found.docs] == ["swift_lazy.length"]
    assert found.unread == ("swift_lazy.plot",)
    del sys.modules["swift_lazy"], sys.modules["swift_lazy._made"]
    with pytest.raises(InputError, match="cannot be imported: ModuleNotFoundError"):
        collect_docs(str(write_library(tmp_path)), imports=True)


def test_a_package_is_found_by_name_below_a_path_and_shown_under_another(tmp_path: Path) -> None:
    write_library(tmp_path)
    found = collect_docs("monkey", shown_as="pd", paths=[str(tmp_path)])
    assert [doc.name for doc in found.docs] == [doc.name.replace("monkey", "pd") for doc in EXPECTED]


def test_classes_that_name_each_other_end(tmp_path: Path) -> None:
    package = tmp_path / "loop"
    package.mkdir()
    (package / "__init__.py").write_text("class A:\n    from loop.b import B\n    class C:\n        def f(self): ...\n")
    (package / "b.py").write_text("class B:\n    from loop import A\n    def g(self): ...\n")
    names = [doc.name for doc in collect_docs(str(package)).docs]
    assert names == ["loop.A", "loop.A.B", "loop.A.C", "loop.A.C.f", "loop.b.B", "loop.b.B.A", "loop.b.B.g"]


def test_a_compiled_module_is_read_when_it_may_be_imported() -> None:
    assert any(doc.name == "zlib.crc32" for doc in collect_docs("zlib", imports=True).docs)


@pytest.mark.parametrize("package", ["no_such_package", "json.no_such_part", "./nowhere"])
def test_a_package_that_is_not_there_is_named(package: str) -> None:
    with pytest.raises(InputError, match=f"{package}: no"):
        collect_docs(package)


def test_a_folder_to_look_in_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere: no such folder"):
        collect_docs("json", paths=[str(tmp_path / "nowhere")])


def test_written_docs_are_read_again(tmp_path: Path) -> None:
    url = str(tmp_path / "docs.jsonl")
    write_docs(url, DOCS)
    assert read_docs(url) == DOCS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "contains no documentation"),
        ('{"name": "a.b"}\n', "docs.jsonl:1: not a line"),
        ('{"name": "a.b", "signature": "()", "description": null}\n', "docs.jsonl:1: not a line"),
        ("[]\n", "docs.jsonl:1"),
    ],
)
def test_a_file_that_cannot_be_used_says_which_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "docs.jsonl").write_text(text)
    with pytest.raises(InputError, match=message):
        read_docs(str(tmp_path / "docs.jsonl"))


def test_a_file_that_is_not_there_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="library-docs PACKAGE"):
        read_docs(str(tmp_path / "docs.jsonl"))
