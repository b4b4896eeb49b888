"""The nodes of a cluster, judged: do they run the same code as this process, and do they have room?

In: `NodeFacts`, gathered by `on_ray.ask_nodes`. Out: `Finding`s for `doctor`, one per node and complaint; and lines in
which an evaluation says, when it starts, on which nodes generated code will not run, or will run without a filter of
system calls. No Ray in here. Ray itself refuses nodes with another Ray or Python; cert-ray's version it does not know.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import logging
import platform
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psutil

from cert_ray import __version__
from cert_ray.errors import CertRayError, ConfigError
from cert_ray.operations.doctor import START_SANDBOX, Finding, Level, advise_filter, advise_protection

logger = logging.getLogger(__name__)

_GIB = 1 << 30
_MEMORY_PER_CPU_BYTES = (
    1.5 * _GIB
)  # assumed: a preprocessing task takes about 1 GB (docs/planning.md), and Ray its share
_NAMED = 3  # nodes of one kind that a line names
_DISK_WANTED_BYTES = 5 * _GIB  # assumed: object spilling and logs


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """One node: where it is, what Ray counts on it, and its answer; or why it is silent, or what asking it raised."""

    address: str
    cpus: float
    gpus: float
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    memory_bytes: int = 0
    disk_free_bytes: int = 0
    missing_protection: Sequence[str] = ()  # missing packages that protect from generated code
    sandbox_failure: str | None = None  # why a harmless program did not run in the sandbox, if that was tried
    silence: str | None = None
    error: str | None = None

    def answered(self, said: Mapping[str, Any]) -> NodeFacts:
        """With the result of `facts_of_this_node` there."""
        return dataclasses.replace(self, **said)

    def silent(self, why: str) -> NodeFacts:
        """Without an answer: the node is slow, or gone by now."""
        return dataclasses.replace(self, silence=why)

    def failed(self, error: str) -> NodeFacts:
        """With an error for an answer: nothing of cert-ray would run there."""
        return dataclasses.replace(self, error=error)


def versions_here() -> dict[str, str]:
    """What must be equal on every node, by name."""
    return {"python": platform.python_version(), "ray": importlib.metadata.version("ray"), "cert-ray": __version__}


def facts_of_this_node(try_sandbox: bool = False) -> dict[str, Any]:
    """What a node says of itself. Runs on that node.

    Args:
        try_sandbox: start a sandbox, which takes about a second.
    """
    from cert_ray.evaluation import sandbox  # here, since it takes a third of a second, and only this verb needs it

    missing = _missing_protection()
    tried = try_sandbox and "bubblewrap" not in missing
    return {
        "versions": versions_here(),
        "memory_bytes": psutil.virtual_memory().total,
        "disk_free_bytes": shutil.disk_usage("/tmp").free,
        "missing_protection": missing,
        "sandbox_failure": sandbox.why_no_sandbox(unfiltered=bool(missing)) if tried else None,
    }


def _missing_protection() -> tuple[str, ...]:
    """What the sandbox says is missing. A filter that cannot be made counts as missing, but bars no other work."""
    from cert_ray.evaluation.sandbox import missing_protection

    try:
        return missing_protection()
    except (CertRayError, OSError) as error:
        logger.warning("system calls cannot be filtered here: %s", error)
        return ("libseccomp2",)


def judge_nodes(nodes: Iterable[NodeFacts], here: Mapping[str, str]) -> list[Finding]:
    """One finding per node, and one more for each of its faults, in the order of `nodes`."""
    return [finding for node in nodes for finding in _judge(node, here)]


def refuse_other_versions(nodes: Iterable[NodeFacts], here: Mapping[str, str]) -> None:
    """Do nothing if every node that answered runs what this process runs. A silent node is a warning.

    Raises:
        ConfigError: naming each node that does not, with what it runs or the error that it answered with.
    """
    found = []
    for node in nodes:
        if node.silence is not None:
            logger.warning("node %s could not be checked: %s", node.address, node.silence)
        elif node.error is not None:
            found.append(f"node {node.address} cannot run cert-ray: {node.error.rstrip('.')}")
        else:
            found += [
                f"node {node.address} has {part} {has}, this process has {wanted}"
                for part, has, wanted in _other_versions(node, here)
            ]
    if found:
        cure = "Results would depend on where tasks run: give every node one image, or the same packages."
        raise ConfigError(f"{'; '.join(found)}. {cure}")


def _other_versions(node: NodeFacts, here: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    """What the node has in another version than `here`: its name, the node's version, and the one wanted."""
    for part, wanted in here.items():
        if (has := node.versions.get(part, "none")) != wanted:
            yield part, has, wanted


