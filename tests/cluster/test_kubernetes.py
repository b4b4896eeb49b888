"""The Kubernetes manifests, built as `kubectl apply -k` builds them: valid by KubeRay's and Kubernetes' own schemas,
locked by default, and the names that must follow the recipe do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import ray
import yaml

from cert_ray.operations.recipe import load_recipe
from tests.cluster.manifests import (
    BUILDS,
    JOBS,
    KUBERNETES,
    RAY_KINDS,
    of_kind,
    overlay,
    pod_specs,
    ray_cluster_spec,
    shipped,
)
from tests.cluster.pod import oci_config


def without_unknown_fields(schema: Any) -> Any:
    """The schema, refusing fields that it does not name: the API server would drop them in silence."""
    if isinstance(schema, list):
        return [without_unknown_fields(entry) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {key: without_unknown_fields(value) for key, value in schema.items()}
    named = "properties" in strict and isinstance(strict["properties"], dict)
    if named and "additionalProperties" not in strict and not strict.get("x-kubernetes-preserve-unknown-fields"):
        strict["additionalProperties"] = False
    if strict.get("x-kubernetes-int-or-string"):
        strict.pop("type", None)
    return strict


@pytest.fixture(scope="module")
def crds(shared: Path) -> dict[str, jsonschema.Draft202012Validator]:
    schemas = {}
    for kind, plural in RAY_KINDS.items():
        (crd,) = yaml.load_all((shared / "kuberay-crds" / f"ray.io_{plural}.yaml").read_text(), yaml.CSafeLoader)
        (served,) = (version for version in crd["spec"]["versions"] if version["name"] == "v1")
        schema = without_unknown_fields(served["schema"]["openAPIV3Schema"])
        schema["properties"]["metadata"] = {"type": "object"}
        schemas[kind] = jsonschema.Draft202012Validator(schema)  # checked once, not with every document
    return schemas


@pytest.mark.parametrize("name", BUILDS)
def test_manifests_follow_their_schemas(name: str, crds: dict[str, jsonschema.Draft202012Validator]) -> None:
    assert shipped(name)
    for document in shipped(name):
        if document["kind"] in RAY_KINDS:
            crds[document["kind"]].validate(document)
        else:
            kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


def test_a_misspelt_field_would_be_noticed(crds: dict[str, jsonschema.Draft202012Validator]) -> None:
    cluster = yaml.safe_load(yaml.safe_dump(of_kind("base", "RayCluster")))
    cluster["spec"]["headGroupSpec"]["rayStartParam"] = {}
    with pytest.raises(jsonschema.ValidationError, match="rayStartParam"):
        crds["RayCluster"].validate(cluster)


@pytest.mark.parametrize("name", BUILDS)
def test_pods_are_locked_limited_and_pinned(name: str) -> None:
    for document in shipped(name):
        for role, pod in pod_specs(document):
            where = f"{name}: {document['kind']} {role}"
            assert pod["securityContext"]["runAsNonRoot"] is True, where
            assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, where
            if role != "head":  # whose autoscaler asks the API server
                assert pod["automountServiceAccountToken"] is False, where
            for container in pod["containers"]:
                assert container["securityContext"]["allowPrivilegeEscalation"] is False, where
                assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}, where
                assert "memory" in container["resources"]["limits"], where
                image, _, tag = container["image"].rpartition(":")
                assert tag not in {"", "latest"}, where
                if image.startswith("cert-ray"):
                    assert tag.endswith(f"-ray{ray.__version__}"), f"{where}: not the tested Ray"


@pytest.mark.parametrize("name", BUILDS)
def test_every_ray_asks_for_a_token_and_nothing_is_published(name: str) -> None:
    for document in shipped(name):
        assert document.get("spec", {}).get("type") not in {"LoadBalancer", "NodePort"}
        assert document["kind"] not in {"Ingress", "Secret"}, "no way in, and no secret, is shipped"
        if document["kind"] in RAY_KINDS:
            spec = ray_cluster_spec(document)
            assert spec["authOptions"] == {"mode": "token"}
            assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
            assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
            assert spec["rayVersion"] == ray.__version__


def test_ingress_is_denied_before_it_is_allowed() -> None:
    policies = [document for document in shipped("base") if document["kind"] == "NetworkPolicy"]
    denied = [policy for policy in policies if policy["spec"]["podSelector"] == {}]
    assert [policy["spec"].get("ingress") for policy in denied] == [None]
    for policy in policies:
        for rule in policy["spec"].get("ingress", []):
            assert rule.get("from"), f"{policy['metadata']['name']} lets everybody in"
    (alone,) = (document for document in shipped("evaluation") if document["kind"] == "NetworkPolicy")
    assert alone["spec"]["policyTypes"] == ["Ingress", "Egress"]
    assert not {"ingress", "egress"} & set(alone["spec"])


@pytest.mark.parametrize("name", ["service", *(f"jobs/{job}" for job in JOBS)])
def test_jobs_and_service_have_the_clusters_spec(name: str) -> None:
    """Their clusters are the base's, with fewer groups and one more mount."""
    (document,) = (document for document in shipped(name) if document["kind"] in RAY_KINDS)
    spec, base = ray_cluster_spec(document), of_kind("base", "RayCluster")["spec"]
    assert {key: spec[key] for key in base if not key.endswith(("GroupSpec", "GroupSpecs"))} == {
        key: base[key] for key in base if not key.endswith(("GroupSpec", "GroupSpecs"))
    }
    images = {
        group["groupName"]: group["template"]["spec"]["containers"][0]["image"] for group in base["workerGroupSpecs"]
    }
    for group in spec["workerGroupSpecs"]:
        assert group["template"]["spec"]["containers"][0]["image"] == images[group["groupName"]]


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("preprocess", ["cpu-data"]),
        ("tokenizer", ["cpu-data"]),
        ("pack", ["cpu-data"]),
        ("train", ["gpu-train"]),
        ("evaluate", ["cpu-data", "gpu-train"]),
    ],
)
def test_jobs_run_their_stage_on_the_groups_they_need(name: str, groups: list[str]) -> None:
    job = of_kind(f"jobs/{name}", "RayJob")
    assert job["spec"]["entrypoint"] == f"python /opt/cert-ray/jobs/{name}.py /etc/cert-ray/recipe.yaml"
    assert (KUBERNETES.parents[1] / "jobs" / f"{name}.py").is_file()
    assert [group["groupName"] for group in ray_cluster_spec(job)["workerGroupSpecs"]] == groups
    assert job["spec"]["backoffLimit"] > 0
    assert job["spec"]["shutdownAfterJobFinishes"] is True
    assert job["spec"]["ttlSecondsAfterFinished"] > 0
    assert job["spec"]["activeDeadlineSeconds"] > job["spec"]["preRunningDeadlineSeconds"]


