"""The way that is taken around bubblewrap starts here, with a network of its own; no other one is taken."""

from __future__ import annotations

import os
import shlex
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cert_ray.errors import SandboxError
from cert_ray.evaluation import namespaces
from cert_ray.evaluation import sandbox as sandbox_module
from cert_ray.evaluation.environments import current_environment
from cert_ray.evaluation.namespaces import Way, find_way, ways
from cert_ray.evaluation.sandbox import Sandbox, find_bubblewrap

BUBBLEWRAP = find_bubblewrap() or "bwrap"
GVISOR = "bwrap: loopback: Failed RTM_NEWADDR: No such file or directory"  # runsc 0.0~20240729, bubblewrap 0.8.0

PATIENCE_S = 60.0
WAYS = dict(zip(("alone", "from outside"), ways(), strict=False))

needs_unshare = pytest.mark.skipif(len(WAYS) == 1, reason="unshare is not installed")
pytestmark = pytest.mark.usefixtures("contained")


def script(path: Path, *lines: str) -> str:
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)
    return str(path)


def as_below_gvisor(folder: Path) -> str:
    """Bubblewrap, but for a network namespace of its own."""
    refused = f'case "$one" in --unshare-net|--unshare-all) echo {shlex.quote(GVISOR)} >&2; exit 1;; esac'
    return script(folder / "bwrap", f'for one in "$@"; do {refused}; done', f'exec {shlex.quote(BUBBLEWRAP)} "$@"')


def test_bubblewrap_makes_its_own_network_namespace_where_it_can() -> None:
    assert find_way(BUBBLEWRAP, PATIENCE_S) == ways()[0]


@needs_unshare
def test_where_it_cannot_it_is_started_inside_of_one_and_that_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert find_way(as_below_gvisor(tmp_path), PATIENCE_S) == ways()[1]
    (warning,) = caplog.records
    assert GVISOR in warning.getMessage()


@needs_unshare
def test_many_threads_with_different_patience_look_once_and_tell_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bubblewrap = as_below_gvisor(tmp_path)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda place: find_way(bubblewrap, PATIENCE_S + place), range(8)))
    assert set(found) == {ways()[1]}
    assert len(caplog.records) == 1


def test_a_thread_does_not_wait_longer_for_anothers_look_than_it_would_for_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looking, enough = threading.Event(), threading.Event()

    def look(bubblewrap: str, patience_s: float) -> Way:
        looking.set()
        assert enough.wait(PATIENCE_S)
        return ways()[0]

    monkeypatch.setattr(namespaces, "_look", look)
    slow = str(tmp_path / "bwrap")
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(find_way, slow, PATIENCE_S)
        assert looking.wait(PATIENCE_S)
        with pytest.raises(TimeoutError):
            find_way(slow, 0.01)
        enough.set()
        assert first.result() == find_way(slow, 0.01) == ways()[0]


@needs_unshare
def test_another_refusal_does_not_lead_to_a_network_from_outside(tmp_path: Path) -> None:
    refused = 'for one in "$@"; do [ "$one" != --unshare-net ] && [ "$one" != --unshare-all ] || exit 1; done'
    busy = script(tmp_path / "bwrap", refused, f'exec {shlex.quote(BUBBLEWRAP)} "$@"')
    assert find_way(busy, PATIENCE_S) == ways()[0]


def test_a_slow_start_is_an_error_and_not_remembered(tmp_path: Path) -> None:
    slow = script(tmp_path / "bwrap", "exec sleep 60")
    with pytest.raises(TimeoutError):
        find_way(slow, 0.1)
    script(tmp_path / "bwrap", f'exec {shlex.quote(BUBBLEWRAP)} "$@"')
    assert find_way(slow, PATIENCE_S) == ways()[0]


def test_a_bubblewrap_that_keeps_this_machines_network_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = '--unshare-net) ;; --unshare-all) set -- "$@" "$one" --share-net;; *) set -- "$@" "$one"'
    drop = f'for one in "$@"; do shift; case "$one" in {shared};; esac; done'
    sharing = script(tmp_path / "bwrap", drop, f'exec {shlex.quote(BUBBLEWRAP)} "$@"')
    monkeypatch.setattr(sandbox_module, "find_bubblewrap", lambda: sharing)
    with Sandbox(current_environment(), unfiltered=True) as sandbox, pytest.raises(SandboxError, match="own network"):
        sandbox.run("pass")


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_both_ways_have_loopback_alone_and_no_capability_but_to_become_nobody(way: Way) -> None:
    files = ["--ro-bind", "/", "/", "--proc", "/proc", "--", "cat"]
    devices, status = (
        subprocess.run([*way.command(BUBBLEWRAP), *files, path], capture_output=True, text=True, check=True).stdout
        for path in ("/proc/net/dev", "/proc/self/status")
    )
    assert [line.split(":")[0].strip() for line in devices.splitlines()[2:]] == ["lo"]
    (effective,) = (int(line.split()[1], 16) for line in status.splitlines() if line.startswith("CapEff"))
    # CAP_SETGID, SETUID and SETPCAP, which root needs for it; SETFCAP, which a namespace's root does
    become_nobody = 1 << 6 | 1 << 7 | 1 << 8 | 1 << 31
    assert effective & ~become_nobody == 0


def test_a_way_with_this_machines_network_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(tmp_path / "unshare", 'while [ "$1" != "--" ]; do shift; done', "shift", 'exec "$@"')
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(SandboxError, match="own network"):
        find_way(as_below_gvisor(tmp_path), PATIENCE_S)


def test_where_no_way_starts_evaluation_refuses_in_bubblewraps_own_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = script(tmp_path / "bwrap", f"echo {shlex.quote(GVISOR)} >&2", "exit 1")
    monkeypatch.setattr(sandbox_module, "find_bubblewrap", lambda: broken)
    with Sandbox(current_environment(), unfiltered=True) as sandbox, pytest.raises(SandboxError, match=GVISOR):
        sandbox.run("pass")
