"""A real corpus: the archives of well-known packages, from the package index that pip is configured for.

In: `corpus_packages.txt`. Out: `OUTPUT/sdists/*` (archives, which `cert-ray preprocess` reads as they are) and
`OUTPUT/corpus.json`: file, sha256 and Python bytes of each. pip asks the index, one package at a time, and checks its
checksums. A second run checks what is there and goes on from it; a package that cannot be had is passed over and said.
Pinned names in the list give the same files another time.

Example: python -m tests.bench.fetch_corpus --output /tmp/corpus --bytes 1e9
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Any

PACKAGES = Path(__file__).with_name("corpus_packages.txt")


def main() -> None:
    """Fetch until enough bytes of Python are at hand."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the corpus")
    parser.add_argument("--bytes", type=float, default=1e9, help="stop at so many bytes of .py files (default 1e9)")
    parser.add_argument("--packages", type=Path, default=PACKAGES, help="list of packages, one a line")
    arguments = parser.parse_args()
    fetch(arguments.packages, arguments.output, int(arguments.bytes))


def fetch(packages: Path, output: Path, wanted_bytes: int) -> dict[str, dict[str, Any]]:
    """Fetch the packages of a list, in its order, until their .py files hold `wanted_bytes`."""
    archives = output / "sdists"
    archives.mkdir(parents=True, exist_ok=True)
    record = output / "corpus.json"
    entries = {name: entry for name, entry in _recorded(record).items() if _is_whole(archives, entry)}
    total = sum(entry["python_bytes"] for entry in entries.values())
    for name, kind in _wanted(packages):
        if total >= wanted_bytes:
            break
        if name in entries:
            continue
        entry = _fetch_one(name, kind, archives)
        if entry is None:
            continue
        entries[name] = entry
        total += entry["python_bytes"]
        record.write_text(json.dumps(entries, indent=1, sort_keys=True) + "\n")
        print(
            f"{entry['file']}: {entry['python_files']} files, {entry['python_bytes'] / 1e6:.1f} MB; {total / 1e6:.0f}"
        )
    files = sum(entry["python_files"] for entry in entries.values())
    print(f"{len(entries)} archives, {files} Python files, {total / 1e6:.0f} MB of Python in {archives}")
    if total < wanted_bytes:
        print(f"wanted {wanted_bytes / 1e6:.0f} MB: add packages to {packages}", file=sys.stderr)
    return entries


def _wanted(packages: Path) -> list[tuple[str, str]]:
    lines = [line.split("#")[0].split() for line in packages.read_text().splitlines()]
    return [(words[0], words[1] if len(words) > 1 else "wheel") for words in lines if words]


def _recorded(record: Path) -> dict[str, dict[str, Any]]:
    if not record.exists():
        return {}
    entries: dict[str, dict[str, Any]] = json.loads(record.read_text())
    return entries


def _is_whole(archives: Path, entry: dict[str, Any]) -> bool:
    path = archives / entry["file"]
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == entry["sha256"]


def _fetch_one(name: str, kind: str, archives: Path) -> dict[str, Any] | None:
    """What pip gave for `name`, moved to `archives`; None, and a line, where it gave nothing."""
    which = {"sdist": "--no-binary", "wheel": "--only-binary"}[kind]
    with tempfile.TemporaryDirectory(dir=archives.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", which, ":all:", "-d", folder, name]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        except subprocess.TimeoutExpired:
            print(f"{name}: passed over, pip took more than 300 s", file=sys.stderr)
            return None
        found = sorted(Path(folder).iterdir())
        if done.returncode or not found:
            print(f"{name}: passed over, {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
            return None
        path = found[0].replace(archives / found[0].name)
    sizes = python_sizes(path)
    return {
        "file": path.name,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "python_files": len(sizes),
        "python_bytes": sum(sizes),
    }


def python_sizes(archive: Path) -> list[int]:
    """The sizes of the .py members of a tar or zip."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as opened:
            return [member.file_size for member in opened.infolist() if member.filename.endswith(".py")]
    with tarfile.open(archive) as tar:
        return [member.size for member in tar if member.isreg() and member.name.endswith(".py")]


if __name__ == "__main__":
    main()
