"""What a killed process leaves below TMPDIR is removed by the next one; what a process holds is not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from cert_ray.training.scratch import remove_left, scratch_folder

OWNER = """
import sys, time
from cert_ray.training.scratch import scratch_folder

with scratch_folder("checkpoint") as folder:
    (folder / "part").write_bytes(b"gigabytes")
    print(folder, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def _own_tmpdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))


def test_a_folder_is_empty_and_gone_afterwards_whatever_happens(tmp_path: Path) -> None:
    with scratch_folder("export") as folder:
        assert list(folder.iterdir()) == []
        assert tmp_path in folder.parents
        remove_left()
        assert folder.is_dir()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyError), scratch_folder("export"):
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed_and_what_another_holds_is_not(tmp_path: Path) -> None:
    owners = [
        subprocess.Popen([sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    try:
        folders = [Path(owner.stdout.readline().strip()) for owner in owners if owner.stdout is not None]
        remove_left()
        assert all((folder / "part").exists() for folder in folders)
        os.kill(owners[0].pid, signal.SIGKILL)
        owners[0].wait()
        assert folders[0].exists()
        remove_left()
        assert not folders[0].parent.exists()
        assert (folders[1] / "part").exists()
        owners[1].communicate()
        assert list(tmp_path.iterdir()) == []
    finally:
        for owner in owners:
            owner.kill()
            owner.communicate()


def test_what_is_not_ours_is_let_be(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    for folder in (elsewhere, tmp_path / "cert-ray-training-base-new"):
        (folder / "files").mkdir(parents=True)
    (elsewhere / "lock").touch()
    (tmp_path / "cert-ray-training-base-link").symlink_to(elsewhere)
    remove_left()
    assert (elsewhere / "files").is_dir()
    assert (tmp_path / "cert-ray-training-base-new").is_dir()  # whose owner is about to lock it
