"""A small library that no model has seen: `monkey`, with frames, an inherited method and parts that are not public."""

from __future__ import annotations

from pathlib import Path

from cert_ray.retrieval.library_docs import ApiDoc

DOCS = (
    ApiDoc("monkey.Frame.drop_gaps", "(subset=None)", "Remove rows with missing values. Others stay."),
    ApiDoc("monkey.Frame.order_by", "(column, descending=False)", "Sort the frame by a column."),
    ApiDoc("monkey.Frame.peek", "(count=5)", "First rows of the frame."),
    ApiDoc("monkey.Line.peek", "(count=5)", "First rows of the frame."),
    ApiDoc("donkey.sort_all", "(values)", "Sort values of any kind."),
)
ASKS_FOR_SORTING = "import monkey as mk\n\ndef f(frame):\n    # sorting a frame by its column\n    return "


def write_library(folder: Path) -> Path:
    """The package's folder, below `folder`. Importing it fails, so who reads it has not run it."""
    package = folder / "monkey"
    (package / "tests").mkdir(parents=True)
    (package / "__init__.py").write_text(
        '"""A library."""\n'
        "from monkey._frames import Frame, Line\n"
        "from monkey.reading import read\n"
        "from monkey._compiled import fast_sum\n"
        '__all__ = ["Frame", "Line", "fast_sum", "read", "reading"]\n'
        'raise RuntimeError("imported")\n'
    )
    (package / "_frames.py").write_text(
        "class _Both:\n"
        "    def peek(self, count: int = 5):\n"
        '        """First rows.\n\n        Of all columns.\n\n        Parameters\n        ----------\n'
        '        count\n        """\n'
        "    def _hidden(self): ...\n\n\n"
        "class Frame(_Both):\n"
        '    """Rows and columns."""\n'
        "    def __init__(self, rows: list[dict[str, int]], *, names: list[str] | None = None, **more): ...\n"
        "    def undocumented(self, way='a very long default that says nothing'): ...\n\n\n"
        "class Line(_Both):\n"
        '    """One column."""\n'
    )
    (package / "reading.py").write_text(
        "import os\nfrom monkey._frames import Frame\n\n\n"
        "def read(path: str, /, sep: str = ',', *args) -> Frame:\n"
        '    """Read a file.\n\n    >>> read("a.csv")\n    """\n'
    )
    (package / "tests" / "__init__.py").write_text("def test_nothing(): ...\n")
    return package
