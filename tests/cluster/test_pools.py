"""Where work lands: Ray's own autoscaler is asked which nodes it would start for what the jobs ask for."""

import shlex
from collections import Counter
from typing import Any

import pytest
import yaml
from ray._common.utils import resources_from_ray_options
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.autoscaler_pb2 import ClusterResourceConstraint, GangResourceRequest
from ray.core.generated.common_pb2 import LabelSelectorOperator

from jobs.config import JobConfig, load
from jobs.encode import EncodeJob
from jobs.train import TrainJob
from pipelines.encode.pipeline import SUBCLUSTER_LABEL
from tests.cluster.manifests import clusters, of_kind

Bundle = dict[str, float]
JOBS: dict[str, type[JobConfig]] = {"encode": EncodeJob, "train": TrainJob}


def job(name: str) -> Any:
    """The config of what RayJob ``name`` runs, read from its entrypoint as the command line is."""
    (entrypoint,) = [
        each["spec"]["entrypoint"] for each in of_kind("RayJob") if each["metadata"]["name"] == name
    ]
    ldm, command, *arguments = shlex.split(entrypoint)
    assert ldm == "ldm"
    config, _ = load(JOBS[command], command, arguments)
    return config


def started(cluster: str, bundles: list[Bundle], *, at_once: bool = False) -> tuple[Counter[str], int]:
    """(nodes of each pool that the autoscaler starts for ``bundles``, how many of these fit nowhere)."""
    config = AutoscalingConfig(
        _derive_autoscaling_config_from_ray_cr(clusters()[cluster]), skip_content_hash=True
    )
    requests = [ResourceRequestUtil.make(bundle) for bundle in bundles]
    asked: dict[str, Any] = (
        {"gang_resource_requests": [GangResourceRequest(requests=requests)]}
        if at_once
        else {"resource_requests": ResourceRequestUtil.group_by_count(requests)}
    )
    return launched(config, asked)


def started_for_ray_data(bundles: list[Bundle], subcluster: str | None) -> Counter[str]:
    """Nodes of each pool that the autoscaler starts where Ray Data asks it for room for growing pools."""
    config = AutoscalingConfig(
        _derive_autoscaling_config_from_ray_cr(clusters()["shared"]), skip_content_hash=True
    )
    is_in = LabelSelectorOperator.LABEL_OPERATOR_IN
    selectors = [[(SUBCLUSTER_LABEL, is_in, [subcluster])]] if subcluster else None
    requests = [ResourceRequestUtil.make(bundle, label_selectors=selectors) for bundle in bundles]
    counted = ResourceRequestUtil.group_by_count(requests)
    constraint = ClusterResourceConstraint(resource_requests=counted)
    nodes, left = launched(config, {"cluster_resource_constraints": [constraint]})
    assert left == 0
    return nodes


def launched(config: AutoscalingConfig, asked: dict[str, Any]) -> tuple[Counter[str], int]:
    reply = ResourceDemandScheduler().schedule(
        SchedulingRequest(
            node_type_configs=config.get_node_type_configs(),
            max_num_nodes=config.get_max_num_nodes(),
            disable_launch_config_check=True,
            **asked,
        )
    )
    nodes = Counter({launch.instance_type: launch.count for launch in reply.to_launch})
    return nodes, len(reply.infeasible_resource_requests) + len(reply.infeasible_gang_resource_requests)


def encoder(config: EncodeJob) -> Bundle:
    pool = config.encoder
    return dict(
        resources_from_ray_options(
            {"num_cpus": pool.num_cpus, "num_gpus": pool.num_gpus, "accelerator_type": pool.accelerator_type}
        )
    )


def training_worker(config: TrainJob) -> Bundle:
    return {"CPU": 1, "GPU": config.train.num_gpus}  # as pipelines.train.trainer has it


def test_encoders_get_encode_gpu() -> None:
    assert started("shared", [encoder(job("precompute"))] * 3) == (Counter({"encode-gpu": 3}), 0)


def test_reading_and_decoding_get_cpu_decode() -> None:
    config = job("precompute")
    tasks = [{"CPU": config.decode.num_cpus}] * 32 + [{"CPU": config.reader.num_cpus}] * 64
    assert started("shared", tasks) == (Counter({"cpu-decode": 3}), 0)


@pytest.mark.parametrize("cluster", ["shared", "train"])
def test_training_workers_get_train_gpu(cluster: str) -> None:
    config = job("train")
    gang = [training_worker(config)] * config.train.num_workers
    assert started(cluster, gang, at_once=True) == (Counter({"train-gpu": 2}), 0)


