"""What KubeRay 1.7's operator and Kubernetes' schedulers make of the manifests: what no schema says.

The labels, volumes and rules are those of KubeRay's own source (`common/pod.go`, `utils/validation.go`,
`raycluster_controller.go`, its Helm chart and kustomize files), read in November 2026; no operator runs here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.manifests import (
    BUILDS,
    JOBS,
    KUBERNETES,
    OVERLAYS,
    RAY_KINDS,
    of_kind,
    overlay,
    pod_specs,
    pod_templates,
    ray_cluster_spec,
    shipped,
)

OURS = {"kubernetes.io/metadata.name": "cert-ray"}
ELSEWHERE = {"kubernetes.io/metadata.name": "elsewhere"}


def ray_pod(kind: str, **labels: str) -> tuple[dict[str, str], dict[str, str]]:
    """A pod that KubeRay makes in our namespace: its labels, and the namespace's."""
    made = {"app.kubernetes.io/name": "kuberay", "app.kubernetes.io/created-by": "kuberay-operator"}
    return {**made, "ray.io/is-ray-node": "yes", "ray.io/node-type": kind, **labels}, OURS


HEAD, WORKER, CLEANUP = ray_pod("head"), ray_pod("worker"), ray_pod("redis-cleanup")
ENGINE = ray_pod("worker", **{"ray.io/serve": "true", "ray.io/group": "gpu-serve"})
GENERATED = ray_pod("worker", **{"cert-ray/runs-generated-code": "true"})
REDIS = {"app": "redis"}, OURS
EVALUATION = {"app": "cert-ray-evaluate"}, OURS
BY_HELM = {"app.kubernetes.io/name": "kuberay-operator", "app.kubernetes.io/component": "kuberay-operator"}, ELSEWHERE
BY_KUSTOMIZE = {"app.kubernetes.io/name": "kuberay", "app.kubernetes.io/component": "kuberay-operator"}, ELSEWHERE
CLIENT = {"cert-ray/client": "true"}, ELSEWHERE
PROMETHEUS = {"app.kubernetes.io/name": "prometheus"}, ELSEWHERE
NAMES = {"k8s-app": "kube-dns"}, {"kubernetes.io/metadata.name": "kube-system"}
NEIGHBOUR, STRANGER = ({"app": "something"}, OURS), ({"app": "something"}, ELSEWHERE)
Pod = tuple[Mapping[str, str], Mapping[str, str]]


def selects(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """A label selector; an empty one selects everything."""
    assert set(selector) <= {"matchLabels", "matchExpressions"}
    wanted = all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())
    terms = selector.get("matchExpressions", [])
    assert all(term["operator"] == "In" for term in terms)
    return wanted and all(labels.get(term["key"]) in term["values"] for term in terms)


def is_peer(peer: Mapping[str, Any], pod: Pod) -> bool:
    if "ipBlock" in peer:
        return False
    spaces = selects(peer["namespaceSelector"], pod[1]) if "namespaceSelector" in peer else pod[1] == OURS
    return spaces and selects(peer.get("podSelector", {}), pod[0])


def lets(direction: str, pod: Pod, other: Pod, port: int) -> bool:
    """Whether the policies of our namespace let `pod` be reached from `other` ("Ingress"), or reach it ("Egress")."""
    if pod[1] != OURS:
        return True
    policies = [
        one["spec"] for name in ("base", "evaluation") for one in shipped(name) if one["kind"] == "NetworkPolicy"
    ]
    chosen = [one for one in policies if direction in one["policyTypes"] and selects(one["podSelector"], pod[0])]
    rules = [rule for one in chosen for rule in one.get(direction.lower(), [])]
    peers = {"Ingress": "from", "Egress": "to"}[direction]
    return not chosen or any(
        any(is_peer(peer, other) for peer in rule[peers])
        and ("ports" not in rule or port in {one["port"] for one in rule["ports"]})
        for rule in rules
    )


def reaches(pod: Pod, other: Pod, port: int) -> bool:
    return lets("Egress", pod, other, port) and lets("Ingress", other, pod, port)


