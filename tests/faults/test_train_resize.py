"""Ray Train's own resizing on a cluster of several nodes: 2 → 1 → 4 workers are one training."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from pipelines.dataset import LatentDataset
from pipelines.train.config import UnetTraining
from pipelines.train.plan import plan
from pipelines.train.state import TrainState
from pipelines.train.unet import METRICS_FILE, train

INTERVAL, STEPS = 10, 200
OPTIONS: dict[str, Any] = {
    "preset": "tiny", "batch_size": 16, "steps": STEPS, "checkpoint_every": INTERVAL, "log_every": 1,
    "validate_every": 100, "min_workers": 1, "num_workers": 4, "resize_check_s": 5, "threads": 1,
    "warmup_steps": 10,
}  # fmt: skip


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A head that has no CPU, for driver and controller, and two nodes with one CPU: one worker each."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    yield cluster
    cluster.shutdown()


@pytest.fixture(scope="module")
def dataset(write_latents: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_latents(tmp_path_factory.mktemp("latents") / "d", count=200, size_px=64)


class Run:
    """``ldm train`` on a cluster, and how far it came with each number of workers."""

    def __init__(self, dataset: Path, out: Path, address: str) -> None:
        self.out, self.output = out, out.with_suffix(".log")
        self.reached: dict[int, int] = {}
        config = out.with_suffix(".yaml")
        config.write_text(json.dumps({"train": OPTIONS, "cluster": {"address": address}}))
        with self.output.open("w") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "jobs.cli", "train", str(dataset), str(out), "--config", str(config)],
                stdout=stream,
                stderr=subprocess.STDOUT,
            )

    def lines(self) -> list[dict[str, Any]]:
        file = self.out / METRICS_FILE
        # A last line may be half written.
        whole = file.read_text().split("\n")[:-1] if file.exists() else []
        return [json.loads(line) for line in whole]

    def wait(self, until: Callable[[], bool], timeout_s: float) -> None:
        """Watch the metrics until something holds of them, or of the process."""
        deadline = time.monotonic() + timeout_s
        while not until():
            for line in self.lines()[-1:]:
                self.reached[line["workers"]] = max(self.reached.get(line["workers"], 0), line["step"])
            assert time.monotonic() < deadline, self.output.read_text()[-3000:]
            time.sleep(0.05)

    def wait_for(self, workers: int, step: int = 0) -> None:
        """Until that many workers have done that step, or any."""

        def there() -> bool:
            assert self.process.poll() is None, self.output.read_text()[-3000:]
            return self.reached.get(workers, -1) >= step

        self.wait(there, timeout_s=400)


def kill_node(cluster: Any, node: Any) -> None:
    """SIGKILL of the raylet and its workers, without a word to the rest of the cluster."""
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    for victim in [raylet, *raylet.children(recursive=True)]:
        victim.kill()
    cluster.remove_node(node, allow_graceful=False)


def on_one_process(dataset: Path, out: Path) -> dict[int, float]:
    """Losses of the same run without Ray and without a change."""
    out.mkdir()
    config = UnetTraining.model_validate(OPTIONS)
    latents = LatentDataset.open(dataset)
    state = TrainState(config, plan(latents, config, None), torch.device("cpu"))
    train(state, latents, out, lambda metrics: None)
    lines = [json.loads(line) for line in (out / METRICS_FILE).read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines}


@pytest.mark.faults_long
@pytest.mark.timeout(1800)
def test_nodes_go_and_come(cluster: Any, dataset: Path, tmp_path: Path) -> None:
    run = Run(dataset, tmp_path / "out", cluster.address)
    try:
        run.wait_for(workers=2, step=15)
        kill_node(cluster, next(iter(cluster.worker_nodes)))
        run.wait_for(workers=1)
        for _ in range(3):
            cluster.add_node(wait=False, num_cpus=1)
        run.wait_for(workers=4)
        run.wait(lambda: run.process.poll() is not None, timeout_s=600)
    finally:
        run.process.kill()
        run.process.wait()
    assert run.process.returncode == 0, run.output.read_text()[-3000:]

    lines = run.lines()
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    kept = {workers: max(line["step"] for line in group) for workers, group in grouped(lines)}
    # Nodes do not come at one moment: Ray may have seen two of the three first.
    assert [workers for workers in kept if workers != 3] == [2, 1, 4]
    lost = {workers: run.reached[workers] - step for workers, step in kept.items()}
    assert max(lost.values()) <= INTERVAL, lost
    expected = on_one_process(dataset, tmp_path / "one")
    found = {line["step"]: line["loss"] for line in lines}
    differences = {step: abs(found[step] / expected[step] - 1) for step in expected}
    assert max(differences[step] for step in range(1, 51)) <= 1e-5
    print(f"steps by workers {kept}, lost {lost}, largest difference {max(differences.values()):.1e}")


def grouped(lines: list[dict[str, Any]]) -> Iterator[tuple[int, Iterator[dict[str, Any]]]]:
    """Runs of lines with one number of workers."""
    return groupby(lines, key=lambda line: int(line["workers"]))
