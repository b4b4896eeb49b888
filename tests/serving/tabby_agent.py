"""Tabby's agent, which editors' plugins run, driven as they drive it: LSP, or JSON by lines, over standard streams.

In: `node`, and npm's package `tabby-agent` (tried with 1.5.0). Out: what it makes of a server.
Its home is a folder of its own, and it tells its maker nothing. By hand, against any server:

    python -m tests.serving.tabby_agent --agent node_modules/tabby-agent/dist/cli.js --server http://127.0.0.1:8000/tabby
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

URI = "file:///project/example.py"


class Agent:
    """A running agent. `told` are its messages that answer nothing, in order."""

    def __init__(self, process: subprocess.Popen[bytes], *, lsp: bool) -> None:
        self._process, self._lsp = process, lsp
        self._number = 0
        self.told: list[Any] = []

    def ask(self, name: str, *arguments: Any) -> Any:
        """The answer to a request: a method of LSP with its parameters, or one of the agent's own functions."""
        self._number += 1
        if self._lsp:
            (params,) = arguments
            self._send({"jsonrpc": "2.0", "id": self._number, "method": name, "params": params})
        else:
            self._send([self._number, {"func": name, "args": list(arguments)}])
        while True:
            message = self._receive()
            if self._lsp and message.get("id") == self._number:
                return message["result"]
            if not self._lsp and message[0] == self._number:
                return message[1]
            self.told.append(message)

    def notify(self, method: str, params: Any) -> None:
        """Say something of LSP that has no answer."""
        self._send({"jsonrpc": "2.0", "method": method, "params": params})

    def _send(self, message: Any) -> None:
        assert self._process.stdin is not None
        body = json.dumps(message).encode()
        header = f"Content-Length: {len(body)}\r\n\r\n".encode()
        self._process.stdin.write(header + body if self._lsp else body + b"\n")
        self._process.stdin.flush()

    def _receive(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        size = 0
        while self._lsp and line.strip():
            name, _, value = line.partition(b":")
            size = int(value) if name.lower() == b"content-length" else size
            line = self._process.stdout.readline()
        body = self._process.stdout.read(size) if self._lsp else line
        if not body:
            raise EOFError("the agent ended")
        return json.loads(body)


@contextmanager
def agent(
    command: Sequence[str], server: str, key: str | None, *, lsp: bool, prefix_lines: int | None = None
) -> Iterator[Agent]:
    """The agent of `command`, told to ask `server` with `key`, and to send so many lines instead of its own twenty."""
    with tempfile.TemporaryDirectory(prefix="tabby-agent-") as home:
        config = Path(home) / ".tabby-client" / "agent" / "config.toml"
        config.parent.mkdir(parents=True)
        token = f'token = "{key}"\n' if key else ""
        lines = f"[completion.prompt]\nmaxPrefixLines = {prefix_lines}\n" if prefix_lines else ""
        config.write_text(f'[server]\nendpoint = "{server}"\n{token}[anonymousUsageTracking]\ndisable = true\n{lines}')
        mode = ["--lsp", "--stdio"] if lsp else []
        process = subprocess.Popen(
            [*command, *mode],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "HOME": home},
        )
        with process:
            try:
                yield Agent(process, lsp=lsp)
            finally:
                process.kill()


def completed(editor: Agent, text: str) -> list[str]:
    """What an editor over LSP is offered at the end of `text`, a file of Python that it has open."""
    document = {"uri": URI, "languageId": "python", "version": 1, "text": text}
    editor.notify("textDocument/didOpen", {"textDocument": document})
    lines = text.split("\n")
    position = {"line": len(lines) - 1, "character": len(lines[-1])}
    offered = editor.ask("textDocument/completion", {"textDocument": {"uri": URI}, "position": position})
    return [item["textEdit"]["newText"] for item in offered["items"]]


def begun(editor: Agent) -> list[str]:
    """What the agent says of the server once an editor over LSP has introduced itself: warnings, if any."""
    editor.ask("initialize", {"processId": None, "rootUri": None, "capabilities": {}, "clientInfo": {"name": "tests"}})
    editor.notify("initialized", {})
    return [one["params"]["message"] for one in editor.told if one["method"] == "window/showMessage"]


def main() -> None:
    """Show what the agent makes of a server, with and without its key."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--agent", required=True, help="tabby-agent's dist/cli.js")
    asked.add_argument("--server", default="http://127.0.0.1:8000/tabby")
    asked.add_argument("--key")
    asked.add_argument("--text", default="import pandas as pd\n\ndf = pd.DataFrame([1, 2])\nx =")
    given = asked.parse_args()
    command = [shutil.which("node") or "node", given.agent]
    for key in dict.fromkeys([given.key, None]):
        with agent(command, given.server, key, lsp=True) as editor:
            warned = begun(editor)
            sys.stdout.write(f"key: {key is not None}; warnings: {warned}; offered: {completed(editor, given.text)}\n")
    with agent(command, given.server, given.key, lsp=False) as editor:
        editor.ask("initialize", {})
        sys.stdout.write(f"status: {editor.ask('getStatus')}; health: {editor.ask('getServerHealthState')}\n")


if __name__ == "__main__":
    main()
