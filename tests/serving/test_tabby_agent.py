"""Tabby's own agent, where it is installed, finds this server ready, shows its answers, and says when a key is wanted.

No Debian package has it. By hand: `npm install tabby-agent`, and TABBY_AGENT=node_modules/tabby-agent/dist/cli.js.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from cert_ray.serving.api_keys import read_key_file
from cert_ray.serving.boundaries import PAPER_STOPS
from cert_ray.serving.http import create_app
from tests.serving.front_doors import ScriptedBackend, listening
from tests.serving.tabby_agent import agent, begun, completed

NODE, CLI = shutil.which("node"), os.environ.get("TABBY_AGENT")
COMMAND = [NODE or "", CLI or ""]
KEY = "a-key-of-the-tests"

pytestmark = pytest.mark.skipif(
    not all(COMMAND), reason="no node, or no npm package tabby-agent: TABBY_AGENT=.../tabby-agent/dist/cli.js"
)


@pytest.fixture
def backend() -> ScriptedBackend:
    return ScriptedBackend()


@pytest.fixture
def server(backend: ScriptedBackend, tmp_path: Path) -> Iterator[str]:
    (tmp_path / "keys").write_text(f"{KEY}\n")
    with listening(create_app(backend, keys=read_key_file(str(tmp_path / "keys")))) as url:
        yield f"{url}/tabby"


def test_an_editor_is_offered_the_answer_behind_what_it_sends(server: str, backend: ScriptedBackend) -> None:
    with agent(COMMAND, server, KEY, lsp=True) as editor:
        assert begun(editor) == []
        assert completed(editor, "import numpy as np\nx") == ["x = 0"]  # the word at the cursor is written again
    [(_, prompts, sampling)] = backend.asked
    assert (prompts, sampling.stop) == (["import numpy as np\nx"], PAPER_STOPS)


def test_the_imports_of_a_long_file_come_with_it_where_the_agent_is_told_to_send_them(
    server: str, backend: ScriptedBackend
) -> None:
    """By itself it sends twenty lines: the model is then chosen without the file's imports."""
    text = "import numpy as np\n" + "".join(f"y{place} = {place}\n" for place in range(40)) + "x"
    for prefix_lines in (None, 200):
        with agent(COMMAND, server, KEY, lsp=True, prefix_lines=prefix_lines) as editor:
            begun(editor)
            completed(editor, text)
    assert [prompt.count("\n") for _, (prompt,), _ in backend.asked] == [19, 41]


@pytest.mark.parametrize("key", [None, "another"])
def test_an_editor_without_the_key_is_told_so(server: str, backend: ScriptedBackend, key: str | None) -> None:
    with agent(COMMAND, server, key, lsp=True) as editor:
        assert begun(editor) == ["Tabby agent status: unauthorized"]
        assert completed(editor, "x") == []
    assert backend.asked == []


def test_the_agent_knows_the_server_and_tells_its_maker_nothing(server: str) -> None:
    with agent(COMMAND, server, KEY, lsp=False) as editor:
        editor.ask("initialize", {})
        assert editor.ask("getStatus") == "ready"
        assert editor.ask("getServerHealthState")["model"] == "org/cert"
        event = {"type": "select", "completion_id": "cmpl-1", "choice_index": 0, "select_kind": "line"}
        assert editor.ask("postEvent", event) is True
        assert editor.ask("getIssues") == []
