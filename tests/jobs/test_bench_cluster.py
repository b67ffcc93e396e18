"""`ldm bench cluster`: what is made of what was seen. The measuring itself is in tests/faults."""

import json
import math
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from jobs.bench.cluster_facts import Committed, Look, Phases, autoscaling_facts, steady_rate, whole_rate
from jobs.bench_cluster import BenchClusterJob

ROOT = Path(__file__).resolve().parents[2]
PHASES = Phases(began_s=110.0, ended_s=150.0, idle_timeout_s=20.0)
NEEDED = ("cpu-decode", "encode-gpu")


def looks(*rows: tuple[float, int, int, int]) -> list[Look]:
    """(at_s, nodes of cpu-decode, of encode-gpu, of train-gpu)"""
    return [
        Look(at_s, {"cpu-decode": decode, "encode-gpu": encode, "train-gpu": train})
        for at_s, decode, encode, train in rows
    ]


def facts(*rows: tuple[float, int, int, int]) -> dict[str, float]:
    return autoscaling_facts(looks(*rows), PHASES, NEEDED, "encode-gpu")


def test_pools_that_follow_the_work() -> None:
    found = facts(
        (100, 0, 0, 0), (109, 0, 0, 0), (115, 1, 1, 0), (125, 1, 3, 0), (126, 1, 4, 0), (149, 1, 4, 0),
        (174, 1, 4, 0), (175, 0, 2, 0), (177, 0, 0, 0), (180, 0, 0, 0),
    )  # fmt: skip
    assert found == {
        "nodes_cpu_decode": 1, "nodes_encode_gpu": 4, "nodes_train_gpu": 0, "nodes_of_others": 0,
        "nodes_before": 0, "nodes_left": 0, "first_node_s": 5, "all_nodes_s": 16, "removed_extra_s": 7,
    }  # fmt: skip


def test_a_pool_that_nobody_needs_is_told() -> None:
    found = facts((100, 0, 0, 0), (120, 1, 1, 1), (130, 1, 1, 0), (180, 0, 0, 0))
    assert (found["nodes_of_others"], found["nodes_train_gpu"]) == (1, 1)


def test_nodes_that_stay_or_come_back_are_not_removed() -> None:
    stay = facts((100, 0, 0, 0), (120, 1, 1, 0), (171, 0, 0, 0), (172, 0, 1, 0))
    assert (stay["removed_extra_s"], stay["nodes_left"]) == (math.inf, 1)
    back = facts((100, 0, 0, 0), (120, 1, 1, 0), (171, 0, 0, 0), (172, 0, 1, 0), (175, 0, 0, 0))
    assert (back["removed_extra_s"], back["nodes_left"]) == (5, 0)


def test_nodes_that_were_never_added() -> None:
    found = facts((100, 0, 0, 0), (180, 1, 0, 0), (181, 0, 0, 0))
    assert (found["first_node_s"], found["all_nodes_s"]) == (math.inf, math.inf)
    assert found["nodes_encode_gpu"] == 0


def test_nodes_of_before_the_job_are_told() -> None:
    assert facts((100, 1, 0, 0), (120, 1, 1, 0), (190, 0, 0, 0))["nodes_before"] == 1


def commits(encoder: int, *times: float) -> list[Committed]:
    return [Committed(at_s, encoder, 16) for at_s in times]


def test_the_steady_rate_of_one_encoder_leaves_the_first_unit_out() -> None:
    assert steady_rate(commits(1, 5, 6, 7, 8, 9), 1) == 16


def test_the_steady_rate_leaves_ramp_and_tail_out() -> None:
    # The second encoder starts late; the first ends early.
    both = commits(1, 1, 2, 3, 4, 5, 6) + commits(2, 3.5, 4.5, 5.5, 6.5, 7.5)
    # From 3.5 to 6: at 4, 4.5, 5, 5.5 and 6.
    assert steady_rate(both, 2) == 16 * 5 / 2.5


def test_encoders_in_step_do_not_gain_by_it() -> None:
    # The four of the last moment count, those of the first do not: 4 a second, not more.
    four = [commit for encoder in range(4) for commit in commits(encoder, 0, 1, 2, 3)]
    assert steady_rate(four, 4) == 16 * 4


def test_a_rate_needs_every_encoder() -> None:
    with pytest.raises(ValueError, match="1 encoders have committed units, expected 2"):
        steady_rate(commits(1, 1, 2), 2)
    with pytest.raises(ValueError, match="its last unit before another"):
        steady_rate(commits(1, 1, 2) + commits(2, 3, 4), 2)


def test_the_whole_rate_counts_ramp_and_tail() -> None:
    assert whole_rate(commits(1, 2, 3) + commits(2, 5), begun_s=1) == 16 * 3 / 4


def test_ratios_are_those_of_their_round() -> None:
    from jobs.bench.cluster_nodes import ratios

    found = ratios("linear", {1: [10.0, 20.0, 10.0], 2: [20.0, 30.0, 19.0], 4: [40.0, 80.0, 36.0]})
    assert found == {"linear_2": 0.95, "linear_2_min": 0.75, "linear_4": 1.0, "linear_4_min": 0.9}


@pytest.mark.parametrize("counts", [(2, 4), (1, 2, 2), ()])
def test_numbers_of_nodes_begin_with_one(counts: tuple[int, ...]) -> None:
    with pytest.raises(ValidationError, match="of which the first is 1"):
        BenchClusterJob(counts=counts)


def test_pools_are_those_of_kubernetes() -> None:
    from jobs.bench.cluster_autoscaling import POOLS

    manifest = yaml.safe_load((ROOT / "cluster/kuberay/raycluster.yaml").read_text())
    groups = manifest["spec"]["workerGroupSpecs"]
    # CPUs are this machine's.
    expected = {
        group["groupName"]: (
            {name: int(n) for name, n in group["resources"].items() if name != "CPU"},
            int(group["resources"]["CPU"]) > 0,
            group.get("labels", {}),
        )
        for group in groups
    }
    found = {}
    for name, pool in POOLS.items():
        resources = dict(pool["resources"])  # type: ignore[call-overload]
        found[name] = (resources, resources.pop("CPU") > 0, pool.get("labels", {}))
    assert found == expected


def test_ray_takes_the_provider_s_config() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    from jobs.bench.cluster_autoscaling import provider_config

    config = json.loads(json.dumps(provider_config(6379, nodes=3, idle_timeout_s=15)))
    validate_config(prepare_config(config))
    assert config["available_node_types"]["encode-gpu"]["max_workers"] == 3
    assert config["idle_timeout_minutes"] == 0.25


def test_the_plot_is_drawn(tmp_path: Path) -> None:
    from jobs.bench.cluster_autoscaling import draw

    plot = tmp_path / "nodes.svg"
    draw(looks((100, 0, 0, 0), (120, 1, 2, 0), (180, 0, 0, 0)), PHASES, plot)
    text = plot.read_text()
    assert all(f"<!-- {label} -->" in text for label in ("cpu-decode", "encode-gpu", "train-gpu", "seconds"))
