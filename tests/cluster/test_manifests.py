"""cluster/kuberay: its schemas, and what must hold between its files."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.kubernetes_schemas import faults
from tests.cluster.manifests import (
    KUBERAY,
    NAMESPACE,
    ROOT,
    Object,
    clusters,
    documents,
    everything,
    of_kind,
    pods,
    ray_pods,
    selects,
)

KUEUE_QUEUE = "kueue.x-k8s.io/queue-name"
MOST_WORKER_GROUPS = 7  # of a Kueue workload, which has eight pod sets


def _names(kind: str) -> set[str]:
    return {document["metadata"]["name"] for document in of_kind(kind)}


@pytest.mark.parametrize(
    "document",
    [document for _, document in documents() if document["kind"] != "PodMonitor"],
    ids=lambda document: f"{document['kind']}-{document['metadata']['name']}",
)
def test_it_is_what_kubernetes_and_kuberay_take(document: Object) -> None:
    assert faults(document) == []


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("RayCluster", ("spec", "autoscalerOptions", "version"), "v3"),
        ("RayCluster", ("spec", "workerGroupSpecs", 0, "minReplica"), 1),
        ("RayCluster", ("spec", "headGroupSpec", "template", "spec", "containers", 0, "imge"), "x"),
        ("RayCluster", ("spec", "headGroupSpec", "template", "spec", "securityContext", "runAsUser"), "root"),
        ("RayJob", ("spec", "submissionMode"), "FtpMode"),
        ("RayService", ("spec", "upgradeStrategy", "type"), "Hope"),
        ("NetworkPolicy", ("spec", "policyTypes"), "Ingress"),
        ("PodDisruptionBudget", ("spec", "minAvailible"), 1),
        ("StatefulSet", ("spec", "template", "spec", "containers", 0, "ports", 0, "containerPort"), "http"),
    ],
)
def test_a_fault_is_found(kind: str, path: tuple[str | int, ...], value: object) -> None:
    document = of_kind(kind)[0]
    place: Any = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    found = faults(document)
    assert len(found) == 1, found
    assert str(path[-1]) in found[0]


def test_everything_is_in_one_namespace() -> None:
    assert _names("Namespace") == {NAMESPACE}
    for _, document in documents():
        if document["kind"] != "Namespace":
            assert document["metadata"]["namespace"] == NAMESPACE


def test_what_pods_name_exists() -> None:
    for pod in pods():
        assert pod.spec.get("serviceAccountName", "default") in _names("ServiceAccount") | {"default"}
        volumes = {volume["name"]: volume for volume in pod.spec["volumes"]}
        claimed = {each["metadata"]["name"] for each in _claim_templates(pod.name)}
        assert {mount["name"] for mount in pod.container["volumeMounts"]} == set(volumes) | claimed
        for volume in volumes.values():
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in _names("PersistentVolumeClaim")


def _claim_templates(name: str) -> list[Object]:
    return [
        template
        for each in of_kind("StatefulSet")
        if each["metadata"]["name"] == name
        for template in each["spec"]["volumeClaimTemplates"]
    ]


def test_pods_have_no_rights_that_they_do_not_need() -> None:
    for pod in pods():
        security = pod.spec["securityContext"]
        assert security["runAsNonRoot"] is True
        assert security["runAsUser"] > 0
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod.spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
    for cluster in clusters().values():
        options = cluster["spec"].get("autoscalerOptions")
        if options is not None:
            assert options["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }


def test_kubernetes_token_is_where_something_scales() -> None:
    accounts = {each["metadata"]["name"]: each for each in of_kind("ServiceAccount")}
    with_token = set()
    for pod in pods():
        account = accounts.get(pod.spec.get("serviceAccountName"), {})
        if pod.spec.get("automountServiceAccountToken", account.get("automountServiceAccountToken", True)):
            with_token.add(pod.name)
    assert with_token == {"shared/head", "serve/head"}
    scaling = {name for name, cluster in clusters().items() if cluster["spec"]["enableInTreeAutoscaling"]}
    assert with_token == {f"{name}/head" for name in scaling}


def test_memory_and_gpus_are_asked_for_as_much_as_they_are_limited() -> None:
    resources = [container["resources"] for pod in pods() for container in pod.spec["containers"]]
    resources += [
        cluster["spec"]["autoscalerOptions"]["resources"]
        for cluster in clusters().values()
        if "autoscalerOptions" in cluster["spec"]
    ]
    for each in resources:
        assert each["requests"]["memory"] == each["limits"]["memory"]
        assert each["requests"].get("nvidia.com/gpu") == each["limits"].get("nvidia.com/gpu")
        assert "cpu" in each["requests"]


def test_images_have_a_version() -> None:
    for pod in pods():
        for container in pod.spec["containers"]:
            assert re.fullmatch(r"[\w./-]+:\d[\w.-]+", container["image"])


def _secrets() -> set[tuple[str, str]]:
    """(Secret, key) of all that is named anywhere; the key is "" for a whole Secret as a volume."""
    found = set()
    for _, document in documents():
        for each in everything(document):
            if "secretKeyRef" in each:
                found.add((each["secretKeyRef"]["name"], each["secretKeyRef"]["key"]))
            if "secretName" in each:
                found.add((each["secretName"], "auth_token" if "mode" in each else ""))
    return found


def test_secrets_are_documented_and_none_is_in_a_file() -> None:
    readme = (KUBERAY / "README.md").read_text()
    documented = set(re.findall(r"^\| `(ldm-[\w-]+)` \| `(\w+)` \|", readme, flags=re.MULTILINE))
    used = _secrets()
    assert {name for name, _ in used} == {name for name, _ in documented}
    assert {(name, key) for name, key in used if key} <= documented
    # What is mounted whole must have the key that the server reads as a file.
    serve = yaml.safe_load((ROOT / "cluster" / "serve.yaml").read_text())
    key_file = serve["applications"][0]["args"]["access"]["key_file"]
    assert ("ldm-api-keys", Path(key_file).name) in documented
    assert of_kind("Secret") == []


def test_nothing_that_looks_like_a_secret_has_a_value() -> None:
    for _, document in documents():
        for each in everything(document):
            if re.search("PASSWORD|TOKEN|SECRET|KEY", str(each.get("name", ""))):
                assert "value" not in each
    redis = [cluster["spec"].get("gcsFaultToleranceOptions") for cluster in clusters().values()]
    assert all("value" not in each["redisPassword"] for each in redis if each)
    (stateful,) = of_kind("StatefulSet")
    (script,) = [
        each for each in stateful["spec"]["template"]["spec"]["containers"][0]["command"] if "redis" in each
    ]
    assert "requirepass $REDIS_PASSWORD" in script


@pytest.mark.parametrize("name", ["shared", "precompute", "train", "serve"])
def test_every_cluster_wants_the_token(name: str) -> None:
    assert clusters()[name]["spec"]["authOptions"] == {"mode": "token", "secretName": "ldm-ray-token"}


def test_heads_that_come_back_find_what_they_knew() -> None:
    kept = {name for name, cluster in clusters().items() if "gcsFaultToleranceOptions" in cluster["spec"]}
    assert kept == {"shared", "serve"}
    (service,) = of_kind("Service")
    (port,) = service["spec"]["ports"]
    for name in kept:
        options = clusters()[name]["spec"]["gcsFaultToleranceOptions"]
        assert options["redisAddress"] == f"{service['metadata']['name']}:{port['port']}"
    (redis,) = [pod for pod in pods() if selects({"matchLabels": service["spec"]["selector"]}, pod.labels)]
    assert redis.name == "redis"


def test_budgets_keep_one_pod_of_one_group_each() -> None:
    """Kubernetes takes only a number in minAvailable for pods whose owner it cannot scale."""
    kept = []
    for budget in of_kind("PodDisruptionBudget"):
        assert set(budget["spec"]) == {"minAvailable", "selector"}
        (pod,) = [pod for pod in pods() if selects(budget["spec"]["selector"], pod.labels)]
        kept.append(pod.name)
        assert type(budget["spec"]["minAvailable"]) is int
    heads = [f"{cluster}/head" for cluster in clusters()]
    assert sorted(kept) == sorted([*heads, "train/train-gpu", "serve/serve-cpu", "serve/serve-gpu"])


def test_only_encoding_runs_on_spot_machines() -> None:
    spot = {
        pod.name
        for pod in pods()
        if any("spot" in str(toleration) for toleration in pod.spec.get("tolerations", []))
    }
    assert spot == {"shared/encode-gpu", "precompute/encode-gpu"}
    with_gpu = {pod.name for pod in pods() if "nvidia.com/gpu" in pod.container["resources"]["limits"]}
    tolerant = {
        pod.name
        for pod in pods()
        if any(each["key"] == "nvidia.com/gpu" for each in pod.spec.get("tolerations", []))
    }
    assert tolerant == with_gpu == {name for name in {pod.name for pod in pods()} if name.endswith("-gpu")}


@pytest.mark.parametrize("document", of_kind("RayJob"), ids=lambda each: each["metadata"]["name"])
def test_queued_jobs_are_of_a_kind_that_kueue_admits(document: Object) -> None:
    assert document["metadata"]["labels"][KUEUE_QUEUE]
    spec = document["spec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert "clusterSelector" not in spec
    assert spec["rayClusterSpec"]["enableInTreeAutoscaling"] is False
    groups = spec["rayClusterSpec"]["workerGroupSpecs"]
    assert len(groups) <= MOST_WORKER_GROUPS
    for group in groups:
        assert group["replicas"] == group["minReplicas"] == group["maxReplicas"]


def test_a_cluster_that_scales_is_in_no_queue() -> None:
    for kind in ("RayCluster", "RayService"):
        for document in of_kind(kind):
            assert KUEUE_QUEUE not in document["metadata"].get("labels", {})


def test_a_training_writes_where_all_its_nodes_and_the_driver_see_it() -> None:
    (entrypoint,) = [
        each["spec"]["entrypoint"] for each in of_kind("RayJob") if each["metadata"]["name"] == "train"
    ]
    out = entrypoint.split()[3]
    of_job = [pod for pod in ray_pods() if pod.labels["app.kubernetes.io/instance"] == "train"]
    assert len(of_job) == 2
    for pod in of_job:
        (mount,) = [each for each in pod.container["volumeMounts"] if out.startswith(each["mountPath"] + "/")]
        assert not mount.get("readOnly", False)
    (claim,) = of_kind("PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


def test_labels_say_what_a_pod_is() -> None:
    for pod in ray_pods():
        cluster, group = pod.name.split("/")
        assert pod.labels["app.kubernetes.io/part-of"] == "ray-ldm"
        assert pod.labels["app.kubernetes.io/instance"] == cluster
        assert pod.labels["app.kubernetes.io/component"] == group
