"""Which files use which library."""

from __future__ import annotations

import re
from collections import Counter

import hypothesis
import hypothesis.strategies as st
import pyarrow as pa

from cert_ray.libraries import imported_libraries, library_counts, uses_any

LIBRARIES = pa.chunked_array([[["numpy", "os"], []], [["pandas"], None, ["os"]]], pa.list_(pa.string()))


def test_counts_are_sorted_by_files_then_name() -> None:
    assert list(library_counts(LIBRARIES).items()) == [("os", 2), ("numpy", 1), ("pandas", 1)]


def test_files_that_import_one_of_the_names_are_chosen() -> None:
    assert uses_any(LIBRARIES, ["numpy", "pandas"]).to_pylist() == [True, False, True, False, False]
    assert uses_any(LIBRARIES, []).to_pylist() == [False] * 5
    assert uses_any(pa.chunked_array([], LIBRARIES.type), ["os"]).to_pylist() == []


def test_imports_count_with_the_uses_of_the_name_they_bind() -> None:
    assert imported_libraries("import pandas as pd, os.path\npd.DataFrame(pd.x)\nos.path\n") == {"pandas": 3, "os": 2}


def test_names_imported_from_a_library_count_where_they_are_used() -> None:
    for line in ("from numpy import array, zeros as z\n", "from numpy import (\n    array,\n    zeros as z,\n)\n"):
        assert imported_libraries(line + "z[0] = array(z.T)\ndf.array()\nzeros(3)\n") == {"numpy": 4}
    assert imported_libraries("from numpy import *\narray(1)\n") == {"numpy": 1}
    assert imported_libraries("from numpy import (array,") == {"numpy": 1}


def test_imports_behind_a_semicolon_a_prompt_of_python_or_try_count() -> None:
    for code in ("import sys; import numpy as np\n", "try: import numpy as np\n", ">>> import numpy as np\n>>> "):
        assert imported_libraries(code + "np.zeros(2)")["numpy"] == 2
    assert imported_libraries("x = 1; from numpy import zeros\n") == {"numpy": 1}
    assert imported_libraries(";" * 500_000 + " \t" * 250_000) == {}


@hypothesis.given(
    st.lists(
        st.sampled_from(
            [
                "import a",
                "import a as b",
                "from c import d",
                "b.x",
                "a.b.a()",
                "xa.y",
                "import c, a as x",
                "x.x.",
                "d(d[b.d(1)])",
            ]
        )
    )
)
def test_uses_are_those_behind_the_import(lines: list[str]) -> None:
    """Held against a search of the rest of the prompt for each import, as slow as it is plain."""
    expected: Counter[str] = Counter()
    for number, line in enumerate(lines):
        behind = "\n".join(["", *lines[number + 1 :]])
        if line == "from c import d":
            expected["c"] += 1 + len(re.findall(r"(?<!\.)\bd[(\[]", behind))
        elif line.startswith("import "):
            for part in line.removeprefix("import ").split(", "):
                library, _, alias = part.partition(" as ")
                uses = len(re.findall(rf"\b{alias or library}\.", behind))
                expected[library] += 1 + uses
    assert imported_libraries("\n".join(lines)) == expected


def test_a_megabyte_of_one_word_is_read_once() -> None:
    """Read again for each of its letters, it would take hours: a front door reads prompts in its event loop."""
    for word in ("a" * 1_000_000, "a." * 500_000):
        assert imported_libraries(f"from {word}") == {}
        assert imported_libraries(f"import {word}")["a" if "." in word else word] >= 1