@pytest.mark.parametrize(
    ("pod", "other", "port"),
    [
        pytest.param(BY_HELM, HEAD, 8265, id="the operator submits jobs and Serve configs"),
        pytest.param(BY_KUSTOMIZE, HEAD, 8265, id="so does one that was installed without Helm"),
        pytest.param(HEAD, REDIS, 6379, id="a head keeps its state"),
        pytest.param(CLEANUP, REDIS, 6379, id="a deleted cluster's state is taken out again"),
        pytest.param(WORKER, HEAD, 6379, id="workers join"),
        pytest.param(HEAD, WORKER, 40_000, id="Ray talks on any port"),
        pytest.param(CLIENT, ENGINE, 8000, id="clients get completions"),
        pytest.param(PROMETHEUS, WORKER, 8080, id="metrics are scraped"),
        pytest.param(PROMETHEUS, HEAD, 8080, id="the head's too"),
        pytest.param(GENERATED, HEAD, 6379, id="pods that run generated code join"),
        pytest.param(GENERATED, NAMES, 53, id="and find the head by name"),
    ],
)
def test_what_has_to_talk_may(pod: Pod, other: Pod, port: int) -> None:
    assert reaches(pod, other, port)


@pytest.mark.parametrize(
    ("pod", "other", "port"),
    [
        pytest.param(STRANGER, HEAD, 8265, id="the dashboard"),
        pytest.param(NEIGHBOUR, HEAD, 8265, id="the dashboard from beside"),
        pytest.param(CLIENT, HEAD, 8265, id="the dashboard by clients"),
        pytest.param(CLIENT, WORKER, 8000, id="pods that do not serve"),
        pytest.param(STRANGER, ENGINE, 8000, id="engines without the label"),
        pytest.param(PROMETHEUS, HEAD, 8265, id="more than metrics"),
        pytest.param(BY_HELM, WORKER, 8265, id="workers by the operator"),
        pytest.param(WORKER, REDIS, 6379, id="the heads' state by workers"),
        pytest.param(GENERATED, REDIS, 6379, id="the heads' state by generated code"),
        pytest.param(GENERATED, STRANGER, 443, id="other pods by generated code"),
        pytest.param(GENERATED, NAMES, 443, id="more than names by generated code"),
        pytest.param(EVALUATION, HEAD, 6379, id="Ray by evaluation alone"),
        pytest.param(EVALUATION, NAMES, 53, id="names by evaluation alone"),
        pytest.param(NEIGHBOUR, EVALUATION, 80, id="evaluation alone"),
    ],
)
def test_nothing_else_does(pod: Pod, other: Pod, port: int) -> None:
    assert not reaches(pod, other, port)


def ray_clusters(name: str) -> list[dict[str, Any]]:
    return [ray_cluster_spec(document) for document in shipped(name) if document["kind"] in RAY_KINDS]


