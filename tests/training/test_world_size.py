"""A run goes on, with the same losses, on another number of workers than its checkpoint was written by."""

from __future__ import annotations

import subprocess

import psutil
import pytest

from cert_ray.training import worker
from tests.training import two_ranks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("process_group"),
    # DeepSpeed 0.19 calls collectives that torch 2.13 renamed.
    pytest.mark.filterwarnings("ignore:`torch.distributed.*deprecated:FutureWarning"),
]
# A decay so large that mixing up matrices and vectors shows.
OPTIONS = {"steps": 6, "checkpoint_every_steps": 3, "weight_decay": 0.5, "keep_best_checkpoint": False}
ROWS = {"workers": 1, "micro_batch": 2, "gradient_accumulation": 3}  # per step
CUT_AFTER = 4


class _CutError(Exception):
    pass


def _alone(config, copy_report, cut_after=None):
    def after(step: int, rank: int) -> None:
        if step == cut_after:
            raise _CutError

    outcome = worker.run(config, "digest", 0, 1, copy_report(config.output), after)
    return [record.loss for record in outcome.records]


def test_one_worker_goes_on_for_two_and_two_for_one_at_every_stage(make_config, copy_report, tmp_path):
    """Two workers read the six rows of a step in two passes of two each, of which two rows do not count."""
    undisturbed = _alone(make_config(**OPTIONS, **ROWS, zero_stage=0), copy_report)
    jobs, folders = [], []
    for stage in range(4):
        shared = OPTIONS | {"zero_stage": stage}
        one, two = (str(tmp_path / f"{name}-{stage}") for name in ("one", "two"))
        with pytest.raises(_CutError):
            _alone(make_config(**shared, **ROWS, output=one), copy_report, CUT_AFTER)
        jobs.append((make_config(**shared, **ROWS, output=one).model_dump(mode="json"), None))
        jobs.append((make_config(**shared, **ROWS, output=two).model_dump(mode="json"), CUT_AFTER))
        folders.append((shared, two))
    losses = two_ranks.start(jobs, tmp_path)
    assert losses[1::2] == [None] * len(folders)
    for went_on in losses[0::2]:
        assert went_on == pytest.approx(undisturbed, abs=2e-5)
    for shared, two in folders:
        assert _alone(make_config(**shared, **ROWS, output=two), copy_report) == pytest.approx(undisturbed, abs=2e-5)


def test_ranks_that_are_not_done_in_time_are_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(two_ranks, "PATIENCE_S", 0)
    with pytest.raises(subprocess.TimeoutExpired):
        two_ranks.start([], tmp_path)
    left = [child for child in psutil.Process().children() if str(tmp_path / "store") in child.cmdline()]
    assert left == []
