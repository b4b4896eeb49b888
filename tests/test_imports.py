"""The import rule of the architecture, read off the source: who may import whom, and where Ray may stand."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "cert_ray"

FOUNDATION = {
    "errors",
    "config",
    "schemas",
    "storage",
    "manifests",
    "retries",
    "python_source",
    "possessive",
    "libraries",
    "gpt_neo",
    "on_ray",
    "telemetry",
    "shards",
}
# Beside itself and the foundation, a stage imports only what the flow needs.
EDGES: dict[str, set[str]] = {
    "errors": set(),
    # One parse gives a file's facts and its scores. Decontamination reads problems, and hashes words as dedup does.
    "corpus": {"quality", "evaluation.benchmarks", "dedup.minhash"},
    "dedup": set(),
    "quality": set(),
    "sketching": set(),
    "dataset": {"corpus", "dedup", "quality", "sketching"},  # puts the annotated dataset together
    "retrieval": set(),
    "tokens": {"sketching", "retrieval"},  # documentation ahead of training text, as it is served
    "training": {"tokens", "sketching"},  # which special tokens a base has to learn
    "serving": {"sketching", "tokens", "evaluation.rerank", "retrieval"},
    "evaluation": {"sketching"},
}
ONLY_IN = {"ray": "on_ray.py", "deepspeed": "deepspeed_engine.py", "fastapi": "http.py"}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_heavy_libraries_stay_in_their_modules(path: Path) -> None:
    for name in imports(path):
        library = name.split(".")[0]
        if library in ONLY_IN:
            assert path.name == ONLY_IN[library], f"{library} may be imported in {ONLY_IN[library]} only"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_stages_import_along_the_flow(path: Path) -> None:
    stage = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if stage not in EDGES:  # the foundation, the command line and operations
        return
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "cert_ray" or len(parts) < 2 or parts[1] in FOUNDATION | {stage, "__version__"}:
            continue
        allowed = EDGES[stage]
        assert parts[1] in allowed or ".".join(parts[1:3]) in allowed, f"{stage} may not import {name}"


def test_foundation_imports_no_stage() -> None:
    for path in modules():
        if path.relative_to(PACKAGE).parts[0].removesuffix(".py") in FOUNDATION:
            for name in imports(path):
                parts = name.split(".")
                assert parts[0] != "cert_ray" or len(parts) < 2 or parts[1] in FOUNDATION | {"__version__"}, (
                    path,
                    name,
                )


def test_every_module_says_what_it_is() -> None:
    missing = [path for path in modules() if not ast.get_docstring(ast.parse(path.read_text()))]
    assert missing == []
