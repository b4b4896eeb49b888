"""The shipped cluster files: authentication on, every Serve host named, and valid by Ray's own schemas."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.autoscaler
import yaml

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"


def load(name: str) -> Any:
    return yaml.safe_load((CLUSTER / name).read_text())


RAY_UP_FILES = ("hosts.yaml", "aws.yaml", "gcp.yaml")


@pytest.mark.parametrize("name", RAY_UP_FILES)
def test_ray_up_files_follow_rays_schema(name: str) -> None:
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(load(name), schema)


@pytest.mark.parametrize("name", RAY_UP_FILES)
def test_every_ray_start_asks_for_a_token_and_stays_on_loopback(name: str) -> None:
    config = load(name)
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        assert commands[0] == "test -s ~/.ray/auth_token", "the token must exist before Ray starts"
        (start,) = (command for command in commands if "ray start" in command)
        assert "RAY_AUTH_MODE=token" in start
        assert "0.0.0.0" not in start
    for line in (CLUSTER / name).read_text().splitlines():
        assert "ray start" not in line or "RAY_AUTH_MODE=token" in line


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_spot_machines_listen_for_their_clouds_notice_when_their_shell_is_gone(cloud: str, tmp_path: Path) -> None:
    until_told = f"for i in $(seq 200); do test -e {tmp_path}/go && break; sleep 0.1; done"
    says = f"echo $RAY_AUTH_MODE $@ > {tmp_path}/part; mv {tmp_path}/part {tmp_path}/said"
    (tmp_path / "cert-ray").write_text(f"#!/bin/sh\n{until_told}\n{says}\n")
    (tmp_path / "cert-ray").chmod(0o755)
    command = load(f"{cloud}.yaml")["worker_start_ray_commands"][-1].replace("/tmp/", f"{tmp_path}/")
    bare = {"PATH": f"{tmp_path}:/usr/bin:/bin", "HOME": str(tmp_path)}
    subprocess.run(["bash", "-c", command], env=bare, timeout=60, check=True)
    assert not (tmp_path / "said").exists(), "the shell waited for it"
    (tmp_path / "go").touch()
    began = time.monotonic()
    while not (tmp_path / "said").exists() and time.monotonic() < began + 30:
        time.sleep(0.05)
    assert (tmp_path / "said").read_text() == f"token drain --when {cloud}\n"
    assert not any("drain" in command for command in load(f"{cloud}.yaml")["head_start_ray_commands"])


@pytest.mark.parametrize("commands", ["head_start_ray_commands", "worker_start_ray_commands"])
def test_hosts_start_the_checkouts_ray_as_the_image_would(commands: str, tmp_path: Path) -> None:
    """A shell by ssh knows nothing of a virtual environment, and jobs begin with `python`, from Ray's own PATH."""
    tools = tmp_path / ".venv" / "bin"
    tools.mkdir(parents=True)
    (tools / "ray").write_text('#!/bin/sh\necho "$@"; env\n')
    (tools / "ray").chmod(0o755)
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("token")
    lines = [line.replace("CHECKOUT", str(tmp_path)) for line in load("hosts.yaml")[commands]]
    bare = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "RAY_HEAD_IP": "10.0.0.1"}
    said = [
        subprocess.run(["bash", "-c", line], env=bare, capture_output=True, text=True, timeout=60, check=True).stdout
        for line in lines
    ]
    assert said[1].startswith("stop\n")
    assert said[2].startswith("start ")
    started = dict(line.split("=", 1) for line in said[2].splitlines()[1:])
    assert started["PATH"].startswith(f"{tools}:")
    assert started["RAY_AUTH_MODE"] == "token"
    image = re.findall(r"(RAY_grpc_\w+)=(\d+)", (CLUSTER / "Dockerfile").read_text())
    assert len(image) == 2
    assert {name: started.get(name) for name, _ in image} == dict(image)


@pytest.mark.parametrize("path", sorted(CLUSTER.glob("serve-*.yaml")), ids=lambda path: path.name)
def test_what_serve_files_say_to_run_sends_the_token(path: Path) -> None:
    said = path.read_text().partition("proxy_location")[0]
    at = said.index("RAY_AUTH_MODE=token")
    assert all(at < said.index(command) for command in ("ray start", "serve deploy") if command in said)


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml"])
def test_cloud_nodes_get_the_token_the_tested_image_and_no_public_address(name: str) -> None:
    config = load(name)
    assert config["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"
    assert config["provider"]["use_internal_ips"] is True
    docker = [config["docker"], *(kind.get("docker", {}) for kind in config["available_node_types"].values())]
    images = [options[key] for options in docker for key in ("image", "worker_image") if key in options]
    assert len(images) == 2
    assert all(image.endswith(f"-ray{ray.__version__}") for image in images)
    assert config["available_node_types"][config["head_node_type"]]["resources"]["CPU"] == 0


def test_the_image_is_of_the_tested_ray_and_passes_hadolint() -> None:
    text = (CLUSTER / "Dockerfile").read_text()
    assert f"ARG BASE={ray.__version__}-py311-cpu" in text
    hadolint = Path(sys.executable).parent / "hadolint"
    checked = subprocess.run(
        [hadolint, CLUSTER / "Dockerfile"], capture_output=True, text=True, timeout=60, check=False
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_the_image_has_what_the_operators_probe_of_serving_pods_runs() -> None:
    """`wget ... | grep success` in a bash of the pod, by KubeRay's `initLivenessAndReadinessProbe`."""
    (installed,) = re.findall(
        r"apt-get install -y --no-install-recommends ([^\\]+)", (CLUSTER / "Dockerfile").read_text()
    )
    assert {"wget", "bubblewrap", "libseccomp2"} <= set(installed.split())


def test_the_image_is_built_under_the_name_that_pods_ask_for() -> None:
    (name,) = re.findall(r"^IMAGE \?= (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    pods = (CLUSTER / "kubernetes/base/raycluster/raycluster.yaml").read_text()
    assert f"image: {name}\n" in pods
    for page in ("Makefile", "docs/operating.md"):
        (gpu,) = re.findall(r"make image IMAGE=(\S+) IMAGE_ARGS=.*-gpu", (ROOT / page).read_text())
        assert f"image: {gpu}\n" in pods
        assert gpu != name


@pytest.mark.parametrize("path", sorted((ROOT / "tests/cluster/image").glob("*.sh")), ids=lambda path: path.name)
def test_what_builds_the_image_by_hand_passes_shellcheck(path: Path) -> None:
    shellcheck = Path(sys.executable).parent / "shellcheck"
    checked = subprocess.run([shellcheck, path], capture_output=True, text=True, timeout=60, check=False)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("path", sorted(CLUSTER.glob("serve-*.yaml")), ids=lambda path: path.name)
def test_serve_files_name_their_host(path: Path) -> None:
    from ray.serve.schema import ServeDeploySchema

    config = load(path.name)
    ServeDeploySchema.model_validate(config)
    host = config["http_options"]["host"]
    keys = all(application["args"].get("api_keys_file") for application in config["applications"])
    assert host == "127.0.0.1" or keys, "reachable from outside, and no key is asked for"
