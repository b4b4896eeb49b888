"""Which of several completions to trust: a prompt and candidates in, their order from best to worst out.

    logprob    mean log-probability of a token under the model that drew it
    syntax     how many candidates have the same syntax tree, with variables renamed in order and docstrings left out
    agreement  how many candidates do the same on generated inputs, run in the sandbox: the idea of CodeT (Chen et al.
               2022, arXiv:2207.10397) without a second model that writes tests

Inputs are made from the prompt alone: variants of its literals if it computes at module level, and calls from its last
function's docstring examples and annotations. With neither (a function without examples and annotations), agreement
falls back to syntax. A benchmark's tests are never looked at. Ties go to the more likely candidate, then to the earlier
one, so the order is a function of the input alone.
"""

from __future__ import annotations

import ast
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from cert_ray.evaluation.programs import Program
from cert_ray.evaluation.sandbox import Execution

_INPUTS = 4  # assumed: each costs a run of every distinct candidate
_SEEN = "Fingerprint: "
_WORD = re.compile(r"[A-Za-z_]\w*")
_EXAMPLE = re.compile(r"^\s*>>>\s*(\w+\(.*\))\s*$", re.MULTILINE)
# Runs after the candidate, in its module: reports what `names` hold or what the calls return, by raising it.
_TELL = """
import hashlib as _hashlib, re as _re, types as _types
class Fingerprint(Exception): pass
def _told(value):
    if hasattr(value, "to_csv"):
        value = (type(value).__name__, str(getattr(value, "dtypes", "")), value.to_csv())
    return _re.sub("0x[0-9a-f]+", "0x", type(value).__name__ + repr(value))
_found = []
for _name in {names!r}:
    _value = globals().get(_name)
    if not isinstance(_value, (_types.ModuleType, _types.FunctionType, type)):
        _found.append(_name + "=" + _told(_value))
for _call in {calls!r}:
    try:
        _found.append(_told(eval(_call)))
    except Exception as _error:
        _found.append(type(_error).__name__)
raise Fingerprint(_hashlib.sha256("\\n".join(_found).encode("utf-8", "replace")).hexdigest())
"""


class RerankMethod(StrEnum):
    """What candidates are ordered by."""

    LOGPROB = "logprob"
    SYNTAX = "syntax"
    AGREEMENT = "agreement"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A completion, and the mean log-probability of its tokens if known."""

    text: str
    logprob: float | None = None


Run = Callable[[Sequence[Program]], Sequence[Execution]]


def rank(prompt: str, candidates: Sequence[Candidate], method: RerankMethod, run: Run | None = None) -> list[int]:
    """The candidates' indices in `candidates`, best first. `run` executes programs in a sandbox, for `AGREEMENT`.

    Raises:
        ValueError: for `AGREEMENT` without `run`, and for `LOGPROB` when no candidate has one.
    """
    if method is RerankMethod.LOGPROB:
        if candidates and all(candidate.logprob is None for candidate in candidates):
            raise ValueError("rerank by logprob: no candidate has a log-probability; ask the model for them")
        return _ordered(candidates, [0.0] * len(candidates))
    if method is RerankMethod.SYNTAX:
        return _ordered(candidates, _syntax_votes(prompt, candidates))
    if run is None:
        raise ValueError("rerank by agreement: give a way to run programs in a sandbox")
    votes = _agreement_votes(prompt, candidates, run)
    return _ordered(candidates, _syntax_votes(prompt, candidates) if votes is None else votes)


def _ordered(candidates: Sequence[Candidate], votes: Sequence[float]) -> list[int]:
    likely = [float("-inf") if one.logprob is None else one.logprob for one in candidates]
    return sorted(range(len(candidates)), key=lambda place: (-votes[place], -likely[place], place))


def normal_form(source: str) -> str | None:
    """The syntax tree of `source` as text, variables renamed in order of appearance; None if it does not parse."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    bound: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            bound.setdefault(node.id, f"v{len(bound)}")
        elif isinstance(node, ast.arg):
            bound.setdefault(node.arg, f"v{len(bound)}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            node.id = bound.get(node.id, node.id)
        elif isinstance(node, ast.arg):
            node.arg, node.annotation = bound[node.arg], None
        elif isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module) and ast.get_docstring(node, clean=False):
            node.body = node.body[1:]
    try:
        return ast.dump(tree)
    except RecursionError:
        return None


def _syntax_votes(prompt: str, candidates: Sequence[Candidate]) -> list[float]:
    forms = {text: normal_form(prompt + text) for text in {candidate.text for candidate in candidates}}
    counts = Counter(form for form in (forms[candidate.text] for candidate in candidates) if form is not None)
    return [float(counts.get(forms[candidate.text] or "", 0)) for candidate in candidates]


