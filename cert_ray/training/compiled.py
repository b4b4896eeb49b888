"""Keeps what torch.compile made on this machine, so that a resumed run, or one like it, does not compile again.

In: what the compiled code depends on. Out: a folder of this process's own for torch's compiler, filled with what was
kept, and a function that keeps what is new. Processes never share a folder while they compile: torch 2.13 writes
libraries in place, so a process killed meanwhile leaves half a file, on which all later ones fail ("file too short").
Files are named by their content. So they are copied one by one, each whole or not at all, by any number of processes.
A kept file's name ends in its checksum; one that is damaged is dropped when a run begins.

Kept below the user's own cache folder, since it is code that will run.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import torch
import xxhash

from cert_ray import storage
from cert_ray.errors import CertRayError
from cert_ray.telemetry.machine import machine
from cert_ray.training.config import TrainConfig
from cert_ray.training.scratch import scratch_folder

_log = logging.getLogger(__name__)

FOLDER_VARIABLE: Final = "TORCHINDUCTOR_CACHE_DIR"
_TORCHS_OWN: Final = "torchinductor_"  # imports may set the variable to torch's shared folder, named so
_MOST_KEPT: Final = 16  # kinds of run, those used last; assumed

Keep = Callable[[], None]  # keeps what was compiled since the last call


def kind_of(config: TrainConfig, model: torch.nn.Module, context_tokens: int) -> str:
    """Digest that tells apart runs whose compiled code differs; finer differences are torch's own to compare.

    The machine is part of it: libraries are built for its processor, and the cache folder may be on a shared disk.
    """
    options = (context_tokens, config.micro_batch, config.precision, config.zero_stage, config.deterministic)
    told = "\n".join([torch.__version__, machine(), str(model), *map(str, options)])
    return str(xxhash.xxh3_128_hexdigest(told.encode()))


@contextmanager
def compiled_code(kind: str) -> Iterator[Keep]:
    """For the block, torch compiles into a folder of this process's own, or into the one that the user has set."""
    before = os.environ.get(FOLDER_VARIABLE)
    if before is not None and not Path(before).name.startswith(_TORCHS_OWN):
        yield lambda: None
        return
    with scratch_folder("compiled") as own:
        _unless_it_fails(_begin, kind, own)
        os.environ[FOLDER_VARIABLE] = str(own)
        try:
            yield lambda: _unless_it_fails(_keep, kind, own)
        finally:
            os.environ.pop(FOLDER_VARIABLE)
            if before is not None:
                os.environ[FOLDER_VARIABLE] = before


def _unless_it_fails(copy: Callable[[str, Path], None], kind: str, own: Path) -> None:
    try:
        copy(kind, own)
    except (OSError, RuntimeError, CertRayError) as error:  # no room, no rights, no home; or another process removes it
        _log.warning("compiled code could not be kept or reused, so a later start compiles again: %s", error)


def _begin(kind: str, own: Path) -> None:
    kept = storage.cache_folder("compiled") / kind
    kept.mkdir(parents=True, exist_ok=True)
    os.utime(kept)
    for path in _files(kept):
        copy = own / path.relative_to(kept).with_suffix("")
        copy.parent.mkdir(parents=True, exist_ok=True)
        if storage.copy_to_local(str(path), copy).checksum != path.suffix[1:]:  # damaged: it is compiled and kept anew
            copy.unlink()
            path.unlink()
    for folder in sorted(kept.parent.iterdir(), key=lambda folder: folder.stat().st_mtime)[:-_MOST_KEPT]:
        shutil.rmtree(folder, ignore_errors=True)  # others of this machine do the same


def _keep(kind: str, own: Path) -> None:
    kept = storage.cache_folder("compiled") / kind
    known = {path.relative_to(kept).with_suffix("") for path in _files(kept)}
    for path in _files(own):
        name = path.relative_to(own)
        if name not in known:
            storage.copy_from_local(path, f"{kept / name}.{storage.checksum(str(path)).checksum}")


def _files(folder: Path) -> Iterator[Path]:
    """Its files, without locks, which are empty, and without what a killed process left of a copy."""
    for entry in storage.list_files(str(folder)):
        path = Path(entry.url)
        if entry.size_bytes and not path.name.startswith("."):
            yield path
