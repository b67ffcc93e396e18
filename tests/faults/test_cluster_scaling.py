"""`ldm bench cluster` as small as it can be, on real raylets: what must hold however slow the machine is."""

import json
from pathlib import Path

import pytest

from jobs.bench_cluster import BenchClusterJob

# Clusters to start and end, and nodes that are to be idle for a while.
pytestmark = [pytest.mark.faults_long, pytest.mark.timeout(600)]


def test_pools_follow_the_work(tmp_path: Path) -> None:
    plot = tmp_path / "plot.png"
    found = BenchClusterJob(
        only=("autoscaling",), images=400, most_nodes=2, idle_timeout_s=10, plot=plot
    ).run()
    assert found["nodes_before"] == found["nodes_of_others"] == found["nodes_train_gpu"] == 0
    assert found["nodes_encode_gpu"] == 2
    assert found["nodes_cpu_decode"] == 1
    assert found["nodes_left"] == 0
    assert plot.stat().st_size > 0
    record = json.loads(plot.with_suffix(".json").read_text())
    assert record["phases"]["began_s"] < record["phases"]["ended_s"] < record["looks"][-1]["at_s"]


def test_every_node_encodes(tmp_path: Path) -> None:
    # A rate of two nodes is refused unless two encoders have committed.
    found = BenchClusterJob(only=("nodes",), counts=(1, 2), rounds=1, units_per_node=4).run()
    assert found.keys() == {
        "images_per_s_1", "images_per_s_2", "cores_busy_1", "cores_busy_2",
        "linear_2", "linear_2_min", "linear_whole_2", "linear_whole_2_min",
    }  # fmt: skip
    assert all(float(str(value)) > 0 for value in found.values())
