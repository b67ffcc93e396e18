"""cluster/aws.yaml and gcp.yaml, as `ray up` reads them."""

import copy
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.cluster.manifests import ROOT, clusters

CLOUDS = ["aws", "gcp"]


def _config(cloud: str) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((ROOT / "cluster" / f"{cloud}.yaml").read_text())
    return config


def _nodes(cloud: str) -> dict[str, Any]:
    nodes: dict[str, Any] = _config(cloud)["available_node_types"]
    return nodes


@pytest.mark.parametrize("cloud", CLOUDS)
def test_ray_takes_it(cloud: str) -> None:
    validate_config(prepare_config(_config(cloud)))


@pytest.mark.parametrize("cloud", CLOUDS)
def test_ray_would_refuse_a_misspelt_field(cloud: str) -> None:
    config = _config(cloud)
    config["available_node_types"]["head"]["min_worker"] = 0
    with pytest.raises(Exception, match="min_worker"):
        validate_config(prepare_config(config))


@pytest.mark.parametrize("cloud", CLOUDS)
def test_pools_are_those_of_kubernetes(cloud: str) -> None:
    groups = clusters()["shared"]["spec"]["workerGroupSpecs"]
    expected = {
        group["groupName"].replace("-", "_"): (
            {name: int(count) for name, count in group["resources"].items()},
            group["minReplicas"],
            group["maxReplicas"],
            group.get("labels", {}),
        )
        for group in groups
    }
    found = {
        name: (node["resources"], node["min_workers"], node["max_workers"], node.get("labels", {}))
        for name, node in _nodes(cloud).items()
        if name != "head"
    }
    assert found == expected
    assert _config(cloud)["max_workers"] == sum(most for _, _, most, _ in expected.values())
    assert _nodes(cloud)["head"]["resources"] == {"CPU": 0}


@pytest.mark.parametrize("cloud", CLOUDS)
def test_every_start_wants_the_token(cloud: str) -> None:
    # As the cluster would have it: what is left out here is filled in by Ray, without a token.
    config = prepare_config(copy.deepcopy(_config(cloud)))
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        starts = [command for command in commands if "ray start" in command]
        assert len(starts) == 1
        assert starts[0].startswith("RAY_AUTH_MODE=token ray start ")
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "chmod 600 ~/.ray/auth_token" in config["worker_setup_commands"]
    assert "chmod 600 ~/.ray/auth_token" in config["head_setup_commands"]


@pytest.mark.parametrize("cloud", CLOUDS)
def test_the_dashboard_is_on_loopback(cloud: str) -> None:
    (start,) = [command for command in _config(cloud)["head_start_ray_commands"] if "--head" in command]
    assert "--dashboard-host=127.0.0.1" in start.split()
    assert "0.0.0.0" not in yaml.safe_dump(_config(cloud))


def test_spot_machines_are_for_what_may_be_lost() -> None:
    aws = {name: node["node_config"].get("InstanceMarketOptions") for name, node in _nodes("aws").items()}
    spot = {"MarketType": "spot"}
    assert aws == {"head": None, "cpu_decode": spot, "encode_gpu": spot, "train_gpu": None}
    gcp = {
        name: node["node_config"].get("scheduling", {}).get("provisioningModel")
        for name, node in _nodes("gcp").items()
    }
    assert gcp == {"head": None, "cpu_decode": "SPOT", "encode_gpu": "SPOT", "train_gpu": None}


def test_networks_are_ones_own() -> None:
    """Ray's own security group and Google's default network let the whole internet knock at port 22."""
    for node in _nodes("aws").values():
        assert node["node_config"]["SecurityGroupIds"]
        assert node["node_config"]["SubnetIds"]
        assert node["node_config"]["MetadataOptions"]["HttpTokens"] == "required"
    for node in _nodes("gcp").values():
        (interface,) = node["node_config"]["networkInterfaces"]
        assert not interface["subnetwork"].endswith("/default")


@pytest.mark.parametrize("cloud", CLOUDS)
def test_workers_do_not_have_the_head_s_role(cloud: str) -> None:
    field = {"aws": "IamInstanceProfile", "gcp": "serviceAccounts"}[cloud]
    roles = {name: str(node["node_config"][field]) for name, node in _nodes(cloud).items()}
    head = roles.pop("head")
    assert "ray-ldm-head" in head
    assert all("ray-ldm-worker" in role and "ray-ldm-head" not in role for role in roles.values())


@pytest.mark.parametrize("cloud", CLOUDS)
def test_gpu_nodes_run_the_gpu_image(cloud: str) -> None:
    images = {name: node.get("docker", {}).get("worker_image") for name, node in _nodes(cloud).items()}
    cpu = _config(cloud)["docker"]["image"]
    gpu = cpu.replace("-cpu", "-gpu")
    assert cpu.endswith("-cpu")
    assert images == {"head": None, "cpu_decode": None, "encode_gpu": gpu, "train_gpu": gpu}


def test_boto3_is_the_pinned_one() -> None:
    (command,) = _config("aws")["head_setup_commands"]
    pin = command.split()[-1]
    assert pin.startswith("boto3==")
    assert pin in (ROOT / "constraints.txt").read_text().splitlines()
