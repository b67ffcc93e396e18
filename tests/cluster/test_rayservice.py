"""cluster/kuberay/rayservice.yaml and cluster/serve.yaml: one server, on Kubernetes and elsewhere."""

import yaml
from ray.serve.schema import ServeDeploySchema

from pipelines.serve.application import DRAIN_S
from pipelines.serve.config import ServeConfig
from pipelines.serve.keys import FORBIDDEN_MODE
from tests.cluster.manifests import ROOT, Object, clusters, everything, of_kind, ray_pods

SERVICE = of_kind("RayService")[0]


def _application() -> Object:
    (application,) = yaml.safe_load(SERVICE["spec"]["serveConfigV2"])["applications"]
    return dict(application)


def test_the_server_is_that_of_serve_yaml_on_an_address_that_the_gateway_reaches() -> None:
    ours = yaml.safe_load((ROOT / "cluster" / "serve.yaml").read_text())
    deployed = yaml.safe_load(SERVICE["spec"]["serveConfigV2"])
    assert ours["http_options"].pop("host") == "127.0.0.1"
    assert deployed["http_options"].pop("host") == "0.0.0.0"
    assert deployed == ours
    ServeDeploySchema.model_validate(deployed)
    ServeConfig.model_validate(_application()["args"])


def test_an_upgrade_lets_the_old_cluster_end_what_it_has() -> None:
    assert SERVICE["spec"]["upgradeStrategy"] == {"type": "NewCluster"}
    config = ServeConfig.model_validate(_application()["args"])
    assert SERVICE["spec"]["rayClusterDeletionDelaySeconds"] > max(DRAIN_S, config.request_timeout_s)
    # Clusters that overlap must not share what they keep in Redis.
    assert "externalStorageNamespace" not in clusters()["serve"]["spec"]["gcsFaultToleranceOptions"]


def test_every_node_of_the_server_has_haproxy_and_what_the_server_reads() -> None:
    config = ServeConfig.model_validate(_application()["args"])
    assert config.access.key_file is not None
    for pod in ray_pods():
        environment = {each["name"]: each["value"] for each in pod.container["env"]}
        is_server = pod.labels["app.kubernetes.io/instance"] == "serve"
        assert ("RAY_SERVE_ENABLE_HA_PROXY" in environment) == is_server
        if is_server:
            assert environment["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
            mounted = {mount["mountPath"] for mount in pod.container["volumeMounts"]}
            assert str(config.access.key_file.parent) in mounted
            assert {str(model.folder.parent) for model in config.models.values()} <= mounted


def test_the_key_file_has_a_mode_that_the_server_takes() -> None:
    modes = {
        each["defaultMode"]
        for pod in ray_pods()
        for each in everything(pod.spec["volumes"])
        if each.get("secretName") == "ldm-api-keys"
    }
    assert len(modes) == 1
    assert all(mode & FORBIDDEN_MODE == 0 for mode in modes)
