"""By hand: the container of cluster/kubernetes/evaluation below a real runsc, with what its manifest says of it.

    python -m tests.cluster.pod --runsc RUNSC --shared FOLDER [--netns NAME] WORK [COMMAND...]

In: the manifest; gVisor's runsc; FOLDER as the shared volume. No image: /usr, /etc, this repository and this
interpreter's packages are shown read-only, and Debian's /usr/bin/python3, of the same version, runs them.
Out: what COMMAND says, and its exit status; without one, the manifest's own. WORK keeps the bundles and results.

As containerd starts a pod's container: first a sandbox with a process that waits, then the container inside of it. As
the manifest says: user, groups, capabilities, no new privileges, a root to read only, memory and CPUs, mounts. The
filter that stands for RuntimeDefault here (of Debian's containers-common, which refuses less than containerd's) is
handed over too; runsc loads it under `--oci-seccomp` alone. Wants root.

Example: python -m tests.cluster.pod --runsc ./runsc --shared shared work \
             python3 -m tests.evaluation.contained
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
JOB = ROOT / "cluster/kubernetes/evaluation/job.yaml"
CODE, PACKAGES = "/opt/cert-ray", "/opt/packages"
IMAGE_GROUP = 100  # of the image's user 1000, `ray`
_CERT_RAY = ("python3", "-c", "from cert_ray.cli import main; main()")
_SETS = ("bounding", "effective", "permitted", "inheritable", "ambient")
_PROFILE = Path("/usr/share/containers/seccomp.json")  # Debian's golang-github-containers-common
_MASKED = "/proc/asound /proc/acpi /proc/kcore /proc/keys /proc/timer_list /proc/sched_debug /proc/scsi /sys/firmware"
_READ_ONLY = "/proc/bus /proc/fs /proc/irq /proc/sys /proc/sysrq-trigger"
_ANNOTATION = "io.kubernetes.cri."
_UNITS = {"Gi": 1 << 30, "Mi": 1 << 20}


def oci_config(
    pod: Mapping[str, Any], command: Sequence[str], root: Path, volumes: Mapping[str, Path], netns: str | None
) -> dict[str, Any]:
    """The runtime's configuration of the only container of `pod`.

    Args:
        volumes: where each of the pod's volumes lies here, by its name.
    """
    (container,) = pod["containers"]
    of_pod, own = pod["securityContext"], container["securityContext"]
    limits = container["resources"]["limits"]
    kept: list[str] = [] if own["capabilities"] == {"drop": ["ALL"]} else ["CAP_CHOWN"]
    network: dict[str, str] = {"type": "network"} | ({"path": f"/var/run/netns/{netns}"} if netns else {})
    mounts = [
        _bound(mount["mountPath"], volumes[mount["name"]], mount.get("readOnly", False))
        for mount in container["volumeMounts"]
    ]
    named = {variable["name"]: variable["value"] for variable in container.get("env", [])}
    paths = {"PATH": "/usr/bin:/bin", "HOME": "/home/ray", "PYTHONPATH": f"{CODE}:{PACKAGES}"}
    environment = {**paths, "PYTHONDONTWRITEBYTECODE": "1", "LANG": "C.UTF-8", **named}
    return {
        "ociVersion": "1.0.2",
        "hostname": "evaluate",
        "process": {
            "user": {"uid": of_pod["runAsUser"], "gid": IMAGE_GROUP, "additionalGids": [of_pod["fsGroup"]]},
            "args": list(command),
            "env": [f"{name}={value}" for name, value in environment.items()],
            "cwd": CODE,
            "capabilities": dict.fromkeys(_SETS, kept),
            "noNewPrivileges": not own["allowPrivilegeEscalation"],
        },
        "root": {"path": str(root), "readonly": own["readOnlyRootFilesystem"]},
        "mounts": [*_system_mounts(), *mounts],
        "linux": {
            "resources": {
                "memory": {"limit": int(limits["memory"][:-2]) * _UNITS[limits["memory"][-2:]]},
                "cpu": {"quota": int(limits["cpu"]) * 100_000, "period": 100_000},
            },
            "namespaces": [*({"type": name} for name in ("pid", "ipc", "uts", "mount")), network],
            "maskedPaths": _MASKED.split(),
            "readonlyPaths": _READ_ONLY.split(),
            **({"seccomp": _default_filter()} if of_pod["seccompProfile"] == {"type": "RuntimeDefault"} else {}),
        },
    }


def _bound(place: str, source: Path | str, read_only: bool = True) -> dict[str, Any]:
    options = ["rbind", "rprivate", "ro" if read_only else "rw"]
    return {"destination": place, "source": str(source), "type": "bind", "options": options}


def _system_mounts() -> list[dict[str, Any]]:
    def mount(place: str, kind: str, *options: str) -> dict[str, Any]:
        return {"destination": place, "source": kind, "type": kind, "options": ["nosuid", *options]}

    return [
        mount("/proc", "proc", "noexec", "nodev"),
        mount("/dev", "tmpfs", "mode=755", "size=65536k"),
        mount("/dev/pts", "devpts", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"),
        mount("/dev/shm", "tmpfs", "noexec", "nodev", "mode=1777", "size=65536k"),
        mount("/sys", "sysfs", "noexec", "nodev", "ro"),
        _bound("/usr", "/usr"),
        _bound("/etc", "/etc"),
        _bound(CODE, ROOT),
        _bound(PACKAGES, sysconfig.get_path("purelib")),
    ]


def _default_filter() -> dict[str, Any]:
    """The rules of `_PROFILE` for this machine and no capability; none refused where it is not installed."""
    if not _PROFILE.is_file():
        return {"defaultAction": "SCMP_ACT_ALLOW"}
    profile = json.loads(_PROFILE.read_text())
    rules = []
    for rule in profile["syscalls"]:
        wanted, not_for = rule.get("includes") or {}, rule.get("excludes") or {}
        if (
            wanted.get("caps")
            or "amd64" in not_for.get("arches", ())
            or "amd64" not in wanted.get("arches", ("amd64",))
        ):
            continue
        rules.append({key: rule[key] for key in ("names", "action", "args", "errnoRet") if rule.get(key)})
    architectures = ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"]
    return {"defaultAction": profile["defaultAction"], "architectures": architectures, "syscalls": rules}


def made_bundles(work: Path, shared: Path, command: Sequence[str], netns: str | None) -> tuple[Path, Path]:
    """The folders of the pod's sandbox and of its container, with their configurations."""
    pod = next(yaml.safe_load_all(JOB.read_text()))["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    asked = list(command) or [*container["command"], *container["args"]]
    asked = [*_CERT_RAY, *asked[1:]] if asked[0] == "cert-ray" else asked
    volumes = {"shared": shared, "results": work / "results", "tmp": work / "tmp"}
    for folder in (work / "results", work / "tmp"):
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o1777)
    config = oci_config(pod, asked, _root(work / "root"), volumes, netns)
    sandbox = work / "sandbox", config | {"annotations": {f"{_ANNOTATION}container-type": "sandbox"}}
    sandbox[1]["process"] = config["process"] | {"args": ["sleep", "infinity"]}
    inside = {f"{_ANNOTATION}container-type": "container", f"{_ANNOTATION}sandbox-id": _sandbox_id()}
    for folder, written in (sandbox, (work / "container", config | {"annotations": inside})):
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(written, indent=1))
    return work / "sandbox", work / "container"


