"""SIGKILL of a training's worker, of its driver and of the whole cluster: the last bits are the same."""

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.dataset import LatentDataset
from pipelines.train.config import UnetTraining
from pipelines.train.plan import plan
from pipelines.train.snapshots import find_snapshot, load_snapshot
from pipelines.train.state import TrainState
from pipelines.train.unet import METRICS_FILE, SNAPSHOTS
from tests.faults.killed_jobs import (
    finish,
    kill_driver,
    kill_everything,
    kill_worker,
    last_step,
    start_job,
    wait_for_step,
)
from tests.pipelines.train.training_ranks import train_on
from tests.same_bits import differing

INTERVAL, STEPS = 10, 60
OPTIONS: dict[str, Any] = {
    "preset": "tiny", "batch_size": 8, "steps": STEPS, "checkpoint_every": INTERVAL, "log_every": 1,
    "validate_every": 20, "num_workers": 2, "threads": 1, "keep_checkpoints": 20,
}  # fmt: skip


def start(dataset: Path, out: Path) -> "subprocess.Popen[str]":
    return start_job("train", dataset, out, OPTIONS)


def final_state(dataset: Path, out: Path) -> dict[str, Any]:
    config = UnetTraining.model_validate(OPTIONS)
    state = TrainState(config, plan(LatentDataset.open(dataset), config, None), torch.device("cpu")).state()
    assert find_snapshot(out / SNAPSHOTS).step == STEPS
    load_snapshot(out / SNAPSHOTS, STEPS, state)
    return state


@pytest.fixture(scope="module")
def dataset(write_latents: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_latents(tmp_path_factory.mktemp("latents") / "d", count=200)


@pytest.fixture(scope="module")
def undisturbed(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of two processes without Ray: whatever it does, it must change no bit."""
    out = tmp_path_factory.mktemp("undisturbed")
    train_on(2, out, dataset, OPTIONS)
    return final_state(dataset, out)


@pytest.mark.faults_long
def test_a_killed_worker_changes_no_bit(dataset: Path, undisturbed: dict[str, Any], tmp_path: Path) -> None:
    """Ray starts both ranks again; they go back at most to the snapshot before."""
    out = tmp_path / "out"
    process = start(dataset, out)
    wait_for_step(out, 15, process)
    kill_worker(process)
    finish(process)
    steps = [json.loads(line)["step"] for line in (out / METRICS_FILE).read_text().splitlines()]
    assert steps == list(range(1, STEPS + 1))
    assert differing(final_state(dataset, out), undisturbed) == []


@pytest.mark.faults_long
@pytest.mark.timeout(600)
def test_kills_change_no_bit(dataset: Path, undisturbed: dict[str, Any], tmp_path: Path) -> None:
    """Worker, then everything, then the driver alone; each about the middle of a checkpoint interval."""
    out = tmp_path / "out"
    process = start(dataset, out)
    wait_for_step(out, 15, process)
    kill_worker(process)
    # Ray starts both ranks again; they go back at most to the snapshot before.
    time.sleep(1)
    wait_for_step(out, 26, process)
    kill_everything(process)
    assert find_snapshot(out / SNAPSHOTS).step >= last_step(out) - INTERVAL

    process = start(dataset, out)
    wait_for_step(out, 46, process)
    kill_driver(process)
    reached = last_step(out)
    assert find_snapshot(out / SNAPSHOTS).step >= reached - INTERVAL

    output = finish(start(dataset, out))
    (line,) = [line for line in output.splitlines() if line.startswith("resuming from step ")]
    assert int(line.rsplit(" ", 1)[1]) >= reached - INTERVAL
    steps = [json.loads(line)["step"] for line in (out / METRICS_FILE).read_text().splitlines()]
    assert steps == list(range(1, STEPS + 1))
    assert differing(final_state(dataset, out), undisturbed) == []
