"""The doctor names what is wrong and what to do."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from cert_ray.errors import SandboxError
from cert_ray.evaluation import sandbox
from cert_ray.operations.doctor import Level, examine


def test_every_finding_that_is_not_ok_says_what_to_do() -> None:
    findings = examine()
    assert {finding.name for finding in findings} >= {
        "python",
        "ray",
        "memory",
        "disk",
        "ray authentication",
        "sandbox",
    }
    assert all(finding.advice for finding in findings if finding.level != Level.OK)


def test_missing_token_and_missing_sandbox_are_warned_about(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    found = {finding.name: finding for finding in examine()}
    assert found["sandbox"].level == Level.WARN
    assert "bubblewrap" in found["sandbox"].advice
    assert found["ray authentication"].level == Level.WARN
    (tmp_path / "none").write_text("t")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert {finding.name: finding for finding in examine()}["ray authentication"].level == Level.OK


def test_missing_libseccomp_is_warned_about(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "find_filter", lambda *, network: None)
    found = {finding.name: finding for finding in examine()}["sandbox"]
    assert found.level == Level.WARN
    assert "apt-get install" in found.advice
    assert "libseccomp2" in found.advice
    assert "--unfiltered" in found.advice


def test_a_missing_pyseccomp_is_installed_by_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "missing_protection", lambda: ("pyseccomp",))
    with pytest.raises(SandboxError, match=r"pip install pyseccomp.*--unfiltered"):
        sandbox.refuse_unprotected(unsafe=True, unfiltered=False)
    monkeypatch.setattr(sandbox, "missing_protection", lambda: ("bubblewrap", "pyseccomp"))
    found = {finding.name: finding for finding in examine()}["sandbox"]
    assert found.advice.startswith("apt-get install bubblewrap and pip install pyseccomp: ")


def test_a_sandbox_that_does_not_start_is_warned_about(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bubblewrap = tmp_path / "bwrap"
    bubblewrap.write_text('#!/bin/sh\necho one >&2\necho "bwrap: Can\'t mount proc" >&2\nexit 1\n')
    bubblewrap.chmod(0o755)
    monkeypatch.setattr(sandbox, "missing_protection", tuple)
    monkeypatch.setattr(sandbox, "find_bubblewrap", lambda: str(bubblewrap))
    found = {finding.name: finding for finding in examine()}["sandbox"]
    assert found.level == Level.WARN
    assert found.found == "does not start: bwrap: Can't mount proc"
    assert "--unsafe" in found.advice


def test_a_bubblewrap_that_hangs_is_warned_about_after_one_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def hangs(bubblewrap: str, patience_s: float) -> None:
        asked.append(patience_s)
        raise TimeoutError("it took more than 20 s")

    monkeypatch.setattr(sandbox, "missing_protection", tuple)
    monkeypatch.setattr(sandbox, "find_bubblewrap", lambda: "bwrap")
    monkeypatch.setattr(sandbox, "find_way", hangs)
    found = {finding.name: finding for finding in examine()}["sandbox"]
    assert (found.level, found.found) == (Level.WARN, "does not start: bwrap did not start: it took more than 20 s")
    assert asked == [sandbox._ASKED_S]


def test_a_filter_that_the_kernel_refuses_is_warned_about(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "missing_protection", tuple)
    if (problem := sandbox.why_no_sandbox()) is not None:
        pytest.skip(f"no sandbox starts here, whatever the filter: {problem}")
    monkeypatch.setattr(sandbox, "_encoded_filter", lambda network: base64.b64encode(b"no filter").decode())
    found = {finding.name: finding for finding in examine()}["sandbox"]
    assert found.level == Level.WARN
    assert found.found.startswith("does not start: ")
    assert found.found.endswith("prctl: Invalid argument")
