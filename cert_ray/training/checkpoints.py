"""Checkpoints that verify themselves. In: folders with one part per worker. Out: the newest intact one, or an error.

    CHECKPOINTS/step-000040/engine/...        written by the engine, each worker its part
                            model/, tokenizer/, records.jsonl     by worker 0
                            part-00000.json   per worker: its files with checksums
                            complete.json     last, once every part has arrived

A folder without `complete.json` was cut short by a kill: it counts as absent, and is removed when a run starts. One
that has it but disagrees with its parts is damaged: it is refused by name, and the one before it is used. `worker`
decides who writes where and when.
"""

from __future__ import annotations

import errno
import functools
import logging
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import pydantic
from safetensors import SafetensorError

from cert_ray import storage
from cert_ray.config import Config
from cert_ray.errors import CheckpointError, ConfigError, DamagedCheckpointError, DiskFullError, NoWholeCheckpointError
from cert_ray.manifests import WrittenFile

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
FOLDER_NAME = "checkpoints"
ROOM_FOR_COPIES = "Free some, or set TMPDIR, and run the same again."  # what to do if a copy has no room
_COMPLETE = "complete.json"
_READ_AT_ONCE = 8  # files of an object store, whose single streams are slow; assumed
_NAME = re.compile(r"step-(\d{6,})")
_FULL = (errno.ENOSPC, errno.EDQUOT)
_TORCH_CANNOT_WRITE = "inline_container"  # all that the RuntimeError of torch.save (2.13) says of a full disk


class Part(Config):
    """What one worker wrote into a checkpoint."""

    step: int
    rank: int
    world_size: int
    zero_stage: int
    run_digest: str
    files: tuple[WrittenFile, ...]


def folder_of(output: str) -> str:
    """The folder of the checkpoints of the run that writes to `output`."""
    return storage.join(output, FOLDER_NAME)


def name_of_step(step: int) -> str:
    """The checkpoint's folder name; names sort like steps."""
    return f"step-{step:06d}"


def _part_name(rank: int) -> str:
    return f"part-{rank:05d}.json"


def seal_part(folder: Path, *, step: int, rank: int, world_size: int, zero_stage: int, run_digest: str) -> Part:
    """List what this worker wrote into its local `folder`, with checksums, in a part file there."""
    files = []
    for entry in storage.list_files(str(folder)):
        name = Path(entry.url).relative_to(folder).as_posix()
        files.append(WrittenFile.of(name, storage.checksum(entry.url)))
    part = Part(
        step=step, rank=rank, world_size=world_size, zero_stage=zero_stage, run_digest=run_digest, files=tuple(files)
    )
    storage.write_text(str(folder / _part_name(rank)), part.model_dump_json(indent=1) + "\n")
    return part


