"""A small corpus with known duplicates, for tests of preprocessing."""

from __future__ import annotations

from pathlib import Path

FILE = '''import numpy as np
from {library} import thing


def function_{index}(values, limit={index}):
    """Return what is below the limit, number {index}."""
    if limit > {index} + 1:
        return np.asarray(values) * 2.5
    for value in values:
        print("value {index}", value)
    return [value for value in values if value < limit]


class Holder{index}:
    name = "holder {index}"

    def méthode(self):
        return f"{{self.name}} and {index}"
'''


def write_corpus(folder: Path, files: int = 12) -> None:
    """`files` different files, one exact copy of the first, one near copy of a long one."""
    folder.mkdir(parents=True)
    for index in range(files):
        body = FILE.format(index=index, library="pandas" if index % 2 else "polars")
        names = "\n".join(f"name_{index}_{item} = {item * (index + 3)}" for item in range(120))
        (folder / f"file_{index:02d}.py").write_text(f"{body}\n\n{names}\n")
    first = (folder / "file_00.py").read_text()
    (folder / "copy.py").write_text(first)
    (folder / "nearly.py").write_text(first + "\nextra = 1\n")
    (folder / "broken.py").write_text("def f(:\n    if x:\n        return 1\n    for y in z:\n        return 2\n")