def _sandbox_id() -> str:
    return f"cert-ray-pod-{os.getpid()}"


def _root(folder: Path) -> Path:
    """A root folder of mount points, and the links of a merged /usr."""
    places = ["usr", "etc", "proc", "dev", "sys", "tmp", "shared", "results", "home/ray"]
    for place in (*places, CODE.lstrip("/"), PACKAGES.lstrip("/")):
        (folder / place).mkdir(parents=True, exist_ok=True)
    for name in ("bin", "sbin", "lib", "lib64"):
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(f"usr/{name}")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runsc", required=True)
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--netns", help="an `ip netns` that stands for the pod's network; default: no network at all")
    parser.add_argument("--flag", action="append", default=[], help="one more for runsc, e.g. --flag=--oci-seccomp")
    parser.add_argument("work", type=Path)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    given = parser.parse_args()
    work, shared = given.work.absolute(), given.shared.absolute()
    sandbox, container = made_bundles(work, shared, given.command, given.netns)
    network = "sandbox" if given.netns else "none"
    options = ["--root", str(work / "state"), "--platform=systrap", f"--network={network}", *given.flag]
    runsc = [given.runsc, *options]
    name = _sandbox_id()
    try:
        with (work / "sandbox.log").open("wb") as log:
            create = [*runsc, "create", "--bundle", str(sandbox), name]
            subprocess.run(create, check=True, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        subprocess.run([*runsc, "start", name], check=True)
        status = subprocess.run([*runsc, "run", "--bundle", str(container), f"{name}-evaluate"], check=False).returncode
    finally:
        for one in (f"{name}-evaluate", name):
            subprocess.run([*runsc, "delete", "-force", one], check=False, stderr=subprocess.DEVNULL)
    sys.exit(status)


if __name__ == "__main__":
    main()