@contextmanager
def full_disk_told(what: str, output: str | None, cure: str) -> Iterator[None]:
    """Turn errors of a full disk into `DiskFullError`, for a block that writes `what` below TMPDIR, then to `output`.

    `output` is None if it writes only below TMPDIR. The block may read torch's files only after verifying them, because
    torch reports a damaged file like a full disk.

    Raises:
        DiskFullError: when a disk is full; says how much room is where, and `cure`.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if not is_of_a_full_disk(error):
            raise
        places = {"TMPDIR": Path(tempfile.gettempdir())}
        if output is not None and storage.is_local(output):
            places["the output"] = storage.local_path(output)
        free = [f"{path} ({what}) has {_free_bytes(path) / 1e6:,.0f} MB" for what, path in places.items()]
        way = "" if output is None else "It is put together below TMPDIR, then copied below the output. "
        raise DiskFullError(f"{what} cannot be written, a disk is full: {'; '.join(free)} left. {way}{cure}") from error


def is_of_a_full_disk(error: Exception) -> bool:
    """Whether `error`, from Python, torch or safetensors, says that a disk is full."""
    said = str(error)
    return (
        getattr(error, "errno", None) in _FULL
        or _TORCH_CANNOT_WRITE in said
        or any(f"(os error {number})" in said for number in _FULL)  # as safetensors says it
    )


def _free_bytes(path: Path) -> int:
    """Free bytes of the disk that `path` is on, or will be."""
    return shutil.disk_usage(next(folder for folder in (path, *path.parents) if folder.exists())).free


def mark_complete(checkpoint: str, world_size: int) -> None:
    """Mark `checkpoint`, in which every part has arrived: from now on, it counts."""
    storage.write_text(storage.join(checkpoint, _COMPLETE), f'{{"world_size": {world_size}}}\n')


def complete_checkpoints(folder: str) -> list[tuple[int, str]]:
    """Step and URL of the complete checkpoints below `folder`, oldest first."""
    return [(step, url) for step, url, complete in _found(folder) if complete]


def newest(folder: str) -> tuple[int, str] | None:
    """Step and URL of the newest complete checkpoint below `folder`, or None."""
    found = complete_checkpoints(folder)
    return found[-1] if found else None


def remove_incomplete(folder: str) -> None:
    """Remove what a kill left unfinished below `folder`."""
    for _, url, complete in _found(folder):
        if not complete:
            _log.warning("removing %s, which a kill left unfinished", url)
            storage.remove(url)


def check_run(folder: str, run_digest: str) -> None:
    """Raise `CheckpointError` if the newest checkpoint below `folder` is another run's. Only its first part is read."""
    for _, url in reversed(complete_checkpoints(folder)):
        with suppress(DamagedCheckpointError):  # `newest_readable` reports it
            first_part(url, run_digest)
            return


def newest_readable(
    found: Sequence[tuple[int, str]], read: Callable[[str], _T]
) -> tuple[int, _T, dict[str, DamagedCheckpointError]] | None:
    """The newest of the checkpoints `found` (step and URL, oldest first) that `read` does not find damaged.

    Returns its step, what `read` returned, and the damage of newer ones, by URL; None if `found` is empty.

    Raises:
        NoWholeCheckpointError: when all are damaged.
    """
    damage: dict[str, DamagedCheckpointError] = {}
    for step, url in reversed(found):
        try:
            return step, read(url), damage
        except DamagedCheckpointError as error:
            damage[url] = error
    if damage:
        raise NoWholeCheckpointError(" ".join(map(str, damage.values())))
    return None


def remove_damaged(damaged: Mapping[str, DamagedCheckpointError]) -> None:
    """Remove the checkpoints at these URLs, and log why; the run continues from one before them."""
    for url, error in damaged.items():
        _log.warning("removing the damaged %s and going on from the checkpoint before it: %s", url, error)
        _remove(url)


def to_remove(steps: Sequence[int], keep_newest: int, held_out: Mapping[int, float] | None) -> list[int]:
    """Which of the checkpoints of `steps`, oldest first, need not be kept: all except the newest and the best.

    The best has the lowest of the `held_out` losses, given by step; of equals, the earlier. None: the best is not kept.
    """
    kept = set(steps[-keep_newest:])
    measured = [step for step in steps if held_out and step in held_out]
    if held_out and measured:
        kept.add(min(measured, key=lambda step: held_out[step]))
    return [step for step in steps if step not in kept]


def prune(folder: str, keep_newest: int, held_out: Mapping[int, float] | None) -> None:
    """Remove the complete checkpoints below `folder` that `to_remove` names. Verify the newest before calling this."""
    found = dict(complete_checkpoints(folder))
    for step in to_remove(list(found), keep_newest, held_out):
        _remove(found[step])


def _remove(checkpoint: str) -> None:
    """Remove `checkpoint` so that a kill in between leaves one that counts as absent, not as damaged."""
    storage.remove(storage.join(checkpoint, _COMPLETE))
    storage.remove(checkpoint)


def verify(checkpoint: str, run_digest: str | None = None, only_rank: int | None = None) -> Part:
    """Compare the files of `checkpoint` with its parts, of all workers or of one; return worker 0's part.

    Raises:
        CheckpointError: naming the file that is missing or damaged, or when `run_digest` belongs to another run.
    """
    first = first_part(checkpoint, run_digest)
    _read(checkpoint, first, None if only_rank is None else [only_rank], _checksum_in(checkpoint))
    return first


