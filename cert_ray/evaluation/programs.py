"""From a problem and a completion to the program that decides it.

In: a `Problem`, a completion as text. Out: Python source that ends without an exception exactly when the completion
passes. Nothing is executed here. `truncate` belongs to freshly generated text; a sample file is scored as it stands.
Sources: the layout of HumanEval's checker (Chen et al. 2021) and, for problems without an entry point, of PandasEval
and NumpyEval (Zan et al. 2022), whose `check()` looks at module variables.
"""

from __future__ import annotations

from cert_ray.evaluation.benchmarks import Problem

# Where the authors of CERT cut a completion: PAPER.md "Inference", point 4.
STOPS: tuple[str, ...] = ("\nclass", "\ndef", "\n#", "\n@", "\nprint", "\nif")


def truncate(completion: str, stops: tuple[str, ...] = STOPS) -> str:
    """`completion` up to the first place where one of `stops` begins."""
    found = [place for place in (completion.find(stop) for stop in stops) if place >= 0]
    return completion[: min(found)] if found else completion


def assemble(problem: Problem, completion: str) -> str:
    """The program for `completion`: prompt, completion, the tests, and the call of `check`."""
    argument = "" if problem.entry_point is None else problem.entry_point
    return f"{problem.prompt}{completion}\n{problem.test}\ncheck({argument})\n"


def assemble_gold(problem: Problem) -> tuple[str, ...]:
    """The programs of the benchmark's own answers, in its order; none where it has none."""
    return tuple(assemble(problem, answer) for answer in problem.canonical_solutions)
