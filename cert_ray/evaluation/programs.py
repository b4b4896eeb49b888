"""From a problem and a completion to the program that decides whether it is right.

In: a `Problem`, a completion as text. Out: a `Program`, whose two parts run one after the other and end without an
exception exactly when the completion passes. Nothing is executed here. `truncate` is for freshly generated text; a
sample file is scored as it stands. Sources: the layout of HumanEval's checker (Chen et al. 2021) and, for problems
without an entry point, of PandasEval and NumpyEval (Zan et al. 2022), whose `check()` looks at module variables.

The parts are compiled separately, so that a completion cannot change what the tests mean: a decorator or an open string
at its end is a syntax error there instead of a part of the tests.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from cert_ray.evaluation.benchmarks import Problem

# Where the authors of CERT cut a completion: the paper's "Inference", point 4.
STOPS: tuple[str, ...] = ("\nclass", "\ndef", "\n#", "\n@", "\nprint", "\nif")
_IMPORT = re.compile(r"^import[ \t]+([\w.]+)(?:[ \t]+as[ \t]+(\w+))?[ \t]*$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Program:
    """Generated code, then the benchmark's tests over it. Without `test` it passes when the code ends."""

    code: str
    test: str = ""
    entry_point: str | None = None
    aliases: tuple[tuple[str, str], ...] = ()  # (name, module) of the prompt's imports: the tests rely on them
    renamed: tuple[tuple[str, str], ...] = ()  # (name, library): names the code imports that are not installed

    @property
    def text(self) -> str:
        """Both parts as one source, as other evaluators run it."""
        return f"{self.code}\n{self.test}" if self.test else self.code


def truncate(completion: str, stops: tuple[str, ...] = STOPS) -> str:
    """`completion` up to the first place where one of `stops` begins."""
    found = [place for place in (completion.find(stop) for stop in stops) if place >= 0]
    return completion[: min(found)] if found else completion


def assemble(problem: Problem, completion: str) -> Program:
    """The program for `completion`: prompt and completion, then the tests and the call of `check`."""
    argument = "" if problem.entry_point is None else problem.entry_point
    return Program(
        code=problem.prompt + completion,
        test=f"{problem.test}\ncheck({argument})\n",
        entry_point=problem.entry_point,
        aliases=tuple((name, dict(problem.renamed).get(module, module)) for name, module in _aliases(problem.prompt)),
        renamed=problem.renamed,
    )


def assemble_gold(problem: Problem) -> tuple[Program, ...]:
    """The programs of the benchmark's own answers, in its order; empty if it has none."""
    return tuple(assemble(problem, answer) for answer in problem.canonical_solutions)


@lru_cache(maxsize=1024)
def _aliases(prompt: str) -> tuple[tuple[str, str], ...]:
    """(name, module) for each plain `import module` or `import module as name` line."""
    found = {alias or module.partition(".")[0]: module for module, alias in _IMPORT.findall(prompt)}
    return tuple((name, module) for name, module in found.items() if "." not in module)
