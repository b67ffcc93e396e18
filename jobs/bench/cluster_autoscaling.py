"""An encode on a cluster of Ray's fake multi-node provider with the pools of cluster/kuberay, then nothing.

Each node that the autoscaler adds is a raylet of its own on this machine; GPUs are logical.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FAKE_HEAD_NODE_TYPE

from jobs.bench.cluster_encode import ClusterEncode
from jobs.bench.cluster_facts import Look, Phases, autoscaling_facts
from jobs.bench.cluster_watch import watched
from jobs.bench.photos import write_shards
from jobs.bench.raylets import OBJECT_STORE_BYTES, started_head
from jobs.listening import free_ports
from pipelines.encode.pipeline import SUBCLUSTER_LABEL
from pipelines.encode.pools import ActorPool, TaskPool

__all__ = ["POOLS", "autoscaling", "draw"]

FAKE_PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
COMMANDS = ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands")
SUBCLUSTER = "encode"
LABELS = {SUBCLUSTER_LABEL: SUBCLUSTER}
# Names, resources and labels of cluster/kuberay/raycluster.yaml; fewer CPUs, as these are this machine's.
POOLS: dict[str, dict[str, object]] = {
    "cpu-decode": {"max_workers": 2, "resources": {"CPU": 4}, "labels": LABELS},
    "encode-gpu": {"resources": {"CPU": 0, "GPU": 1, "accelerator_type:L4": 1}, "labels": LABELS},
    "train-gpu": {"max_workers": 1, "resources": {"CPU": 8, "GPU": 8, "accelerator_type:H100": 1}},
}
NEEDED, GROWN = ("cpu-decode", "encode-gpu"), "encode-gpu"
SIZE_PX, UNIT_SIZE, IMAGES_PER_SHARD = 64, 16, 200
IDLE_BEFORE_S = 10.0
# Beyond the idle timeout, until nodes that are still there count as left.
REMOVAL_TIMEOUT_S = 120.0
IDLE_AFTER_S = 10.0


def autoscaling(
    images: int, seconds_per_image: float, nodes: int, idle_timeout_s: float, plot: Path
) -> dict[str, float]:
    """Encode on up to ``nodes`` nodes of encode-gpu, then wait until all are gone; a plot of it."""
    (port,) = free_ports(1)
    with TemporaryDirectory(prefix="ldm-bench-") as name:
        folder = Path(name)
        shards = write_shards(folder / "shards", images, SIZE_PX, IMAGES_PER_SHARD)
        config = folder / "cluster.json"
        config.write_text(json.dumps(provider_config(port, nodes, idle_timeout_s)))
        job = ClusterEncode(
            address=f"127.0.0.1:{port}",
            shards=shards,
            out=folder / "out",
            size_px=SIZE_PX,
            unit_size=UNIT_SIZE,
            seconds_per_image=seconds_per_image,
            read=TaskPool(num_cpus=0.25, max_size=1),
            decode=TaskPool(num_cpus=1, max_size=2),
            encoder=ActorPool(num_cpus=0, num_gpus=1, accelerator_type="L4", max_size=nodes),
            subcluster=SUBCLUSTER,
        )
        looks, phases = _run(job, config, port, idle_timeout_s)
    record = {"phases": asdict(phases), "looks": [asdict(look) for look in looks]}
    plot.parent.mkdir(parents=True, exist_ok=True)
    plot.with_suffix(".json").write_text(json.dumps(record))
    draw(looks, phases, plot)
    return autoscaling_facts(looks, phases, NEEDED, GROWN)


def provider_config(port: int, nodes: int, idle_timeout_s: float) -> dict[str, object]:
    """What ``ray start --autoscaling-config`` reads."""
    pools = {
        name: {
            "node_config": {},
            "min_workers": 0,
            "max_workers": pool.get("max_workers", nodes),
            # Each raylet would take a third of the machine's memory.
            "resources": {**_resources(pool), "object_store_memory": OBJECT_STORE_BYTES},
            "labels": pool.get("labels", {}),
        }
        for name, pool in POOLS.items()
    }
    return {
        "cluster_name": "bench",
        "max_workers": sum(int(str(pool["max_workers"])) for pool in pools.values()),
        "idle_timeout_minutes": idle_timeout_s / 60,
        "provider": {
            # Ray's own name for it, fake_multinode, wants a file of defaults that its packages lack.
            "type": "external",
            "module": FAKE_PROVIDER,
            "gcs_address": f"127.0.0.1:{port}",
            "head_node_id": FAKE_HEAD_NODE_ID,
            "launch_multiple": True,
            "use_node_id_as_ip": True,
            # There is nothing to install on a machine that is this one.
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        # Nothing is copied to this machine and nothing is run there, but Ray wants to be told so.
        **{name: {} for name in ("file_mounts", "docker", "auth")},
        **{name: [] for name in ("cluster_synced_files", *COMMANDS)},
        "head_node_type": FAKE_HEAD_NODE_TYPE,
        "available_node_types": {
            FAKE_HEAD_NODE_TYPE: {"node_config": {}, "max_workers": 0, "resources": {"CPU": 0}},
            **pools,
        },
    }


def _resources(pool: dict[str, object]) -> dict[str, int]:
    resources = pool["resources"]
    assert isinstance(resources, dict)
    return resources


def _run(job: ClusterEncode, config: Path, port: int, idle_timeout_s: float) -> tuple[list[Look], Phases]:
    """Idle, the encode, idle until the last node is gone or the time is up."""
    environment = {
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
    }
    options = ["--autoscaling-config", str(config)]
    with started_head(port=port, resources={"CPU": 0}, options=options, environment=environment) as head:
        with watched(head, list(POOLS)) as looks:
            time.sleep(IDLE_BEFORE_S)
            began_s = time.time()
            job.run(head)
            phases = Phases(began_s, time.time(), idle_timeout_s)
            deadline_s = phases.ended_s + idle_timeout_s + REMOVAL_TIMEOUT_S
            while looks[-1].total and time.time() < deadline_s:
                time.sleep(1)
            time.sleep(IDLE_AFTER_S)
        return looks, phases


def draw(looks: Sequence[Look], phases: Phases, plot: Path) -> None:
    """Nodes of each pool over time, from the begin of the first phase."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 3.4), layout="constrained")
    begin_s, end_s = looks[0].at_s, looks[-1].at_s
    for offset, pool in enumerate(looks[0].nodes):
        # Apart by a little, or lines of equal height would hide each other.
        heights = [look.nodes[pool] + 0.04 * (offset - 1) for look in looks]
        axes.step([look.at_s - begin_s for look in looks], heights, where="post", label=pool, linewidth=1.8)
    most = max(max(look.nodes.values()) for look in looks)
    idle_s = phases.ended_s + phases.idle_timeout_s
    spans = [
        (begin_s, phases.began_s, "idle", "1.0"),
        (phases.began_s, phases.ended_s, "encode", "0.93"),
        (phases.ended_s, min(idle_s, end_s), f"idle timeout, {phases.idle_timeout_s:.0f} s", "0.97"),
        (min(idle_s, end_s), end_s, "idle", "1.0"),
    ]
    for index, (start_s, stop_s, name, shade) in enumerate(spans):
        axes.axvspan(start_s - begin_s, stop_s - begin_s, color=shade, zorder=0)
        axes.axvline(start_s - begin_s, color="0.6", linewidth=0.8)
        # By turns in two lines: a short phase's name is longer than the phase.
        axes.text(start_s - begin_s, most + 0.9 - 0.09 * most * (index % 2), f" {name}", va="top", fontsize=8)
    axes.set(
        xlabel="seconds", ylabel="living nodes of the pool", yticks=range(most + 1), ylim=(-0.2, most + 1),
        xlim=(0, end_s - begin_s),
    )  # fmt: skip
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    figure.savefig(plot, dpi=120)
    pyplot.close(figure)
