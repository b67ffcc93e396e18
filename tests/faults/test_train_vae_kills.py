"""SIGKILL of a VAE training's worker and of the whole cluster: the last bits are those of a plain loop."""

import json
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipelines.shards import Sample, write_tar
from pipelines.train.crop_order import WINDOW_BATCHES, CropOrder, crops_of_span, shuffled_batches
from pipelines.train.metrics_log import METRICS_FILE
from pipelines.train.snapshots import SNAPSHOTS, find_snapshot, load_snapshot
from pipelines.train.vae import train
from pipelines.train.vae_config import VaeTraining
from pipelines.train.vae_state import VaeState
from tests.faults.killed_jobs import (
    finish,
    kill_everything,
    kill_worker,
    last_step,
    start_job,
    wait_for_step,
)
from tests.same_bits import differing

INTERVAL, STEPS = 20, 200


def options(vae: Path) -> dict[str, Any]:
    return {
        "init": str(vae), "crop_px": 16, "crops_per_megapixel": 100_000, "batch_size": 2, "steps": STEPS,
        "checkpoint_every": INTERVAL, "log_every": 1, "threads": 1, "keep_checkpoints": 40,
    }  # fmt: skip


def new_state(vae: Path) -> VaeState:
    config = VaeTraining.model_validate(options(vae))
    return VaeState(config, torch.device("cpu"), lambda module: module)


def trained_without_ray(vae: Path, shards: Path, out: Path) -> dict[str, Any]:
    """The crops in their order, one process, nothing that disturbs it."""
    state, rows = new_state(vae), WINDOW_BATCHES * 2
    order = CropOrder.of(str(shards), state.config)
    images = (c["image"] for span in order.spans(0, 5 * rows) for c in crops_of_span(span, order.config))
    windows = (np.stack(list(islice(images, rows))) for _ in range(5))
    train(state, lambda step: shuffled_batches(windows, seed=0, rank=0, after_step=step), out)
    return state.state()


@pytest.fixture
def shards(tmp_path: Path, photo: Callable[[int], bytes]) -> Path:
    folder = tmp_path / "shards"
    folder.mkdir()
    write_tar(folder / "a.tar", [Sample(f"k{i}", photo(i)) for i in range(2)])
    write_tar(folder / "b.tar", [Sample("k2", photo(2))])
    return folder


@pytest.mark.faults_long
@pytest.mark.timeout(600)
def test_kills_change_no_bit(shards: Path, vae_folder: Path, tmp_path: Path) -> None:
    """A worker, which Ray starts again, and then everything."""
    out = tmp_path / "out"
    process = start_job("train-vae", shards, out, options(vae_folder))
    wait_for_step(out, 50, process)
    kill_worker(process)
    time.sleep(1)
    wait_for_step(out, 110, process)
    kill_everything(process)
    reached = last_step(out)
    assert reached - INTERVAL <= find_snapshot(out / SNAPSHOTS).step < STEPS

    output = finish(start_job("train-vae", shards, out, options(vae_folder)))
    (line,) = [line for line in output.splitlines() if line.startswith("resuming from step ")]
    assert reached - INTERVAL <= int(line.rsplit(" ", 1)[1])
    steps = [json.loads(line)["step"] for line in (out / METRICS_FILE).read_text().splitlines()]
    assert steps == list(range(1, STEPS + 1))
    stored = new_state(vae_folder).state()
    assert find_snapshot(out / SNAPSHOTS).step == STEPS
    load_snapshot(out / SNAPSHOTS, STEPS, stored)
    assert differing(stored, trained_without_ray(vae_folder, shards, tmp_path)) == []
