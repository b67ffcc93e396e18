"""SIGKILL of a training's worker, of its driver and of the whole cluster: the last bits are the same."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from pipelines.dataset import LatentDataset
from pipelines.train.config import UnetTraining
from pipelines.train.plan import plan
from pipelines.train.snapshots import find_snapshot, load_snapshot
from pipelines.train.state import TrainState
from pipelines.train.unet import METRICS_FILE, SNAPSHOTS

INTERVAL, STEPS = 10, 120
OPTIONS: dict[str, Any] = {
    "preset": "tiny", "batch_size": 8, "steps": STEPS, "checkpoint_every": INTERVAL, "log_every": 1,
    "validate_every": 40, "num_workers": 2, "threads": 1, "keep_checkpoints": 20,
}  # fmt: skip
WORKER = "ray::RayTrainWorker"


def start(dataset: Path, out: Path) -> "subprocess.Popen[str]":
    """``ldm train`` with a cluster of its own, in a process group of its own."""
    config = out.with_suffix(".yaml")
    config.write_text(json.dumps({"train": OPTIONS, "cluster": {"num_cpus": 4}}))
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", "train", str(dataset), str(out), "--config", str(config)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: "subprocess.Popen[str]") -> str:
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output[-3000:]
    return output


def last_step(out: Path) -> int:
    file = out / METRICS_FILE
    lines = file.read_text().splitlines() if file.exists() else []
    return int(json.loads(lines[-1])["step"]) if lines else 0


def wait_for_step(out: Path, step: int, process: "subprocess.Popen[str]") -> int:
    deadline = time.monotonic() + 120
    while last_step(out) < step:
        assert process.poll() is None, "it ended before it was killed"
        assert time.monotonic() < deadline, "no progress"
        time.sleep(0.02)
    return last_step(out)


def family(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def kill_worker(process: "subprocess.Popen[str]") -> None:
    """One of the two ranks; the driver goes on."""
    victim = next(child for child in family(process) if WORKER in " ".join(child.cmdline()))
    victim.kill()


def kill_driver(process: "subprocess.Popen[str]") -> None:
    process.kill()
    process.communicate(timeout=60)


def kill_everything(process: "subprocess.Popen[str]") -> None:
    """Driver, raylet, GCS and workers, at one moment."""
    members = [*family(process), psutil.Process(process.pid)]
    for member in members:
        os.kill(member.pid, signal.SIGSTOP)
    for member in members:
        member.kill()
    process.communicate(timeout=60)


def final_state(dataset: Path, out: Path) -> dict[str, Any]:
    config = UnetTraining.model_validate(OPTIONS)
    state = TrainState(config, plan(LatentDataset.open(dataset), config, None), torch.device("cpu")).state()
    assert find_snapshot(out / SNAPSHOTS).step == STEPS
    load_snapshot(out / SNAPSHOTS, STEPS, state)
    return state


def differing(a: Any, b: Any, name: str = "") -> list[str]:
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        return [found for key in a for found in differing(a[key], b[key], f"{name}.{key}")]
    if isinstance(a, list):
        return [found for x, y in zip(a, b, strict=True) for found in differing(x, y, name)]
    same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    return [] if same else [name]


@pytest.fixture(scope="module")
def dataset(write_latents: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_latents(tmp_path_factory.mktemp("latents") / "d", count=200)


@pytest.fixture(scope="module")
def undisturbed(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    finish(start(dataset, out))
    return final_state(dataset, out)


@pytest.mark.timeout(600)
def test_kills_change_no_bit(dataset: Path, undisturbed: dict[str, Any], tmp_path: Path) -> None:
    """Worker, then everything, then the driver alone; each about the middle of a checkpoint interval."""
    out = tmp_path / "out"
    process = start(dataset, out)
    wait_for_step(out, 15, process)
    kill_worker(process)
    # Ray starts both ranks again; they go back at most to the snapshot before.
    time.sleep(1)
    wait_for_step(out, 46, process)
    kill_everything(process)
    assert find_snapshot(out / SNAPSHOTS).step >= last_step(out) - INTERVAL

    process = start(dataset, out)
    wait_for_step(out, 86, process)
    kill_driver(process)
    reached = last_step(out)
    assert find_snapshot(out / SNAPSHOTS).step >= reached - INTERVAL

    output = finish(start(dataset, out))
    (line,) = [line for line in output.splitlines() if line.startswith("resuming from step ")]
    assert int(line.rsplit(" ", 1)[1]) >= reached - INTERVAL
    steps = [json.loads(line)["step"] for line in (out / METRICS_FILE).read_text().splitlines()]
    assert steps == list(range(1, STEPS + 1))
    assert differing(final_state(dataset, out), undisturbed) == []
