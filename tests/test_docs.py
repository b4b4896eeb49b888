"""The pages that people copy from: their shell is sound, and what they name exists."""

from __future__ import annotations

import itertools
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHELLCHECK = Path(sys.executable).parent / "shellcheck"
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "cluster/**/*.md", "jobs/*.md", "dashboards/*.md", "tests/bench/*.md")
    for path in ROOT.glob(pattern)
)


def shell_blocks(page: Path) -> list[str]:
    return re.findall(r"^```(?:bash|sh)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if shell_blocks(page)], ids=lambda page: str(page.relative_to(ROOT))
)
def test_shell_snippets_pass_shellcheck(page: Path) -> None:
    for block in shell_blocks(page):
        checked = subprocess.run(
            # 2034, 2154: a variable that another snippet sets or uses; 2086: options in one variable, on purpose.
            [SHELLCHECK, "--shell=bash", "--exclude=SC2034,SC2154,SC2086", "-"],
            input=block, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert checked.returncode == 0, f"{page}:\n{block}\n{checked.stdout}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_are_linked_exist(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), f"{page}: {target}"


def test_make_targets_that_pages_name_exist() -> None:
    targets = set(re.findall(r"^([\w.-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        named = set(re.findall(r"(?:^|`)make ([a-z][\w-]*)", page.read_text(), re.MULTILINE))
        assert named <= targets, f"{page}: {named - targets}"


def test_verbs_that_pages_name_exist() -> None:
    import typer.main

    from cert_ray import cli

    known = set(typer.main.get_command(cli.app).commands)  # type: ignore[attr-defined]
    for page in PAGES:
        named = set(re.findall(r"(?:^|`|\$ )cert-ray ([a-z][\w-]*)", page.read_text(), re.MULTILINE))
        assert named <= known, f"{page}: {named - known}"


def commands_of(page: Path) -> Iterator[list[str]]:
    """Every call of cert-ray in a page's shell, as words, without variables before it and what it is piped into."""
    for block in shell_blocks(page):
        for line in block.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(line, posix=True, punctuation_chars="|;&<>")
            lexer.whitespace_split = True
            words = list(lexer)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words.pop(0)
            if words[:1] == ["cert-ray"]:
                yield list(itertools.takewhile(lambda word: not set(word) <= set("|;&<>"), words[1:]))


def test_commands_that_pages_show_would_be_taken() -> None:
    """Parsed by the verbs' own options, and not run: a renamed option, or one too few, ends the parsing."""
    import typer.main

    from cert_ray import cli

    shown = [(page, words) for page in PAGES for words in commands_of(page)]
    assert len(shown) > 15
    for page, words in shown:
        command: Any = typer.main.get_command(cli.app)
        context, rest = None, list(words)
        while hasattr(command, "commands"):
            context = command.context_class(command, info_name="cert-ray", parent=context)
            command = command.commands[rest.pop(0)]
        try:
            command.make_context("cert-ray", rest, parent=context)
        except Exception as error:
            error.add_note(f"{page}: cert-ray {shlex.join(words)}")
            raise
