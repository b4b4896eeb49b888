"""Whether documentation ahead of a prompt helps with a library of unknown name: PandasEval, pandas called `monkey`.

    python -m tests.bench.private_library --benchmarks FOLDER --model FOLDER --output FOLDER

Writes the renamed set (`pandas` is `monkey` and `pd` is `mk`, in prompts, answers and tests; the sandbox maps the name
back), documents the pandas that the benchmark runs with, and evaluates greedily with and without it. Method names stay
pandas' own, so this is milder than a library that nobody has seen. Also printed: how often the documentation names a
method or function that the benchmark's answer calls; the retriever sees prompts alone. By hand.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
from pathlib import Path

from cert_ray.evaluation.benchmarks import REQUIREMENTS, read_problems
from cert_ray.evaluation.environments import build_environment
from cert_ray.evaluation.execution import ExecutionConfig
from cert_ray.evaluation.run import EvaluateConfig
from cert_ray.operations import evaluating
from cert_ray.operations.sources import Source
from cert_ray.retrieval.library_docs import collect_docs, write_docs
from cert_ray.retrieval.retriever import Retriever

_NAMES = {"pandas": "monkey", "pd": "mk"}
_CALL = re.compile(r"\.(\w+)\(")
_DOCUMENTED = re.compile(r"^# [\w.]*\.(\w+)\(", re.MULTILINE)


def renamed(text: str) -> str:
    """`text` about the library under its other names."""
    return re.sub(rf"\b({'|'.join(_NAMES)})\b", lambda found: _NAMES[found[0]], text)


def write_renamed(source: Path, target: Path) -> None:
    """PandasEval's rows, renamed."""
    rows = [json.loads(line) for line in gzip.decompress(source.read_bytes()).splitlines()]
    for row in rows:
        row |= {"prompt": renamed(row["prompt"]), "test": renamed(row["test"]), "renamed": {"monkey": "pandas"}}
        row["canonical_solution"] = [renamed(answer) for answer in row["canonical_solution"]]
        row["task_id"] = row["task_id"].replace("PandasEval", "MonkeyNames")
    target.write_text("".join(json.dumps(row) + "\n" for row in rows))


def named_share(problems: str, retriever: Retriever) -> str:
    """How many problems' documentation names something that the answer calls, of those whose answer calls something."""
    found = total = 0
    for problem in read_problems(problems):
        called = set(_CALL.findall("".join(problem.canonical_solutions)))
        total += bool(called)
        found += bool(called & set(_DOCUMENTED.findall(retriever.header(problem.prompt))))
    return f"{found} of {total}"


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--benchmarks", required=True, type=Path, help="folder with PandasEval.jsonl.gz")
    parser.add_argument("--model", required=True, help="folder of a causal LM")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--limit", type=int)
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    problems, docs = str(given.output / "renamed.jsonl"), str(given.output / "docs.jsonl")
    write_renamed(given.benchmarks / "PandasEval.jsonl.gz", Path(problems))
    environment = build_environment(REQUIREMENTS["PandasEval"])
    packages = Path(environment.python).parent.parent.glob("lib/python*/site-packages")
    found = collect_docs("pandas", shown_as="monkey", paths=[str(folder) for folder in packages])
    write_docs(docs, found.docs)
    print(f"{len(found.docs)} docs; they name what the answer calls: {named_share(problems, Retriever(found.docs))}")
    for name, retrieve in (("without", None), ("with", docs)):
        config = EvaluateConfig(
            problems=problems,
            output=str(given.output / name),
            temperature=0.0,
            max_tokens=100,
            limit=given.limit,
            requirements=REQUIREMENTS["PandasEval"],
            source=Source(model=given.model, retrieve=retrieve).recorded,
            execution=ExecutionConfig(),
        )
        print(name, evaluating.evaluate(config, [problems], [0.0], {"max_tokens": 100}))
    text = evaluating.compare(str(given.output / "without"), str(given.output / "with"), str(given.output / "compare"))
    print(text.split("\n## ")[0])


if __name__ == "__main__":
    main()