def fetch(checkpoint: str, first: Part, ranks: Collection[int] | None, target: Path) -> Path:
    """The parts of the workers `ranks` (None: all) on a local disk: in `checkpoint` itself, or copied into `target`.

    Each file is read once, and compared as `verify` does. `first` is worker 0's part.

    Raises:
        DamagedCheckpointError: naming the file that is missing or damaged.
    """
    if storage.is_local(checkpoint):
        _read(checkpoint, first, ranks, _checksum_in(checkpoint))
        return storage.local_path(checkpoint)

    def copy(name: str) -> storage.Written:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        return storage.copy_to_local(storage.join(checkpoint, name), target / name)

    _read(checkpoint, first, ranks, copy)
    return target


def first_part(checkpoint: str, run_digest: str | None = None) -> Part:
    """The part of worker 0 in `checkpoint`.

    Raises:
        DamagedCheckpointError: when it is missing or cannot be read.
        CheckpointError: when `run_digest` belongs to another run.
    """
    first = _read_part(checkpoint, 0)
    if run_digest is not None:
        _check_run(checkpoint, first, run_digest)
    return first


_ReadFile = Callable[[str], storage.Written]  # takes a file's name below the checkpoint


def _checksum_in(checkpoint: str) -> _ReadFile:
    return lambda name: storage.checksum(storage.join(checkpoint, name))


def _read(checkpoint: str, first: Part, ranks: Collection[int] | None, read: _ReadFile) -> None:
    """Read the files of the parts of `ranks` with `read`, and compare the result with what was written."""
    for rank in range(first.world_size) if ranks is None else ranks:
        part = first if rank == 0 else _read_part(checkpoint, rank)
        with ThreadPoolExecutor(_READ_AT_ONCE) as threads:
            list(threads.map(functools.partial(_check, checkpoint, read), part.files))


def _check_run(checkpoint: str, part: Part, run_digest: str) -> None:
    if part.run_digest != run_digest:
        raise CheckpointError(
            f"{checkpoint} belongs to a run with other options or inputs (digest {part.run_digest}, this one has "
            f"{run_digest}). Choose another output, or delete that run's folder."
        )


def _found(folder: str) -> list[tuple[int, str, bool]]:
    if not storage.exists(folder):
        return []
    names: dict[str, bool] = {}
    for entry in storage.list_files(folder):
        below = entry.url.rpartition(f"/{storage.name_of(folder)}/")[2].split("/")
        if len(below) > 1 and _NAME.fullmatch(below[0]):
            names[below[0]] = names.get(below[0], False) or below[1:] == [_COMPLETE]
    return [
        (int(name.removeprefix("step-")), storage.join(folder, name), complete)
        for name, complete in sorted(names.items(), key=lambda item: int(item[0].removeprefix("step-")))
    ]


def _read_part(checkpoint: str, rank: int) -> Part:
    url = storage.join(checkpoint, _part_name(rank))
    if not storage.exists(url):
        raise _damaged(checkpoint, url, "is missing")
    try:
        loaded = pydantic.TypeAdapter(dict[str, Any]).validate_json(storage.read_bytes(url))
        return Part.from_mapping(loaded, url)
    except (pydantic.ValidationError, ConfigError) as error:
        raise _damaged(checkpoint, url, "cannot be read") from error


def _check(checkpoint: str, read: _ReadFile, file: WrittenFile) -> None:
    url = storage.join(checkpoint, file.name)
    if not storage.exists(url):
        raise _damaged(checkpoint, url, "is missing")
    found = read(file.name)
    if (found.size_bytes, found.checksum) != (file.size_bytes, file.checksum):
        problem = f"has {found.size_bytes} bytes, xxh3 {found.checksum}, not {file.size_bytes}, xxh3 {file.checksum}"
        raise _damaged(checkpoint, url, problem)


def _damaged(checkpoint: str, url: str, problem: str) -> DamagedCheckpointError:
    return DamagedCheckpointError(
        f"damaged checkpoint: {url} {problem}. Delete {checkpoint} and train again: "
        "the run goes on from the checkpoint before it, or from the start where there is none."
    )
