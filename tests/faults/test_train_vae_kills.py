"""SIGKILL of a VAE training's worker, and of the whole cluster: it goes on, and the last bits are the same."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.continued_run import stored_record
from ldm.autoencoder import load
from pipelines.shards import Sample, write_tar
from pipelines.train.snapshots import SNAPSHOTS, find_snapshot, load_snapshot
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

INTERVAL, STEPS = 20, 400


def options(vae: Path) -> dict[str, Any]:
    return {
        "init": str(vae), "crop_px": 16, "crops_per_megapixel": 100_000, "batch_size": 2, "steps": STEPS,
        "checkpoint_every": INTERVAL, "log_every": 1, "threads": 1, "keep_checkpoints": 40,
    }  # fmt: skip


def final_state(vae: Path, out: Path) -> dict[str, Any]:
    config = VaeTraining.model_validate(options(vae))
    state = VaeState(config, torch.device("cpu"), lambda module: module).state()
    assert find_snapshot(out / SNAPSHOTS).step == STEPS
    load_snapshot(out / SNAPSHOTS, STEPS, state)
    return state


@pytest.fixture
def shards(tmp_path: Path, photo: Callable[[int], bytes]) -> Path:
    folder = tmp_path / "shards"
    folder.mkdir()
    write_tar(folder / "a.tar", [Sample(f"k{i}", photo(i)) for i in range(2)])
    write_tar(folder / "b.tar", [Sample("k2", photo(2))])
    return folder


@pytest.mark.timeout(600)
def test_kills_change_no_bit(shards: Path, vae_folder: Path, tmp_path: Path) -> None:
    """A worker, which Ray starts again, then everything; against a run that nobody disturbed."""
    undisturbed, out = tmp_path / "undisturbed", tmp_path / "out"
    finish(start_job("train-vae", shards, undisturbed, options(vae_folder)))

    process = start_job("train-vae", shards, out, options(vae_folder))
    wait_for_step(out, 90, process)
    kill_worker(process)
    time.sleep(1)
    wait_for_step(out, 190, process)
    kill_everything(process)
    reached = last_step(out)
    assert reached - INTERVAL <= find_snapshot(out / SNAPSHOTS).step < STEPS

    output = finish(start_job("train-vae", shards, out, options(vae_folder)))
    (line,) = [line for line in output.splitlines() if line.startswith("resuming from step ")]
    assert reached - INTERVAL <= int(line.rsplit(" ", 1)[1])
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, STEPS + 1))
    assert stored_record(out) == stored_record(undisturbed)
    assert differing(final_state(vae_folder, out), final_state(vae_folder, undisturbed)) == []
    assert load(out).fingerprint == load(undisturbed).fingerprint
