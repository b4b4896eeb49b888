"""Finds files that hold a benchmark's problems, so that no model is scored on what it was trained on.

In: problem files that `evaluation.benchmarks` reads, and cleaned documents. Out: which document matched which problem,
by words or by syntax tree. Prompts and canonical solutions are searched for; tests are not.

- Words: `ngram_words` consecutive words, over prompt and solution together. Qwen2.5-Coder (arXiv:2409.12186, section 5)
  and DeepSeek-Coder (arXiv:2401.14196, "quality screening") drop a file for ten. A word is a run of letters, digits
  and `_`, as in `dedup.minhash`. N-grams with few different words outside import lines (tables of numbers,
  `import numpy as np` and an array) prove nothing and are left out.
- Tree: consecutive statements in some block of the document have the same syntax tree as a solution, or as a helper in
  a prompt, once names are numbered by first use and numbers and strings count as equal. Attributes, keyword names and
  builtins are compared: a renamed solution keeps them. A run of fewer than `min_tree_nodes` nodes never matches.

Words are hashed over all bytes of a batch at once. Only the statements of a tree are visited; runs that resemble a
problem's in outline are then compared in full.
"""

from __future__ import annotations

import ast
import builtins
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import eq
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pydantic
import xxhash

from cert_ray import storage
from cert_ray.config import Config
from cert_ray.dedup.minhash import shingle_hashes
from cert_ray.evaluation.benchmarks import Problem, read_problems
from cert_ray.python_source import LineIndex, parse
from cert_ray.schemas import Dropped


class DecontaminationConfig(Config):
    """Which problem files to search for, and what counts as a match. A bare list is read as `problems`."""

    problems: tuple[str, ...] = ()  # JSONL, plain or gzip, in the format of HumanEval or PandasEval
    ngram_words: int = pydantic.Field(default=10, ge=3, le=32)
    # Measured on 8,010 files (120 MB) of the standard library and installed packages, against HumanEval, PandasEval and
    # NumpyEval: with 6 words `import numpy as np; a = np.array(...)` matched, with 7 nothing did. With 8 nodes, 26 of
    # 3,855 files matched, by statements such as `x[1:] = x[:-1]`; with 12, none did.
    min_ngram_letters: int = pydantic.Field(default=7, ge=1)  # different words that are not numbers
    min_tree_nodes: int = pydantic.Field(default=12, ge=1)

    @pydantic.model_validator(mode="before")
    @classmethod
    def _from_list(cls, given: Any) -> Any:
        return {"problems": given} if isinstance(given, list | tuple) else given


@dataclass(frozen=True, slots=True)
class Owner:
    """A part of a problem."""

    problems: str  # the file
    task_id: str
    part: str  # "prompt" or "solution"


@dataclass(frozen=True, slots=True)
class Match:
    """A document holds part of a problem."""

    owner: Owner
    how: str  # "words" or "tree"
    line: int  # of the first match, from 1
    matches: int  # n-grams or runs of statements
    text: str

    def row(self) -> tuple[object, ...]:
        """The columns of `schemas.CONTAMINATION` after path and source."""
        owner = self.owner
        return owner.problems, owner.task_id, owner.part, self.how, self.line, self.matches, self.text


Head = tuple[object, ...]
_TABLE_BITS = 20  # a megabyte of flags: HumanEval, PandasEval and NumpyEval set 2% of them
_IMPORT_LINE = re.compile(rb"^(?:import|from) .*$", re.MULTILINE)
_WORD = re.compile(rb"[0-9A-Za-z_\x80-\xff]+")


