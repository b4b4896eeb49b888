"""What a public database knows of the packages that the image's lock pins, as a report.

    python cluster/audit.py [--strict] [LOCK]

In: `requirements.lock`, with hashes. Out: the known vulnerabilities, one a line, then one line that says how many
packages were looked up, or that no database was reached. pip-audit does the asking, and calls it a success when the
index that it asks knows none of the packages; so those are counted, and no all-clear is given without an answer. The
exit status is 0 whatever was found or could not be asked, unless `--strict`: then 1 for a vulnerability, 2 where
packages could not be looked up.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

LOCK = Path(__file__).with_name("requirements.lock")
_ASK = ["--require-hashes", "--disable-pip", "--progress-spinner", "off", "--timeout", "5", "--format", "json"]
_NOTHING = "audit: no database was reached, and whether there are vulnerabilities is not known"
_PATIENCE_S = 50  # for all packages together: CI waits for it


def ask(lock: Path) -> dict[str, Any]:
    """pip-audit's report on `lock`.

    Raises:
        ChildProcessError: with the reason, when there is none.
    """
    command = [sys.executable, "-m", "pip_audit", "--requirement", str(lock), *_ASK]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise ChildProcessError(f"no answer within {_PATIENCE_S} s") from error
    try:
        report: dict[str, Any] = json.loads(done.stdout)
    except ValueError as error:
        said = done.stderr.strip() or f"exit status {done.returncode}"
        raise ChildProcessError(said.splitlines()[-1][:200]) from error
    return report


def read(report: dict[str, Any]) -> tuple[list[str], int]:
    """A line for each vulnerability, the last for the whole; and the status that `--strict` exits with."""
    packages = report["dependencies"]
    unknown = [one["name"] for one in packages if "skip_reason" in one]
    lines = [
        f"{one['name']} {one['version']}: {bug['id']}, fixed in {', '.join(bug['fix_versions']) or 'none yet'}"
        for one in packages
        for bug in one.get("vulns", ())
    ]
    known = len(packages) - len(unknown)
    if not known:
        return [f"{_NOTHING}: no database answered for any of the {len(packages)} packages"], 2
    last = f"audit: {len(lines)} known vulnerabilities in {known} of {len(packages)} packages"
    if unknown:
        last += f"; not looked up, since it does not know them: {', '.join(unknown)}"
    return [*lines, last], 1 if lines else 2 if unknown else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("lock", nargs="?", type=Path, default=LOCK)
    parser.add_argument("--strict", action="store_true", help="exit with a status that tells; default: 0")
    given = parser.parse_args()
    try:
        lines, status = read(ask(given.lock))
    except ChildProcessError as error:
        lines, status = [f"{_NOTHING}: pip-audit gave no report: {error}"], 2
    sys.stdout.write("\n".join(lines) + "\n")
    sys.exit(status if given.strict else 0)


if __name__ == "__main__":
    main()
