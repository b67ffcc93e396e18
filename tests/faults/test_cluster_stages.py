"""Stages on a cluster of several nodes: where each runs, and SIGKILL of nodes and of the head."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from jobs.local_cluster import HEAD, LocalCluster, local_cluster
from pipelines.shards import Sample, write_tar
from pipelines.train.metrics_log import METRICS_FILE
from tests.faults.cluster_jobs import (
    DEADLINE_S,
    ENCODE_GPU,
    SERVE_GPU,
    TRAIN_GPU,
    UNIT_SIZE,
    encoding,
    image,
    join,
    pools_of,
    rows,
    serving,
    submit,
    submitted,
    succeed,
    wait_until,
)
from tests.faults.listening import beyond_loopback
from tests.faults.test_kills import tree
from tests.faults.test_train_resize import OPTIONS as TRAINING
from tests.faults.test_train_resize import on_one_process

pytestmark = [
    pytest.mark.faults_long,  # clusters of several nodes: minutes
    pytest.mark.timeout(1800),
    # Ray's own client follows logs with it.
    pytest.mark.filterwarnings("ignore:ssl=None is deprecated:DeprecationWarning"),
]

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = 240
NUM_UNITS = 6 * SAMPLES // UNIT_SIZE


@pytest.fixture(scope="module")
def running() -> Iterator[LocalCluster]:
    """A head and three nodes. Each test that kills a node adds one first; the last one kills the head."""
    with local_cluster({"encode-gpu": ENCODE_GPU, "train-gpu": TRAIN_GPU, "serve-gpu": SERVE_GPU}) as cluster:
        yield cluster


@pytest.fixture
def cluster(running: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> LocalCluster:
    """The running one, joined by this process."""
    join(running, monkeypatch)
    return running


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, photo: Callable[[int], bytes]) -> Path:
    """Six tars; every ninth sample is bad, so that quarantine has to survive, too."""
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(6):
        keys = range(shard * SAMPLES, (shard + 1) * SAMPLES)
        images = [b"no image" if key % 9 == 0 else photo(key % 16) for key in keys]
        write_tar(
            folder / f"s{shard}.tar", [Sample(f"{k:05d}", i) for k, i in zip(keys, images, strict=True)]
        )
    return folder


@pytest.fixture(scope="module")
def undisturbed(shards: Path, vae_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process with a Ray of its own makes of the shards."""
    out = tmp_path_factory.mktemp("undisturbed") / "latents"
    options = {
        **encoding(shards, out, vae_folder), "reader": {"num_cpus": 0.25}, "decode": {"num_cpus": 1},
        "encoder": {"num_cpus": 1}, "cluster": {"num_cpus": 3},
    }  # fmt: skip
    config = out.with_suffix(".yaml")
    config.write_text(json.dumps(options))
    command = [sys.executable, "-m", "jobs.cli", "encode", "--config", str(config)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return latents_of(out)


def latents_of(out: Path) -> dict[str, bytes]:
    """A dataset without what is told of each run."""
    return {name: data for name, data in tree(out).items() if not name.startswith("runs/")}


def committed(out: Path) -> int:
    return len(list(out.glob("commits/*.json")))


def test_each_stage_runs_on_the_nodes_that_its_resources_name(
    cluster: LocalCluster,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    shards: Path,
    vae_folder: Path,
    undisturbed: dict[str, bytes],
) -> None:
    latents, model = tmp_path / "latents", tmp_path / "model"
    assert submit(tmp_path, "encode", "encode", encoding(shards, latents, vae_folder), "--follow") == 0
    assert latents_of(latents) == undisturbed
    assert pools_of(cluster, "actors", "UnitEncoder", "class_name") == {"encode-gpu"}
    assert pools_of(cluster, "tasks", "_decode_row", "name") == {"encode-gpu"}

    training = {
        "preset": "tiny", "batch_size": 16, "steps": 20, "num_gpus": 1, "threads": 1,
        "resources": {"pool:train-gpu": 1}, "log_every": 10, "data": {"max_quarantined_share": 0.2},
    }  # fmt: skip
    options = {"dataset": str(latents), "out": str(model), "train": training}
    assert submit(tmp_path, "train", "train", options, "--follow") == 0
    assert pools_of(cluster, "actors", "RayTrainWorker", "class_name") == {"train-gpu"}
    assert json.loads((model / "ldm.json").read_text())["step"] == 20
    capsys.readouterr()

    with serving(cluster, tmp_path, model, capsys) as http:
        made = image(http, seed=1)
        assert image(http, seed=1) == made
        assert pools_of(cluster, "actors", "sampler", "class_name") == {"serve-gpu"}
        assert pools_of(cluster, "actors", "decoder", "class_name") == {"serve-gpu"}
        assert pools_of(cluster, "actors", "ingress", "class_name") == {"head"}
        places = beyond_loopback(cluster)
        print("listen beyond loopback while it serves:", *places, sep="\n  ")
        # Replicas of Serve take calls of other stages there, with the token; nothing tells them otherwise.
        assert all("ServeReplica" in title for title, *_ in places)


def test_encoding_goes_on_without_a_node(
    cluster: LocalCluster,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    shards: Path,
    vae_folder: Path,
    undisturbed: dict[str, bytes],
) -> None:
    out = tmp_path / "latents"
    victim = cluster.start_node("encode-gpu", ENCODE_GPU)
    assert submit(tmp_path, "encode", "encode", encoding(shards, out, vae_folder, encoders=2)) == 0
    job = submitted(capsys)
    node = cluster.alive_nodes()[victim]
    wait_until(lambda: committed(out) >= 10 and node in work_of(cluster, "UnitEncoder"), "both encode")
    cluster.kill_node(victim)
    at_kill = committed(out)
    assert at_kill < NUM_UNITS, "it had ended before the kill"
    succeed(cluster, job)
    assert latents_of(out) == undisturbed
    print(f"{victim} killed by {at_kill} of {NUM_UNITS} units")


def test_training_goes_on_without_a_node(
    cluster: LocalCluster,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    write_latents: Callable[..., Path],
) -> None:
    """Two workers become one, and not three where other nodes have GPUs, too."""
    dataset, out = write_latents(tmp_path / "latents", count=200, size_px=64), tmp_path / "model"
    training = {
        **TRAINING, "num_workers": 4, "min_workers": 1, "num_gpus": 1, "resources": {"pool:train-gpu": 1},
    }  # fmt: skip

    def lines() -> list[dict[str, Any]]:
        file = out / METRICS_FILE
        return [json.loads(line) for line in file.read_text().split("\n")[:-1]] if file.exists() else []

    options = {"dataset": str(dataset), "out": str(out), "train": training}
    victim = cluster.start_node("train-gpu", TRAIN_GPU)
    assert submit(tmp_path, "train", "train", options) == 0
    job = submitted(capsys)
    wait_until(lambda: lines() and lines()[-1]["step"] >= 15, "steps are done")
    reached = lines()[-1]["step"]
    cluster.kill_node(victim)
    succeed(cluster, job)
    assert pools_of(cluster, "actors", "RayTrainWorker", "class_name") == {"train-gpu"}
    assert [line["step"] for line in lines()] == list(range(1, TRAINING["steps"] + 1))
    workers = [line["workers"] for line in lines()]
    kept = workers.count(2)
    assert workers == [2] * kept + [1] * (len(workers) - kept)
    assert 0 < kept < len(workers)
    assert reached - kept <= TRAINING["checkpoint_every"]
    expected = on_one_process(dataset, tmp_path / "one")
    differences = {line["step"]: abs(line["loss"] / expected[line["step"]] - 1) for line in lines()}
    assert max(differences[step] for step in range(1, 51)) <= 1e-5
    print(f"killed after step {reached}, went on from {kept}; differs by {max(differences.values()):.1e}")


def test_serving_goes_on_without_a_node(
    cluster: LocalCluster,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    checkpoint_folders: dict[str, Path],
) -> None:
    victim = cluster.start_node("serve-gpu", SERVE_GPU)
    with (
        serving(cluster, tmp_path, checkpoint_folders["flow"], capsys, replicas=2) as http,
        ThreadPoolExecutor(8) as threads,
    ):
        wait_until(lambda: len(work_of(cluster, ":sampler")) == 2, "a sampler on each node")
        undisturbed = [image(http, seed, steps=300) for seed in range(4)]
        again = [threads.submit(image, http, seed % 4, 300) for seed in range(8)]
        time.sleep(0.5)
        cluster.kill_node(victim)
        on_their_way = sum(not each.done() for each in again)
        assert on_their_way > 0
        assert [each.result(DEADLINE_S) for each in again] == undisturbed + undisturbed
        assert [image(http, seed, steps=300) for seed in range(4)] == undisturbed
        print(f"{on_their_way} requests were on their way")


def work_of(cluster: LocalCluster, kind: str) -> set[str]:
    """Nodes that have a living actor of this kind."""
    found = [row for row in rows(cluster, "actors") if row["state"] == "ALIVE"]
    return {str(row["node_id"]) for row in found if kind in str(row["class_name"])}


def test_after_the_head_was_killed_the_same_job_ends_as_if_undisturbed(
    cluster: LocalCluster,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    shards: Path,
    vae_folder: Path,
    undisturbed: dict[str, bytes],
) -> None:
    out = tmp_path / "latents"
    options = encoding(shards, out, vae_folder)
    assert submit(tmp_path, "encode", "encode", options) == 0
    wait_until(lambda: committed(out) >= 10, "units are committed")
    cluster.kill_node(HEAD)
    cluster.stop()
    done = committed(out)
    assert 10 <= done < NUM_UNITS
    before = shutil.copytree(out / "commits", tmp_path / "commits")
    with local_cluster({"encode-gpu": ENCODE_GPU}) as another:
        join(another, monkeypatch)
        capsys.readouterr()
        assert submit(tmp_path, "encode", "encode", options, "--follow") == 0
        said = capsys.readouterr().out
    assert f"{NUM_UNITS - done} units done, {done} skipped" in said
    assert latents_of(out) == undisturbed
    for path in before.iterdir():
        assert path.read_bytes() == (out / "commits" / path.name).read_bytes()
    print(f"head killed by {done} of {NUM_UNITS} units")
