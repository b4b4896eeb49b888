"""`faulty://` URLs: the files of this machine behind a storage that is slow and fails, as an object store may.

In: `CHAOS_STORAGE`, JSON with `delay_s` of every call, and `fail_every` and `marks`: of so many paths one fails, the
first time that it is opened. Which one depends on its name alone, and a file below `marks` remembers that it has, so
several processes fail together but once. It is no local disk to `cert_ray.storage`: nothing is renamed.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import fsspec
import xxhash
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractFileSystem

VARIABLE = "CHAOS_STORAGE"
PROTOCOL = "faulty"


def register() -> None:
    """Make `faulty://` URLs known to this process."""
    fsspec.register_implementation(PROTOCOL, FaultyFileSystem, clobber=True)


class FaultyFileSystem(AbstractFileSystem):  # type: ignore[misc]
    """The local files, with delays and failures."""

    protocol = PROTOCOL
    cachable = False

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._local = LocalFileSystem()
        settings = json.loads(os.environ.get(VARIABLE, "{}"))
        self._delay_s = float(settings.get("delay_s", 0))
        self._fail_every = settings.get("fail_every")
        self._marks = settings.get("marks")

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + str(path).removeprefix(f"{PROTOCOL}://").strip("/")

    def _wait(self) -> None:
        time.sleep(self._delay_s)

    def _fail_once(self, path: str) -> None:
        digest = xxhash.xxh3_64_hexdigest(path.encode())
        if self._fail_every is None or int(digest, 16) % self._fail_every:
            return
        try:
            Path(self._marks, digest).touch(exist_ok=False)
        except FileExistsError:
            return
        raise OSError(5, "Input/output error (injected)", path)

    def ls(self, path: str, detail: bool = True, **_: Any) -> Any:
        self._wait()
        return self._local.ls(self._strip_protocol(path), detail=detail)

    def info(self, path: str, **_: Any) -> Any:
        self._wait()
        return self._local.info(self._strip_protocol(path))

    def _open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        self._wait()
        self._fail_once(path)
        if "w" in mode:
            Path(path).parent.mkdir(parents=True, exist_ok=True)  # an object store has no folders
        return self._local.open(path, mode)

    def rm_file(self, path: str) -> None:
        self._wait()
        self._local.rm_file(self._strip_protocol(path))

    def rmdir(self, path: str) -> None:
        self._local.rmdir(self._strip_protocol(path))

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        self._local.makedirs(self._strip_protocol(path), exist_ok=exist_ok)
