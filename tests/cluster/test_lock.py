"""The image's lock is complete, hashed, and of the versions that were tested."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
LOCK = ROOT / "cluster" / "requirements.lock"
IMAGE_EXTRAS = ("client", "s3", "gcs")  # what cluster/README.md compiles


def dockerfile() -> str:
    """The image's recipe, an instruction a line."""
    return (ROOT / "cluster" / "Dockerfile").read_text().replace("\\\n", " ")


def entries() -> dict[str, tuple[str, list[str]]]:
    """Each package's version and hashes, as pip would read the lock."""
    text = re.sub(r"^\s*#.*\n", "", LOCK.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    found = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        pinned = re.fullmatch(r"([\w.-]+)==([\w.!+-]+)(?: ; [^-]+)?((?:\s+--hash=sha256:[0-9a-f]{64})+)", line)
        assert pinned, f"not a pin with hashes: {line[:100]}"
        found[canonicalize_name(pinned[1])] = (pinned[2], pinned[3].split())
    return found


def test_every_line_is_a_pin_with_hashes_and_names_no_index() -> None:
    assert len(entries()) > 100
    assert "://" not in LOCK.read_text()


def test_everything_that_the_image_wants_is_in_it() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = map(Requirement, [*project["dependencies"], *(one for extra in IMAGE_EXTRAS for one in extras[extra])])
    locked = entries()
    for requirement in wanted:
        version, _ = locked[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version, prereleases=True), f"{requirement}: {version} is locked"


def test_tested_versions_are_the_locked_ones() -> None:
    lines = (line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    tested = {canonicalize_name(name): version for name, version in lines}
    locked = entries()
    differ = {name: (locked[name][0], version) for name, version in tested.items() if name in locked}
    assert {name for name, (one, other) in differ.items() if one != other} == set(), "renew it: cluster/README.md"


def test_the_image_installs_nothing_else() -> None:
    installs = re.findall(r"pip install[^&\n]*", dockerfile())
    assert installs
    for line in installs:
        assert "--require-hashes" in line or "--no-deps --no-build-isolation" in line, line


def test_building_the_image_imports_what_jobs_import_late() -> None:
    (imported,) = re.findall(r'python -c "import ([^"]+)"', dockerfile())
    names = imported.split(", ")
    assert {"cert_ray.operations.pipeline", "bm25s", "griffe", "Stemmer"} <= set(names)
    assert [name for name in names if importlib.util.find_spec(name) is None] == []
