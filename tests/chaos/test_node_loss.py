"""What the loss of a node cost is read from the log of others' work. Nodes are lost by hand: docs/faults.md."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.node_loss import Loss, recovery_s
from tests.chaos.run import ChaosError
from tests.chaos.trials import Trial

LOST = Loss(at_s=10.0, interrupted=frozenset({"tokens shard-1", "tokens shard-2"}), pids=frozenset({7}))


def trial(folder: Path, log: str) -> Trial:
    (folder / "events").write_text(log)
    return Trial([], folder)


def test_recovery_lasts_until_the_last_interrupted_task_was_done_by_another(tmp_path: Path) -> None:
    log = "9.0 7 begin tokens shard-1\n9.5 7 begin tokens shard-2\n10.2 7 end tokens shard-1\n"
    log += "11.0 8 begin tokens shard-1\n12.0 8 end tokens shard-1\n"
    log += "12.0 9 begin tokens shard-2\n14.5 9 end tokens shard-2\n"
    log += "20.0 8 end tokens shard-1\n"  # once more, which changes nothing
    assert recovery_s(trial(tmp_path, log), LOST) == pytest.approx(4.5)


def test_what_nobody_did_again_is_named(tmp_path: Path) -> None:
    log = "11.0 8 begin tokens shard-1\n12.0 8 end tokens shard-1\n12.5 7 end tokens shard-2\n"
    with pytest.raises(ChaosError, match="nobody did again: tokens shard-2"):
        recovery_s(trial(tmp_path, log), LOST)
