"""Programs mean what the benchmark means, and completions are cut where the authors cut them."""

from __future__ import annotations

import pytest

from cert_ray.evaluation.benchmarks import Problem
from cert_ray.evaluation.programs import STOPS, assemble, assemble_gold, truncate


def test_check_takes_the_entry_point_or_nothing() -> None:
    of_function = Problem("T/0", "def f():\n", "f", "def check(g): assert g() == 1", ("    return 1", "    return 2"))
    of_module = Problem("T/1", "x =", None, "def check(): assert x == 1")
    assert assemble(of_function, "    return 1").test.endswith("\ncheck(f)\n")
    assert assemble(of_module, " 1").text == "x = 1\ndef check(): assert x == 1\ncheck()\n"
    assert len(assemble_gold(of_function)) == 2
    assert assemble_gold(of_module) == ()


def test_the_prompts_plain_imports_are_what_tests_rely_on() -> None:
    prompt = "import numpy as np, os\nimport pandas as pd\nimport math\nimport os.path\nfrom re import sub\nx ="
    assert assemble(Problem("T/0", prompt, None, ""), "").aliases == (("pd", "pandas"), ("math", "math"))


@pytest.mark.parametrize("stop", STOPS)
def test_cut_at_the_first_stop(stop: str) -> None:
    assert truncate(f" a\n b{stop} c\nclass D") == " a\n b"


def test_indented_or_absent_stops_do_not_cut() -> None:
    kept = "def f():\n    # why\n    if x:\n        return 1\n"
    assert truncate(kept) == kept
    assert truncate("") == ""
