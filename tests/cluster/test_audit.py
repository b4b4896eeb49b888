"""The audit's report gives no all-clear that nobody gave, and never stops what calls it."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

AUDIT = Path(__file__).resolve().parents[2] / "cluster" / "audit.py"
audit = runpy.run_path(str(AUDIT))

FINE = {"name": "numpy", "version": "2.4.6", "vulns": []}
WEAK = {"name": "ray", "version": "2.6.3", "vulns": [{"id": "PYSEC-2023-1", "fix_versions": ["2.8.1"]}]}
UNFIXED = {"name": "ray", "version": "2.6.3", "vulns": [{"id": "PYSEC-2023-2", "fix_versions": []}]}
UNKNOWN = {"name": "ours", "skip_reason": "Dependency not found"}


@pytest.mark.parametrize(
    ("packages", "said", "status"),
    [
        ([FINE], ["audit: 0 known vulnerabilities in 1 of 1 packages"], 0),
        ([FINE, WEAK], ["ray 2.6.3: PYSEC-2023-1, fixed in 2.8.1", "audit: 1 known vulnerabilities in 2 of 2"], 1),
        ([UNFIXED], ["ray 2.6.3: PYSEC-2023-2, fixed in none yet", "audit: 1 known"], 1),
        ([FINE, UNKNOWN], ["audit: 0 known vulnerabilities in 1 of 2 packages; not looked up, since"], 2),
        (
            [UNKNOWN],
            ["audit: no database was reached, and whether there are vulnerabilities is not known"],
            2,
        ),
        ([], ["audit: no database was reached"], 2),
    ],
)
def test_what_was_not_looked_up_is_not_called_safe(
    packages: list[dict[str, object]], said: list[str], status: int
) -> None:
    lines, found = audit["read"]({"dependencies": packages})
    assert found == status
    assert len(lines) == len(said)
    for line, beginning in zip(lines, said, strict=True):
        assert line.startswith(beginning)


def test_an_unreachable_database_is_one_line_and_no_failure(tmp_path: Path) -> None:
    """By a proxy that nobody is: the real pip-audit, which asks for the first package and gives up."""
    lock = tmp_path / "requirements.lock"
    lock.write_text(f"numpy==2.4.6 \\\n    --hash=sha256:{'0' * 64}\n")
    command = [sys.executable, str(AUDIT), str(lock)]
    nowhere = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "https_proxy": "http://127.0.0.1:9"}
    done = subprocess.run(command, capture_output=True, text=True, env=nowhere, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    (line,) = done.stdout.splitlines()
    assert line.startswith("audit: no database was reached, ")
    assert "pip-audit gave no report: " in line
    assert "No module" not in line
    assert "ProxyError" in line
