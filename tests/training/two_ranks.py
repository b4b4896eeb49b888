"""One of two ranks that train in processes of their own: `two_ranks.py RANK PORT JOBS.json`.

Each job is a config's options and the step after which it is cut short, or null. Rank 0 prints the losses of the
finished jobs as JSON, `null` for those that were cut.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

PATIENCE_S = 240


class _CutError(Exception):
    pass


def start(jobs: list[tuple[dict[str, Any], int | None]], folder: Path) -> list[list[float] | None]:
    """Run `jobs`, one after the other, on two ranks; the losses of each by step, or `None` where it was cut."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(folder / "store"), str(folder / "jobs.json")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        )
        for rank in range(2)
    ]
    try:
        written = [rank.communicate(timeout=PATIENCE_S) for rank in ranks]
    finally:  # one that waits for another in vain goes on for minutes
        for rank in ranks:
            rank.kill()
            rank.communicate()
    assert [rank.returncode for rank in ranks] == [0, 0], written[0][1][-3000:] + written[1][1][-3000:]
    losses: list[list[float] | None] = json.loads(written[0][0].splitlines()[-1])
    return losses


def _run(options: dict[str, Any], cut_after: int | None, rank: int) -> list[float] | None:
    import torch

    from cert_ray.training import worker
    from cert_ray.training.config import TrainConfig

    config = TrainConfig.model_validate(options)

    def report(metrics: dict[str, Any], part: Path, name: str) -> None:
        shutil.copytree(part, Path(config.output) / "checkpoints" / name, dirs_exist_ok=True)

    def after(step: int, rank: int) -> None:
        if step == cut_after:
            raise _CutError

    try:
        outcome = worker.run(config, "digest", rank, 2, report, after)
    except _CutError:
        return None
    finally:
        torch.distributed.barrier()
    return [record.loss for record in outcome.records]


def _main() -> None:
    rank, store, jobs = int(sys.argv[1]), sys.argv[2], json.loads(Path(sys.argv[3]).read_text())
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    import torch

    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    losses = [_run(options, cut_after, rank) for options, cut_after in jobs]
    if rank == 0:
        print(json.dumps(losses))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    _main()
