"""A run that is stopped and goes on ends with the bits of one that was not; so, nearly, on other ranks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.dataset import LatentDataset
from pipelines.train.config import UnetTraining
from pipelines.train.loader import LatentBatch
from pipelines.train.plan import plan
from pipelines.train.progress import DivergedError
from pipelines.train.snapshots import load_snapshot
from pipelines.train.state import TrainState
from pipelines.train.unet import METRICS_FILE, SNAPSHOTS, train
from tests.pipelines.train.training_ranks import train_on

OPTIONS: dict[str, Any] = {
    "preset": "tiny", "batch_size": 8, "steps": 12, "checkpoint_every": 4, "log_every": 1,
    "validate_every": 6, "warmup_steps": 3, "keep_checkpoints": 20, "data": {"validation_rows": 4},
    "samples": {"num_images": 0},
}  # fmt: skip


class Stopped(Exception):
    """Thrown in place of a kill."""


@pytest.fixture(scope="module")
def folder(write_latents: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_latents(tmp_path_factory.mktemp("latents") / "d", count=96)


def new_state(folder: Path, **options: object) -> TrainState:
    config = UnetTraining.model_validate(OPTIONS | options)
    return TrainState(config, plan(LatentDataset.open(folder), config, None), torch.device("cpu"))


def run(folder: Path, out: Path, *, stop_after: int | None = None, **options: object) -> TrainState:
    out.mkdir(parents=True, exist_ok=True)
    state = new_state(folder, **options)

    learn = state.step

    def step(batch: LatentBatch, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        if number - 1 == stop_after:
            raise Stopped
        return learn(batch, number)

    state.step = step  # type: ignore[method-assign]  # the seam where a kill would hit
    train(state, LatentDataset.open(folder), out, lambda metrics: None)
    return state


def losses(out: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (out / METRICS_FILE).read_text().splitlines()]
    assert [line["step"] for line in lines] == sorted({line["step"] for line in lines})
    return {line["step"]: line["loss"] for line in lines}


def assert_same_bits(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    for key, value in a.items():
        if isinstance(value, dict):
            assert_same_bits(value, b[key])
        elif isinstance(value, torch.Tensor):
            assert torch.equal(value, b[key]), key
        else:
            assert value == b[key], key


@pytest.fixture(scope="module")
def undisturbed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainState, Path]:
    out = tmp_path_factory.mktemp("undisturbed")
    return run(folder, out), out


@pytest.mark.parametrize("stop_after", [2, 4, 7, 11])
def test_a_stopped_run_ends_with_the_same_bits(
    folder: Path, undisturbed: tuple[TrainState, Path], tmp_path: Path, stop_after: int
) -> None:
    with pytest.raises(Stopped):
        run(folder, tmp_path, stop_after=stop_after)
    again = run(folder, tmp_path)
    assert_same_bits(again.state(), undisturbed[0].state())
    assert losses(tmp_path) == losses(undisturbed[1])
    stored = new_state(folder).state()
    load_snapshot(tmp_path / SNAPSHOTS, 12, stored)
    assert_same_bits(stored, undisturbed[0].state())


def test_accumulation_changes_only_the_rounding(
    folder: Path, undisturbed: tuple[TrainState, Path], tmp_path: Path
) -> None:
    run(folder, tmp_path, accumulate=4)
    assert losses(tmp_path) == pytest.approx(losses(undisturbed[1]), rel=1e-5)


@pytest.mark.parametrize(
    "option", [{"gradient_checkpointing": True}, {"precision": "bf16"}, {"ema": "power"}]
)
def test_an_option_learns_nearly_the_same(
    folder: Path, undisturbed: tuple[TrainState, Path], tmp_path: Path, option: dict[str, object]
) -> None:
    run(folder, tmp_path, steps=4, warmup_steps=3, schedule="constant", **option)
    run(folder, tmp_path / "plain", steps=4, warmup_steps=3, schedule="constant")
    tolerance = 0.02 if "precision" in option else 1e-6
    assert losses(tmp_path) == pytest.approx(losses(tmp_path / "plain"), rel=tolerance)


def test_a_loss_that_is_no_number_stops_the_run_before_a_snapshot(folder: Path, tmp_path: Path) -> None:
    state = new_state(folder, learning_rate=1e30, clip_norm=1e30, warmup_steps=1)
    with pytest.raises(DivergedError, match=r"(loss|gradient_norm) is (nan|inf) at step [1-4];"):
        train(state, LatentDataset.open(folder), tmp_path, lambda metrics: None)
    assert not list(tmp_path.glob(f"{SNAPSHOTS}/step-*/snapshot.json"))


def test_other_ranks_change_only_the_rounding(
    folder: Path, undisturbed: tuple[TrainState, Path], tmp_path: Path
) -> None:
    """2 → 1 → 4 processes with one global batch, each from the snapshot that the one before left."""
    for world, steps in ((2, 4), (1, 8), (4, 12)):
        # A constant rate: a cosine would end with each part.
        train_on(world, tmp_path, folder, OPTIONS | {"steps": steps, "schedule": "constant"})
    run(folder, tmp_path / "one", schedule="constant")
    assert losses(tmp_path) == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


def test_sharded_training_is_the_same_training(folder: Path, tmp_path: Path) -> None:
    """FSDP2 on two processes, whose snapshot one process goes on from."""
    train_on(2, tmp_path, folder, OPTIONS | {"steps": 6, "schedule": "constant", "parallel": "fsdp2"})
    run(folder, tmp_path, schedule="constant")
    run(folder, tmp_path / "one", schedule="constant")
    assert losses(tmp_path) == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
