"""The manifests of cluster/kubernetes, built as `kubectl apply -k` builds them; for the tests beside this module."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

KUBERNETES = Path(__file__).resolve().parents[2] / "cluster" / "kubernetes"
KUBECTL = str(Path(sys.executable).parent / "kubectl")
RAY_KINDS = {"RayCluster": "rayclusters", "RayJob": "rayjobs", "RayService": "rayservices"}
JOBS = ("preprocess", "tokenizer", "pack", "train", "evaluate")
OVERLAYS = tuple(f"overlays/{overlay.name}" for overlay in sorted((KUBERNETES / "overlays").iterdir()))
BUILDS = ("base", *(f"jobs/{job}" for job in JOBS), "service", "evaluation", *OVERLAYS)


def build(folder: Path) -> list[dict[str, Any]]:
    """Every document of a kustomization."""
    built = subprocess.run([KUBECTL, "kustomize", str(folder)], capture_output=True, text=True, timeout=60, check=False)
    assert built.returncode == 0, built.stderr
    return [document for document in yaml.load_all(built.stdout, yaml.CSafeLoader) if document]


def overlay(folder: Path, resource: str, **others: Any) -> list[dict[str, Any]]:
    """Every document of an overlay of `resource` that is written into `folder`, as one of a user's."""
    root = Path("../" * len(folder.parts[1:])) / str(KUBERNETES)[1:]
    components = [str(root / name) for name in others.pop("components", [])]
    text = {"namespace": "cert-ray", "resources": [str(root / resource)], "components": components, **others}
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(text))
    return build(folder)


@functools.cache
def shipped(name: str) -> tuple[dict[str, Any], ...]:
    """Every document of a kustomization that is shipped."""
    return tuple(build(KUBERNETES / name))


def of_kind(name: str, kind: str) -> dict[str, Any]:
    """The only document of its kind."""
    (found,) = (document for document in shipped(name) if document["kind"] == kind)
    return found


def ray_cluster_spec(document: dict[str, Any]) -> dict[str, Any]:
    """The RayCluster that a document is or makes."""
    spec: dict[str, Any] = document["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


def pod_templates(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every pod that a document makes, by role, with its metadata."""
    if document["kind"] in RAY_KINDS:
        cluster = ray_cluster_spec(document)
        yield "head", cluster["headGroupSpec"]["template"]
        yield from ((group["groupName"], group["template"]) for group in cluster["workerGroupSpecs"])
    elif "template" in document.get("spec", {}):
        yield document["kind"], document["spec"]["template"]


def pod_specs(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every pod that a document makes, by role."""
    yield from ((role, template["spec"]) for role, template in pod_templates(document))
