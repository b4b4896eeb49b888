"""Folders below TMPDIR for what a worker assembles or copies: gigabytes, which a kill leaves there.

In: what a folder is for. Out: an empty folder, removed when its block ends. Beside it is a file that its owner keeps
locked (flock); the system releases the lock when the process dies, however it dies. So `remove_left`, called when the
next worker starts, can tell abandoned folders from those that other runs on this machine use. Forked processes hold the
lock, too.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

_log = logging.getLogger(__name__)

_PREFIX: Final = "cert-ray-training-"
_LOCK, _FILES = "lock", "files"


@contextmanager
def scratch_folder(kind: str) -> Iterator[Path]:
    """An empty folder below TMPDIR, only for the block, with `kind` in its path."""
    outer = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{kind}-"))
    try:
        with (outer / "new").open("wb") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            (outer / "new").rename(outer / _LOCK)  # `remove_left` sees it from now on, already locked
            (outer / _FILES).mkdir()
            yield outer / _FILES
            shutil.rmtree(outer / _FILES, ignore_errors=True)  # while the lock is held
    finally:
        shutil.rmtree(outer, ignore_errors=True)


def remove_left() -> None:
    """Remove this user's scratch folders below TMPDIR that no process holds."""
    for outer in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        try:
            found = outer.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
                continue
            with (outer / _LOCK).open("r+b") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _log.info("removing %s, which a process that was killed left", outer)
                shutil.rmtree(outer / _FILES)
                shutil.rmtree(outer)
        except OSError:  # locked, or already gone
            continue