def _judge(node: NodeFacts, here: Mapping[str, str]) -> list[Finding]:
    name = f"node {node.address}"
    if (problem := node.silence or node.error) is not None:
        cure = "Is cert-ray installed there, and is the node up? `ray status` and its logs say more."
        return [Finding(name, Level.FAIL, problem, cure)]
    found = f"{node.cpus:g} CPUs, {node.gpus:g} GPUs, {node.memory_bytes / _GIB:.0f} GiB memory"
    findings = [Finding(name, Level.OK, found)]
    for part, has, wanted in _other_versions(node, here):
        cure = f"Give every node {part} {wanted}, e.g. by one image: results would depend on where tasks run."
        findings.append(Finding(name, Level.FAIL, f"{part} {has}, this process has {wanted}", cure))
    if node.memory_bytes < node.cpus * _MEMORY_PER_CPU_BYTES:
        cure = f"Start it with --num-cpus={int(node.memory_bytes / _MEMORY_PER_CPU_BYTES)}, or give it more memory."
        findings.append(Finding(name, Level.WARN, "less than 1.5 GiB of memory for each CPU", cure))
    if node.disk_free_bytes < _DISK_WANTED_BYTES:
        cure = "Ray spills objects and logs there: free some, or move its --temp-dir."
        findings.append(Finding(name, Level.WARN, f"{node.disk_free_bytes / _GIB:.1f} GiB free in /tmp", cure))
    if (lack := _lack_of_protection(node)) is not None:
        findings.append(Finding(name, Level.WARN, f"no sandbox for generated code: {lack[0]}", lack[1]))
    return findings


def _lack_of_protection(node: NodeFacts, unsafe: bool = False, unfiltered: bool = False) -> tuple[str, str] | None:
    """Why generated code does not run on `node`, and what to do; None if it does, or would not be sent there."""
    if not node.cpus:
        return None
    waived = {"bubblewrap": unsafe, "libseccomp2": unfiltered, "pyseccomp": unfiltered}
    if missing := [package for package in node.missing_protection if not waived[package]]:
        return f"without {' and '.join(missing)}", advise_protection(missing)
    if node.sandbox_failure is not None and not unsafe:
        return node.sandbox_failure, START_SANDBOX
    return None


def _lack_of_filter(node: NodeFacts) -> tuple[str, str] | None:
    """Why no system call of generated code is refused on `node`, and what to do; None if some are refused."""
    missing = [package for package in node.missing_protection if package != "bubblewrap"]
    if not (node.cpus and missing):
        return None
    return f"--unfiltered, without {' and '.join(missing)}", advise_filter(missing)


def tell_unprotected(nodes: Iterable[NodeFacts], unsafe: bool, unfiltered: bool) -> list[str]:
    """A line for each kind of node (its resources, and what it lacks) on which generated code will not run.

    There is also one for each kind where it will run but no system call is refused (under `unfiltered`), and one for
    each where this is not known, since the node did not answer.

    Args:
        unsafe, unfiltered: the options of the evaluation.
    """
    kinds: dict[tuple[float, float, str, str], list[str]] = {}
    for node in nodes:
        if node.cpus and (problem := node.silence or node.error) is not None:
            told = "it is not known whether generated code will run", problem
        elif (lack := _lack_of_protection(node, unsafe, unfiltered)) is not None:
            told = "generated code will not run", ". ".join(lack)
        elif unfiltered and (lack := _lack_of_filter(node)) is not None:
            told = "generated code will run, and no system call is refused,", ". ".join(lack)
        else:
            continue
        kinds.setdefault((node.cpus, node.gpus, *told), []).append(node.address)
    return [
        f"{what} on {len(addresses)} node(s) of {cpus:g} CPUs and {gpus:g} GPUs "
        f"({', '.join(addresses[:_NAMED])}{', ...' if len(addresses) > _NAMED else ''}): {why}"
        for (cpus, gpus, what, why), addresses in kinds.items()
    ]
