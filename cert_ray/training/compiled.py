"""What torch.compile makes, kept on this machine: a run that goes on, and one like it, does not compile again.

In: what the compiled code depends on. Out: a folder of this process's own for torch's compiler, which begins with what
was kept, and a way to keep what is new. No folder is shared while torch compiles: one that is killed while it writes a
library leaves a part of it, on which every later one fails ("file too short", seen with torch 2.13). Files are named by
what they hold, so they are copied one by one, each whole or not at all, by any number of processes at once.

Kept below the user's own cache folder, since it is code that will run.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
import xxhash

from cert_ray import storage
from cert_ray.errors import CertRayError
from cert_ray.telemetry.machine import machine
from cert_ray.training.config import TrainConfig
from cert_ray.training.scratch import scratch_folder

_log = logging.getLogger(__name__)

FOLDER_VARIABLE: Final = "TORCHINDUCTOR_CACHE_DIR"
_TORCHS_OWN: Final = "torchinductor_"  # what is imported may set the variable, to torch's shared folder
_MOST_KEPT: Final = 16  # kinds of run, those used last: assumed

Keep = Callable[[], None]  # keeps what was compiled since


def kind_of(config: TrainConfig, model: torch.nn.Module, context_tokens: int) -> str:
    """Digest of what tells runs apart that compile other code; torch compares the rest.

    The machine is part of it: libraries are for the processor at hand, and the cache folder may be on a shared disk.
    """
    options = (context_tokens, config.micro_batch, config.precision, config.zero_stage, config.deterministic)
    told = "\n".join([torch.__version__, machine(), str(model), *map(str, options)])
    return str(xxhash.xxh3_128_hexdigest(told.encode()))


@contextmanager
def compiled_code(kind: str) -> Iterator[Keep]:
    """For the block, torch compiles into this process's own folder; or into the one that the user set, if any."""
    before = os.environ.get(FOLDER_VARIABLE)
    if before is not None and not Path(before).name.startswith(_TORCHS_OWN):
        yield lambda: None
        return
    with scratch_folder("compiled") as own:
        kept = storage.cache_folder("compiled") / kind
        _unless_it_fails(_begin, kept, own)
        os.environ[FOLDER_VARIABLE] = str(own)
        try:
            yield lambda: _unless_it_fails(_keep, own, kept)
        finally:
            os.environ.pop(FOLDER_VARIABLE)
            if before is not None:
                os.environ[FOLDER_VARIABLE] = before


def _unless_it_fails(copy: Callable[[Path, Path], Any], source: Path, target: Path) -> None:
    try:
        copy(source, target)
    except (OSError, CertRayError) as error:  # no room, no rights, or another process removes it
        _log.warning("compiled code is not kept or not found again, which costs the next start a minute: %s", error)


def _begin(kept: Path, own: Path) -> None:
    kept.mkdir(parents=True, exist_ok=True)
    os.utime(kept)
    for folder in sorted(kept.parent.iterdir(), key=lambda folder: folder.stat().st_mtime)[:-_MOST_KEPT]:
        shutil.rmtree(folder)
    shutil.copytree(kept, own, dirs_exist_ok=True)


def _keep(own: Path, kept: Path) -> None:
    for entry in storage.list_files(str(own)):
        target = kept / Path(entry.url).relative_to(own)
        if not target.exists() and target.suffix != ".lock":
            storage.copy_from_local(Path(entry.url), str(target))