def test_generated_code_runs_below_gvisor_alone_and_reaches_ray_alone() -> None:
    """Programs ask for a CPU each: every group that has one is under gVisor, cut off, and writes no shared volume."""
    spec = ray_cluster_spec(of_kind("jobs/evaluate", "RayJob"))
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    with_cpus = [group for group in groups if group["rayStartParams"].get("num-cpus") != "0"]
    assert [group["groupName"] for group in with_cpus] == ["cpu-data"]
    (pod,) = (group["template"] for group in with_cpus)
    classes = [one["metadata"]["name"] for one in shipped("base") if one["kind"] == "RuntimeClass"]
    assert [pod["spec"]["runtimeClassName"]] == classes == ["cert-ray-gvisor"]
    assert of_kind("evaluation", "Job")["spec"]["template"]["spec"]["runtimeClassName"] == "cert-ray-gvisor"
    mounts = pod["spec"]["containers"][0]["volumeMounts"]
    writable = [mount["mountPath"] for mount in mounts if not mount.get("readOnly")]
    assert writable == ["/dev/shm", "/tmp/ray"]  # Ray's own, gone with the pod
    policies = [one["spec"] for one in shipped("base") if one["kind"] == "NetworkPolicy"]
    (policy,) = (one for one in policies if one["podSelector"].get("matchLabels") == pod["metadata"]["labels"])
    assert policy["policyTypes"] == ["Egress"]
    ray_pods, names = policy["egress"]
    assert ray_pods == {"to": [{"podSelector": {"matchLabels": {"app.kubernetes.io/created-by": "kuberay-operator"}}}]}
    assert names["ports"] == [{"port": 53, "protocol": "UDP"}, {"port": 53, "protocol": "TCP"}]
    assert [peer["ipBlock"] for peer in names["to"] if "ipBlock" in peer] == [{"cidr": "169.254.20.10/32"}]


