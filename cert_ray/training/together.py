"""What the ranks of a run do together. In: this rank's own work. Out: one answer, or one error, on every rank.

Collectives of NCCL and gloo end a run if one rank keeps another waiting beyond their time limit (30 minutes); copying a
pack or a checkpoint may take longer. So ranks first wait without a limit, in a way that the caller provides, and enter
a collective once all have arrived. Needs a process group of torch.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from cert_ray.errors import CertRayError

_T = TypeVar("_T")

Wait = Callable[[], None]  # returns once every rank has called it, however long that takes


class Together:
    """The ranks of the process group, seen from one of them."""

    def __init__(self, rank: int, world_size: int, wait: Wait | None = None) -> None:
        """`wait` may be None if no rank keeps the others waiting for long."""
        self.rank, self.world_size = rank, world_size
        self._wait = wait

    def wait(self) -> None:
        """Return once every rank has called this."""
        if self._wait is None:
            torch.distributed.barrier()
        else:
            self._wait()

    def gathered(self, mine: _T) -> list[_T]:
        """The values of all ranks, in order of rank."""
        self._arrive()
        found: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(found, mine)
        return found

    def first_here(self, own: Path) -> Path:
        """The `own` folder of the first rank on this machine; this rank's if that folder is on another machine."""
        here = socket.gethostname()
        given = self.gathered((here, str(own)))
        first = next(Path(folder) for machine, folder in given if machine == here)
        return first if first.exists() else own  # two machines may have one name

    def everywhere(self, work: Callable[[], _T]) -> _T:
        """Do each rank's own `work`. A `CertRayError` on one is raised on all, so that none waits for it in vain."""
        found: Any = None
        mine: CertRayError | None = None
        try:
            found = work()
        except CertRayError as error:
            mine = error
        for raised in (mine, *self.gathered(mine)):  # its own error first
            if raised is not None:
                raise raised
        result: _T = found
        return result

    def decide(self, decision: Callable[[], _T]) -> _T:
        """What `decision` returns on rank 0, on every rank; a `CertRayError` there is raised on every rank, too."""
        answer: list[Any] = [None]
        if self.rank == 0:
            try:
                answer = [decision()]
            except CertRayError as error:
                answer = [error]
        self._arrive()
        torch.distributed.broadcast_object_list(answer, src=0)
        if isinstance(answer[0], CertRayError):
            raise answer[0]
        found: _T = answer[0]
        return found

    def _arrive(self) -> None:
        if self._wait is not None:
            self._wait()