@pytest.mark.parametrize(("encoders", "left"), [(8, 0), (9, 1)])
def test_a_precompute_of_fixed_size_has_room_for_all_its_encoders(encoders: int, left: int) -> None:
    config = job("precompute")
    bundles = [encoder(config)] * encoders + [{"CPU": config.decode.num_cpus}] * 64
    assert started("precompute", bundles) == (Counter({"cpu-decode": 4, "encode-gpu": 8}), left)


def test_pools_grow_apart_and_at_the_same_time() -> None:
    decoding, encoding = [{"CPU": 1.0}] * 16, [encoder(job("precompute"))] * 2
    training = [training_worker(job("train"))] * 8
    nodes, left = started("shared", decoding + encoding + training)
    assert nodes == Counter({"cpu-decode": 1, "encode-gpu": 2, "train-gpu": 1})
    assert left == 0


# For encoders that a pool still lacks, as Ray Data has it: of GPUs it tells the number, and no kind.
ROOM = [{"GPU": 1.0}] * 5


def test_growing_pools_of_encoding_get_their_own_nodes() -> None:
    assert started_for_ray_data(ROOM, "encode") == Counter({"encode-gpu": 5})


def test_without_the_label_they_would_get_those_of_training() -> None:
    """Why there is a label: when this fails, Ray has learnt to tell GPUs apart."""
    assert started_for_ray_data(ROOM, None) == Counter({"train-gpu": 1})
    # Or sooner, where CPUs are short as well: no other pool has both.
    assert started_for_ray_data([{"GPU": 1.0}, {"CPU": 1.0}], None) == Counter({"train-gpu": 1})


def test_no_pool_grows_beyond_its_bound_at_the_cost_of_another() -> None:
    nodes, _ = started("shared", [encoder(job("precompute"))] * 100)
    assert nodes == Counter({"encode-gpu": 16})
    nodes, _ = started("shared", [{"CPU": 1.0}] * 1000)
    assert nodes["cpu-decode"] == 20
    assert nodes["encode-gpu"] == 0


def test_an_encoder_that_asks_for_a_cpu_fits_nowhere() -> None:
    """What the comment in raycluster.yaml warns of."""
    nodes, left = started("shared", [{**encoder(job("precompute")), "CPU": 1.0}])
    assert (sum(nodes.values()), left) == (0, 1)


def test_nothing_is_started_without_need() -> None:
    assert started("shared", []) == (Counter(), 0)


def test_jobs_fit_into_the_clusters_that_they_bring() -> None:
    """All that a job asks for at the start is there at the fixed size that Kueue reserves."""
    config = job("precompute")
    sizes = {
        group["groupName"]: group["replicas"]
        for group in clusters()["precompute"]["spec"]["workerGroupSpecs"]
    }
    assert sizes["encode-gpu"] == config.encoder.max_size
    sizes = {
        group["groupName"]: group["replicas"] for group in clusters()["train"]["spec"]["workerGroupSpecs"]
    }
    workers = job("train").train
    assert sizes["train-gpu"] * 8 == workers.num_workers
    assert (sizes["train-gpu"] - 1) * 8 == workers.min_workers


@pytest.mark.parametrize("name", ["precompute", "train"])
def test_jobs_join_the_cluster_rather_than_look_for_resources_first(name: str) -> None:
    assert job(name).cluster.address == "auto"


@pytest.mark.parametrize("cluster", ["shared", "precompute", "train", "serve"])
def test_ray_counts_no_more_than_the_pod_is_given(cluster: str) -> None:
    for group in clusters()[cluster]["spec"]["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert group["resources"].get("GPU", "0") == limits.get("nvidia.com/gpu", "0")


def test_stages_of_the_server_get_their_pools() -> None:
    (service,) = of_kind("RayService")
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    stages = {
        name: {"CPU": stage["num_cpus"], **({"GPU": stage["num_gpus"]} if "num_gpus" in stage else {})}
        for name, stage in application["args"].items()
        if isinstance(stage, dict) and "num_cpus" in stage
    }
    assert set(stages) == {"ingress", "conditioner", "sampler", "decoder"}
    most = {name: application["args"][name]["max_replicas"] for name in stages}
    on_cpu = [stages["ingress"]] * most["ingress"] + [stages["conditioner"]] * most["conditioner"]
    on_gpu = [stages["sampler"]] * most["sampler"] + [stages["decoder"]] * most["decoder"]
    nodes, left = started("serve", on_cpu)
    assert set(nodes) == {"serve-cpu", "serve-gpu"}  # one of serve-gpu is always there
    assert (nodes["serve-cpu"], left) == (2, 0)
    nodes, left = started("serve", on_cpu + on_gpu)
    assert (nodes["serve-gpu"], left) == (9, 0)