@pytest.mark.parametrize("name", BUILDS)
def test_no_cluster_is_refused_by_the_operators_own_checks(name: str) -> None:
    """`ValidateRayClusterSpec`: with autoscaler v2, and with Redis in `gcsFaultToleranceOptions`."""
    for spec in ray_clusters(name):
        assert spec["autoscalerOptions"]["version"] == "v2"
        for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
            assert "restartPolicy" not in group["template"]["spec"], "v2 wants Never, which the operator sets"
            assert "suspend" not in group
            assert "labels" not in group["rayStartParams"]
            assert not (
                {"num-cpus", "num-gpus", "memory", "resources"} & set(group["rayStartParams"])
                and group.get("resources")
            )
            set_by_the_operator = {"RAY_enable_autoscaler_v2", "REDIS_PASSWORD", "REDIS_USERNAME", "RAY_REDIS_ADDRESS"}
            variables = {one["name"] for one in group["template"]["spec"]["containers"][0].get("env", [])}
            assert not (set_by_the_operator | {"RAY_AUTH_TOKEN", "RAY_AUTH_MODE", "RAY_ADDRESS"}) & variables
        assert not {"redis-password", "redis-username"} & set(spec["headGroupSpec"]["rayStartParams"])
    for document in shipped(name):
        if document["kind"] in RAY_KINDS:
            assert re.fullmatch(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?", document["metadata"]["name"])
            assert "ray.io/ft-enabled" not in document["metadata"].get("annotations", {})


@pytest.mark.parametrize("name", BUILDS)
def test_the_head_reads_what_its_autoscaler_logs(name: str) -> None:
    """The operator shares `/tmp/ray` between both itself only where the head has no such mount of its own."""
    for spec in ray_clusters(name):
        head = spec["headGroupSpec"]["template"]["spec"]["containers"][0]
        shared = {mount["name"] for mount in head["volumeMounts"] if mount["mountPath"] == "/tmp/ray"}
        assert [mount["name"] for mount in spec["autoscalerOptions"]["volumeMounts"]] == list(shared) == ["ray"]


def test_prometheus_operator_scrapes_what_the_network_lets_it_and_has_every_alert() -> None:
    """By labels and port that KubeRay gives its pods; no schema of that operator is at hand."""
    monitor, rules = of_kind("monitoring", "PodMonitor"), of_kind("monitoring", "PrometheusRule")
    for pod in (HEAD, WORKER, ENGINE, GENERATED):
        assert selects(monitor["spec"]["selector"], pod[0])
    assert not selects(monitor["spec"]["selector"], REDIS[0])
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert endpoint["port"] == "metrics", "which KubeRay adds, 8080"
    alerts = KUBERNETES.parents[1] / "dashboards" / "alerts.yaml"
    assert rules["spec"] == yaml.safe_load(alerts.read_text())
    assert {one["metadata"]["namespace"] for one in (monitor, rules)} == {"cert-ray"}


def gib(quantity: str) -> float:
    return float(quantity.removesuffix("Gi"))


# Allocatable, after what the kubelet keeps, of the smallest machines of that size at AWS and Google (their documents'
# formulas: 15.89 CPUs and 58 GiB of 16 and 64; 7.91 and 28 of 8 and 32), less half a CPU for the node's own pods.
ROOM = {"head": (7.4, 28), "cpu-data": (15.4, 58), "gpu-train": (15.4, 58), "gpu-serve": (7.4, 28)}


@pytest.mark.parametrize("role", ROOM)
def test_pods_fit_the_nodes_that_they_are_meant_for(role: str) -> None:
    spec = of_kind("base", "RayCluster")["spec"]
    pod = dict(pod_specs(of_kind("base", "RayCluster")))[role]
    asked = [container["resources"]["requests"] for container in pod["containers"]]
    if role == "head":
        asked.append({"cpu": "0.5", "memory": "0.5Gi"})
        assert spec["autoscalerOptions"]["resources"]["requests"] == {"cpu": "500m", "memory": "512Mi"}
    cpus, memory = ROOM[role]
    assert sum(float(one["cpu"]) for one in asked) <= cpus
    assert sum(gib(one["memory"]) for one in asked) <= memory


@pytest.mark.parametrize("name", BUILDS)
def test_what_a_pod_asks_for_is_what_ray_believes_it_has(name: str) -> None:
    """The operator tells Ray the limits: were requests smaller, tasks would share what they count as their own."""
    for spec in ray_clusters(name):
        for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
            container = group["template"]["spec"]["containers"][0]
            assert container["resources"]["requests"] == container["resources"]["limits"]
            assert float(container["resources"]["limits"]["cpu"]).is_integer()
            shm = {one["name"]: one for one in group["template"]["spec"]["volumes"]}["shm"]["emptyDir"]
            assert gib(shm["sizeLimit"]) <= gib(container["resources"]["limits"]["memory"]) / 3, "memory like any other"


@pytest.mark.parametrize("job", JOBS)
def test_a_driver_that_asks_for_cpus_fits_a_pod(job: str) -> None:
    rayjob = of_kind(f"jobs/{job}", "RayJob")
    wanted = rayjob["spec"].get("entrypointNumCpus", 0)
    groups = ray_cluster_spec(rayjob)["workerGroupSpecs"]
    limits = [group["template"]["spec"]["containers"][0]["resources"]["limits"] for group in groups]
    assert wanted <= max(float(limit["cpu"]) for limit in limits)


@pytest.mark.parametrize("name", BUILDS)
def test_only_groups_with_gpus_go_to_nodes_with_gpus(name: str) -> None:
    for spec in ray_clusters(name):
        for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
            pod = group["template"]["spec"]
            tolerated = any(one["key"] == "nvidia.com/gpu" for one in pod.get("tolerations", []))
            assert tolerated == ("nvidia.com/gpu" in pod["containers"][0]["resources"]["limits"])


@pytest.mark.parametrize("name", BUILDS)
def test_no_pod_goes_through_all_files_of_a_volume_when_it_starts(name: str) -> None:
    for document in shipped(name):
        for role, pod in pod_specs(document):
            security = pod["securityContext"]
            if any("persistentVolumeClaim" in volume for volume in pod.get("volumes", [])):
                assert security["fsGroupChangePolicy"] == "OnRootMismatch", f"{name}: {role}"


def test_pods_under_gvisor_wait_for_nodes_that_have_it() -> None:
    assert of_kind("base", "RuntimeClass")["scheduling"]["nodeSelector"] == {"cert-ray/gvisor": "true"}


@pytest.mark.parametrize("name", BUILDS)
def test_nodes_of_drivers_and_of_training_are_not_taken_away_to_save_some(name: str) -> None:
    kept = {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false", "karpenter.sh/do-not-disrupt": "true"}
    for document in shipped(name):
        for role, template in pod_templates(document):
            if document["kind"] in RAY_KINDS:
                annotations = template.get("metadata", {}).get("annotations", {})
                assert (annotations == kept) == (role in {"head", "gpu-train"}), f"{name}: {role}"


def test_a_training_pod_that_is_stopped_has_the_time_for_a_checkpoint() -> None:
    """And no other waits: what they do is done again elsewhere."""
    (cluster,) = (document for document in shipped("base") if document["kind"] == "RayCluster")
    for role, pod in pod_specs(cluster):
        (container,) = pod["containers"]
        if role != "gpu-train":
            assert "lifecycle" not in container
            continue
        *command, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
        assert command == ["cert-ray", "drain", "--within-s"]
        assert 60 <= float(seconds) < pod["terminationGracePeriodSeconds"]


def test_a_drained_node_leaves_an_engine() -> None:
    budget = of_kind("service", "PodDisruptionBudget")["spec"]
    assert selects(budget["selector"], ENGINE[0])
    assert not selects(budget["selector"], {**HEAD[0], "ray.io/serve": "false"}), "the operator's label of a head"
    (group,) = ray_cluster_spec(of_kind("service", "RayService"))["workerGroupSpecs"]
    assert 0 < budget["minAvailable"] < group["minReplicas"]


@pytest.mark.parametrize("name", ["base", *OVERLAYS])
def test_every_overlay_has_the_redis_that_jobs_and_service_name(name: str) -> None:
    """Their clusters take the base's options over, whatever an overlay does to its own cluster."""
    (service,) = (one for one in shipped(name) if one["kind"] == "Service")
    named = [
        ray_cluster_spec(of_kind(build, kind))["gcsFaultToleranceOptions"]
        for build, kind in [*((f"jobs/{job}", "RayJob") for job in JOBS), ("service", "RayService")]
    ]
    for options in named:
        assert options["redisAddress"] == f"{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"


def test_a_small_job_fits_a_laptop_from_a_registry_of_ones_own(tmp_path: Path) -> None:
    images = [{"name": "cert-ray", "newName": "registry.example.com/team/cert-ray"}]
    for job in ("preprocess", "tokenizer", "pack"):
        documents = overlay(tmp_path, f"jobs/{job}", components=["jobs/small"], nameSuffix="-mine", images=images)
        (rayjob,) = (document for document in documents if document["kind"] == "RayJob")
        groups = dict(pod_specs(rayjob))
        assert set(groups) == {"head", "cpu-data"}
        for pod in groups.values():
            assert pod["containers"][0]["resources"]["limits"] == {"cpu": "1", "memory": "3Gi"}
            assert pod["containers"][0]["image"].startswith("registry.example.com/team/cert-ray:")
        assert rayjob["spec"].get("entrypointNumCpus", 1) == 1