@pytest.mark.parametrize("name", BUILDS)
def test_no_shipped_command_waives_the_sandbox(name: str) -> None:
    for document in shipped(name):
        said = yaml.safe_dump(document)
        assert "--unsafe" not in said
        assert "--unfiltered" not in said
        assert "unsafe: true" not in said


def test_the_pod_that_scores_samples_has_no_right_and_writes_only_results() -> None:
    """With exactly this the sandbox was seen to start below gVisor: tests/cluster/pod.py reads it from the manifest."""
    pod = of_kind("evaluation", "Job")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    config = oci_config(
        pod, container["command"], Path("/root"), dict.fromkeys(("shared", "results", "tmp"), Path("/v")), None
    )
    process = config["process"]
    assert process["user"]["uid"] == 1000
    assert set(map(tuple, process["capabilities"].values())) == {()}
    assert process["noNewPrivileges"]
    assert config["root"]["readonly"]
    assert config["linux"]["seccomp"]
    mounts = {mount["destination"]: "ro" in mount["options"] for mount in config["mounts"]}
    assert {place: mounts[place] for place in ("/shared", "/results", "/tmp")} == {
        "/shared": True,
        "/results": False,
        "/tmp": False,
    }


def test_the_submission_id_follows_the_recipe(tmp_path: Path) -> None:
    def submitted(text: str) -> tuple[str, str, set[str]]:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        (folder / "mine.yaml").write_text(text)
        recipe = {"name": "recipe", "behavior": "replace", "files": ["recipe.yaml=mine.yaml"]}
        documents = {one["kind"]: one for one in overlay(folder, "jobs/tokenizer", configMapGenerator=[recipe])}
        volumes = [volume for _, pod in pod_specs(documents["RayJob"]) for volume in pod["volumes"]]
        mounted = {volume["configMap"]["name"] for volume in volumes if "configMap" in volume}
        assert documents["ConfigMap"]["data"] == {"recipe.yaml": text}
        return documents["RayJob"]["spec"]["jobId"], documents["ConfigMap"]["metadata"]["name"], mounted

    first, again, other = submitted("a: 1\n"), submitted("a: 1\n"), submitted("a: 2\n")
    assert first == again
    assert first[0] != other[0]
    for identity, name, mounted in (first, other):
        assert identity == name
        assert mounted == {name}


def test_the_example_recipe_is_valid() -> None:
    recipe = load_recipe(str(KUBERNETES / "jobs" / "recipe" / "recipe.yaml"))
    assert list(recipe.models) == ["base", "sketcher", "generator"]
    assert recipe.evaluation is not None
    assert (recipe.evaluation.cpus, recipe.evaluation.gpus) == (0, 1), "where jobs/evaluate has room for sampling"


def test_the_services_serve_config_is_valid() -> None:
    from ray.serve.schema import ServeDeploySchema

    from cert_ray.serving.deployment import ServeConfig

    config = yaml.safe_load(of_kind("service", "RayService")["spec"]["serveConfigV2"])
    ServeDeploySchema.model_validate(config)
    (application,) = config["applications"]
    served = ServeConfig.from_mapping(application["args"], "serve.yaml")
    assert served.autoscaling is not None
    assert served.autoscaling.min_replicas >= 2, "a lost node would be an outage"
    assert served.api_keys_file == "/etc/cert-ray-keys/keys"
    mounts = [m for _, pod in pod_specs(of_kind("service", "RayService")) for m in pod["containers"][0]["volumeMounts"]]
    assert [mount["mountPath"] for mount in mounts if mount["name"] == "api-keys"] == ["/etc/cert-ray-keys"] * 2