@dataclass(frozen=True)
class ProblemIndex:
    """What to search for, made once and sent to every task."""

    config: DecontaminationConfig
    checksums: dict[str, str]  # of the problem files
    owners: tuple[Owner, ...]
    gram_hashes: npt.NDArray[np.uint64]  # sorted
    gram_owners: npt.NDArray[np.int32]  # of each hash
    gram_flags: npt.NDArray[np.bool_]  # for the highest bits of a hash, whether any hash has them
    tree_owners: dict[str, tuple[int, ...]]  # by fingerprint
    tree_heads: frozenset[Head]  # of each run's first statement
    tree_outlines: dict[Head, tuple[tuple[Head, ...], ...]]  # outline of the first statement: outlines of the others

    @classmethod
    def read(cls, config: DecontaminationConfig) -> Self:
        """Index the problem files of `config`.

        Raises:
            BenchmarkFormatError: for a missing file, or a line that cannot be used.
        """
        owners: dict[Owner, int] = {}
        grams: set[tuple[int, int]] = set()
        trees: dict[str, set[int]] = defaultdict(set)
        heads: set[Head] = set()
        outlines: dict[Head, set[tuple[Head, ...]]] = defaultdict(set)
        checksums = {}
        for url in config.problems:
            problems = read_problems(url)
            checksums[url] = storage.checksum(url).checksum
            for problem in problems:
                numbers = {
                    part: owners.setdefault(Owner(storage.name_of(url), problem.task_id, part), len(owners))
                    for part in ("prompt", "solution")
                }
                for program, boundary in _programs(problem):
                    grams |= {(value, numbers[part]) for value, part in _grams(program, boundary, config)}
                    for part, run in _runs(program, boundary, problem.entry_point):
                        key, nodes = fingerprint(run)
                        if nodes >= config.min_tree_nodes:
                            trees[key].add(numbers[part])
                            heads.add(_head(run[0]))
                            outlines[_outline(run[0])].add(tuple(map(_outline, run[1:])))
        ordered = sorted(grams)
        hashes = np.array([value for value, _ in ordered], np.uint64)
        flags = np.zeros(1 << _TABLE_BITS, bool)
        flags[hashes >> np.uint64(64 - _TABLE_BITS)] = True
        return cls(
            config=config,
            checksums=checksums,
            owners=tuple(owners),
            gram_hashes=hashes,
            gram_owners=np.array([owner for _, owner in ordered], np.int32),
            gram_flags=flags,
            tree_owners={key: tuple(sorted(numbers)) for key, numbers in trees.items()},
            tree_heads=frozenset(heads),
            tree_outlines={first: tuple(rest) for first, rest in outlines.items()},
        )

    def word_matches(self, texts: Sequence[str]) -> list[list[Match]]:
        """For each of `texts`, the problems that share n-grams with it."""
        found: list[list[Match]] = [[] for _ in texts]
        encoded = [text.encode() for text in texts]
        offsets = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        buffer = np.frombuffer(b"".join(encoded), np.uint8)
        hashes, starts = shingle_hashes(buffer, offsets, self.config.ngram_words)
        suspects = np.flatnonzero(self.gram_flags[hashes >> np.uint64(64 - _TABLE_BITS)])
        first = np.searchsorted(self.gram_hashes, hashes[suspects], side="left")
        last = np.searchsorted(self.gram_hashes, hashes[suspects], side="right")
        by_text: dict[int, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
        for suspect, low, high in zip(suspects.tolist(), first.tolist(), last.tolist(), strict=True):
            text = int(np.searchsorted(starts, suspect, side="right")) - 1
            for owner in self.gram_owners[low:high].tolist():
                by_text[text][owner].append(suspect - int(starts[text]))
        for text, by_owner in by_text.items():
            words = [match.span() for match in _WORD.finditer(encoded[text])]
            for owner, places in sorted(by_owner.items()):
                start, end = words[places[0]][0], words[places[0] + self.config.ngram_words - 1][1]
                line = encoded[text].count(b"\n", 0, start) + 1
                shown = encoded[text][start:end].decode(errors="replace")
                found[text].append(Match(self.owners[owner], "words", line, len(places), shown))
        return found

    def tree_matches(self, text: str, tree: ast.Module) -> list[Match]:
        """The problems that share a run of statements with `text`, which parses as `tree`."""
        found: dict[int, list[list[ast.stmt]]] = defaultdict(list)
        heads, outlines = self.tree_heads, self.tree_outlines
        for block in _blocks(tree):
            for index, statement in enumerate(block):
                if _head(statement) not in heads:
                    continue
                for rest in outlines.get(_outline(statement), ()):
                    run = block[index : index + 1 + len(rest)]
                    if all(map(eq, rest, map(_outline, run[1:]))) and len(run) == 1 + len(rest):
                        for owner in self.tree_owners.get(fingerprint(run)[0], ()):
                            found[owner].append(run)
        lines = LineIndex(text) if found else None
        return [
            Match(self.owners[owner], "tree", runs[0][0].lineno, len(runs), _source(lines, runs[0]))
            for owner, runs in sorted(found.items())
            if lines is not None
        ]


def _source(lines: LineIndex, run: list[ast.stmt]) -> str:
    first, last = run[0], run[-1]
    end = lines.offset(last.end_lineno or last.lineno, last.end_col_offset or 0)
    return lines.source[lines.offset(first.lineno, first.col_offset) : end]


def _programs(problem: Problem) -> Iterator[tuple[str, int]]:
    """The prompt with each solution, and where the solution starts. A prompt without solutions stands alone."""
    for solution in problem.canonical_solutions or ("",):
        yield problem.prompt + solution, len(problem.prompt)


def _grams(program: str, boundary: int, config: DecontaminationConfig) -> Iterator[tuple[int, str]]:
    """Hashes of the n-grams that prove something, and the part that each starts in."""
    encoded, prompt_bytes = program.encode(), len(program[:boundary].encode())
    hashes, _ = shingle_hashes(
        np.frombuffer(encoded, np.uint8), np.array([0, len(encoded)], np.int64), config.ngram_words
    )
    imported = {place for line in _IMPORT_LINE.finditer(encoded) for place in range(*line.span())}
    words = [(word.start(), word[0]) for word in _WORD.finditer(encoded)]
    said = [word if not word[:1].isdigit() and start not in imported else None for start, word in words]
    for index, value in enumerate(hashes.tolist()):
        if len({*said[index : index + config.ngram_words]} - {None}) >= config.min_ngram_letters:
            yield value, "prompt" if words[index][0] < prompt_bytes else "solution"


def _runs(program: str, boundary: int, entry_point: str | None) -> Iterator[tuple[str, list[ast.stmt]]]:
    """The runs of statements to search for: the solution, and the bodies of the prompt's other functions.

    A prompt's top-level code is matched only by words: any test that makes an array has the same trees.
    """
    tree = parse(program)
    if isinstance(tree, Dropped):
        return
    lines = LineIndex(program)

    def is_solved(node: ast.stmt) -> bool:
        return lines.offset(node.end_lineno or 0, node.end_col_offset or 0) > boundary

    block: list[ast.stmt] = tree.body
    while True:
        solution = [node for node in block if is_solved(node)]
        for node in block:
            if isinstance(node, _FUNCTIONS) and not is_solved(node) and node.name != entry_point:
                yield "prompt", _body(node)
        started = solution and lines.offset(solution[0].lineno, solution[0].col_offset) < boundary
        if not (started and isinstance(solution[0], _FUNCTIONS)):
            break
        yield "solution", solution[1:]
        block = _body(solution[0])
    yield "solution", solution


_FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef
_NAMING = ast.Name | ast.arg | _FUNCTIONS | ast.ClassDef | ast.ExceptHandler
_BUILTINS = frozenset(dir(builtins))
# Fields that do not change what a statement does, or that only a type checker reads.
_LEFT_OUT = {"ctx", "type_comment", "annotation", "returns", "kind", "type_ignores", "simple"}


def _body(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.stmt]:
    return function.body[ast.get_docstring(function, clean=False) is not None :]


_KINDS: tuple[type[ast.AST], ...] = (*ast.stmt.__subclasses__(), ast.ExceptHandler, ast.match_case)
_NESTED = {
    kind: tuple(field for field in ("body", "handlers", "orelse", "finalbody", "cases") if field in kind._fields)
    for kind in _KINDS
}


def _blocks(tree: ast.Module) -> Iterator[list[ast.stmt]]:
    """Every list of statements in `tree`. Lists of handlers and cases are included, and never match statements."""
    blocks: list[list[Any]] = [tree.body]
    while blocks:
        block = blocks.pop()
        yield block
        for node in block:
            for field in _NESTED[type(node)]:
                inner = getattr(node, field)
                if inner:
                    blocks.append(inner)


_HAS_BODY = {kind for kind, fields in _NESTED.items() if "body" in fields}
_HAS_VALUE = {kind for kind in _NESTED if "value" in kind._fields}


def _head(statement: ast.AST) -> Head:
    """A statement's outermost form, which renaming does not change."""
    kind = type(statement)
    if kind in _HAS_BODY and kind not in (ast.FunctionDef, ast.AsyncFunctionDef):  # a docstring does not count
        return kind, len(statement.body)  # type: ignore[attr-defined]
    if kind not in _HAS_VALUE:
        return kind, None
    value = statement.value  # type: ignore[attr-defined]
    if type(value) is not ast.Call:
        return kind, type(value)
    called = value.func
    if type(called) is ast.Attribute:
        return kind, called.attr, len(value.args)
    return kind, called.id if type(called) is ast.Name and called.id in _BUILTINS else None, len(value.args)


def _outline(statement: ast.AST) -> Head:
    """`_head`, with the kinds of the parts of the statement, its value and its test."""
    parts: list[object] = [*_head(statement)]
    for node in (statement, getattr(statement, "value", None), getattr(statement, "test", None)):
        for field in node._fields if isinstance(node, ast.AST) else ():
            part = getattr(node, field)
            if field not in _LEFT_OUT and field not in ("body", "orelse"):
                parts.append((len(part), *map(type, part[:1])) if isinstance(part, list) else type(part))
    return tuple(parts)


def fingerprint(run: Iterable[ast.stmt]) -> tuple[str, int]:
    """A digest of the statements' tree that ignores names, numbers and strings, and the tree's number of nodes.

    Names are numbered by their first use in the run. Constants, contexts and annotations do not count as nodes.
    """
    numbers: dict[str, int] = {}
    parts: list[str] = []
    nodes = 0
    stack: list[ast.AST | str] = [*run]  # not recursive: `a + b + ...` is as deep as it is long
    stack.reverse()
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            parts.append(item)
        elif isinstance(item, ast.Constant):
            parts.append(repr(item.value) if item.value is None or isinstance(item.value, bool) else "constant")
        else:
            nodes += 1
            stack += [*_children(item, numbers)][::-1]
    return xxhash.xxh3_128_hexdigest(" ".join(parts).encode()), nodes


def _children(node: ast.AST, numbers: dict[str, int]) -> Iterator[ast.AST | str]:
    """The parts of `node`, its type first. Lists end with a mark, so that different trees never look the same."""
    yield type(node).__name__
    for field, value in ast.iter_fields(node):
        if field in _LEFT_OUT:
            continue
        if isinstance(value, str):
            is_name = isinstance(node, _NAMING) and value not in _BUILTINS
            yield f"#{numbers.setdefault(value, len(numbers))}" if is_name else value
        elif isinstance(value, list):
            items = _body(node) if field == "body" and isinstance(node, _FUNCTIONS) else value
            yield from (item if isinstance(item, ast.AST) else "," for item in items)
            yield ";"
        else:
            yield value if isinstance(value, ast.AST) else "-"