def _agreement_votes(prompt: str, candidates: Sequence[Candidate], run: Run) -> list[float] | None:
    """For each candidate: how many behave like it, times the share of inputs it handles without an error."""
    texts = list(dict.fromkeys(candidate.text for candidate in candidates))
    inputs = _inputs(prompt)
    if not inputs:
        return None
    executions = iter(run([Program(f"{text_before}{text}", tell) for text in texts for text_before, tell in inputs]))
    seen = {text: tuple(_fingerprint(next(executions)) for _ in inputs) for text in texts}
    alike = Counter(seen[candidate.text] for candidate in candidates)
    return [
        alike[seen[candidate.text]] * sum(one is not None for one in seen[candidate.text]) / len(inputs)
        for candidate in candidates
    ]


def _fingerprint(execution: Execution) -> str | None:
    return execution.detail if execution.detail.startswith(_SEEN) else None


def _inputs(prompt: str) -> list[tuple[str, str]]:
    """Prompts to put before a candidate, and what to run after it."""
    function = _last_function(prompt)
    if function is not None:
        calls = _calls(prompt, function)
        return [(prompt, _TELL.format(names=[], calls=calls))] if calls else []
    names = sorted(set(_WORD.findall(prompt)))
    tell = _TELL.format(names=names, calls=[])
    return [(variant, tell) for variant in dict.fromkeys(_variant(prompt, seed) for seed in range(_INPUTS))]


def _last_function(prompt: str) -> ast.FunctionDef | None:
    """The function that the prompt ends in, if its last top-level statement is one."""
    lines = prompt.rstrip().split("\n")
    starts = [place for place, line in enumerate(lines) if line and not line[0].isspace() and line[0] not in ")]}#"]
    if not starts or not lines[starts[-1]].startswith("def "):
        return None
    for body in ("", " pass", "\n    pass", " None"):  # the prompt may end in the middle of a statement
        try:
            last = ast.parse("\n".join(lines[starts[-1] :]) + body).body[-1]
        except (SyntaxError, ValueError, RecursionError):
            continue
        return last if isinstance(last, ast.FunctionDef) else None
    return None


def _calls(prompt: str, function: ast.FunctionDef) -> list[str]:
    """Calls of `function`: its docstring's examples, then by the annotations of its arguments."""
    examples = [call for call in _EXAMPLE.findall(prompt) if call.startswith(f"{function.name}(")]
    annotations = [None if one.annotation is None else ast.unparse(one.annotation) for one in function.args.args]
    drawn = []
    for seed in range(_INPUTS):
        values = [_drawn(annotation, random.Random(f"{seed} {place}")) for place, annotation in enumerate(annotations)]
        if all(value is not None for value in values):
            drawn.append(f"{function.name}({', '.join(map(str, values))})")
    return list(dict.fromkeys(examples + drawn))


def _drawn(annotation: str | None, source: random.Random) -> str | None:
    """A literal of the type, drawn from `source`; None for an unknown type."""
    if annotation is None:
        return None
    kind = annotation.replace("typing.", "").lower()
    simple = {
        "int": lambda: repr(source.randint(-3, 12)),
        "float": lambda: repr(round(source.uniform(-5, 5), 2)),
        "str": lambda: repr("".join(source.choice("abcAB 12") for _ in range(source.randint(0, 8)))),
        "bool": lambda: repr(source.random() < 0.5),
    }
    if kind in simple:
        return simple[kind]()
    inner = re.fullmatch(r"list\[(\w+)\]", kind)
    if inner and inner[1] in simple:
        return f"[{', '.join(simple[inner[1]]() for _ in range(source.randint(0, 6)))}]"
    return None


def _variant(prompt: str, seed: int) -> str:
    """`prompt` with its numbers inside brackets changed; seed 0 is the prompt as it is."""
    if seed == 0:
        return prompt
    source = random.Random(seed)
    parts, depth = [], 0
    for part in re.split(r"('[^'\n]*'|\"[^\"\n]*\"|#[^\n]*|[()\[\]{}]|\b\d+(?:\.\d+)?\b)", prompt):
        depth += (part in "([{" and part != "") - (part in ")]}" and part != "")
        changeable = depth > 0 and re.fullmatch(r"\d+(\.\d+)?", part) is not None
        parts.append(_changed(part, source) if changeable else part)
    return "".join(parts)


def _changed(number: str, source: random.Random) -> str:
    if "." in number:
        return repr(round(float(number) * source.uniform(0.5, 1.5), 2))
    return str(max(0, int(number) + source.randint(-1, 3)))
