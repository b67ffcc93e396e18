"""A run that is stopped and goes on ends with the bits of one that was not; so, nearly, on other ranks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from pipelines.dataset import LatentDataset
from pipelines.train.config import UnetTraining
from pipelines.train.loader import LatentBatch
from pipelines.train.plan import plan
from pipelines.train.progress import DivergedError
from pipelines.train.snapshots import SnapshotWriter, load_snapshot
from pipelines.train.state import TrainState
from pipelines.train.unet import METRICS_FILE, SNAPSHOTS, train
from tests.pipelines.train.training_ranks import Stopped, stop, train_on

WRITE = SnapshotWriter.write
OPTIONS: dict[str, Any] = {
    "preset": "tiny", "batch_size": 8, "steps": 12, "checkpoint_every": 4, "log_every": 1,
    "validate_every": 6, "warmup_steps": 3, "keep_checkpoints": 20, "data": {"validation_rows": 4},
    "samples": {"num_images": 0},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(write_latents: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_latents(tmp_path_factory.mktemp("latents") / "d", count=96)


def new_state(folder: Path, **options: object) -> TrainState:
    config = UnetTraining.model_validate(OPTIONS | options)
    return TrainState(config, plan(LatentDataset.open(folder), config, None), torch.device("cpu"))


def run(folder: Path, out: Path, *, stop_after: int | None = None, **options: object) -> TrainState:
    out.mkdir(parents=True, exist_ok=True)
    state = new_state(folder, **options)
    stop(state, state.config.steps if stop_after is None else stop_after)
    # A process that ends writes no more; here the next run would meet what this one is still writing.
    with patch.object(SnapshotWriter, "write", _write_now):
        train(state, LatentDataset.open(folder), out, lambda metrics: None)
    return state


def _write_now(writer: SnapshotWriter, step: int, state: dict[str, Any]) -> None:
    WRITE(writer, step, state)
    writer.wait()


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


def test_a_stopped_upsampler_ends_with_the_same_bits(
    write_pairs: Callable[..., Path], tmp_path: Path
) -> None:
    folder = write_pairs(tmp_path / "pairs")
    data = {"validation_rows": 4, "size_px": 32, "low_size_px": 16}
    options: dict[str, object] = {"steps": 4, "data": data}
    undisturbed = run(folder, tmp_path / "undisturbed", **options)
    with pytest.raises(Stopped):
        run(folder, tmp_path / "stopped", stop_after=3, **options)
    again = run(folder, tmp_path / "stopped", **options)
    assert_same_bits(again.state(), undisturbed.state())
    assert losses(tmp_path / "stopped") == losses(tmp_path / "undisturbed")


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


def test_other_ranks_change_only_the_rounding(folder: Path, tmp_path: Path) -> None:
    """2 → 1 → 4 processes with one global batch, each from the snapshot that the one before left.

    Of a cosine schedule for 24 steps: losses as on one rank within 1e-5, which is what rounding costs.
    """
    options = {"steps": 24, "warmup_steps": 5, "checkpoint_every": 8, "validate_every": 24}
    run(folder, tmp_path / "one", **options)
    train_on(2, tmp_path, folder, OPTIONS | options, stop_after=9)
    with pytest.raises(Stopped):
        run(folder, tmp_path, stop_after=17, **options)
    train_on(4, tmp_path, folder, OPTIONS | options)
    found, expected = losses(tmp_path), losses(tmp_path / "one")
    assert list(found) == list(range(1, 25))
    assert found == pytest.approx(expected, rel=1e-5)


def test_shares_that_are_not_equal_are_the_same_training(folder: Path, tmp_path: Path) -> None:
    """Two ranks of seven, with 4 and 3 of 7 rows in three parts each."""
    options = {"steps": 4, "batch_size": 7}
    train_on(2, tmp_path, folder, OPTIONS | options | {"num_workers": 7})
    run(folder, tmp_path / "one", **options)
    assert losses(tmp_path) == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


@pytest.mark.parametrize(("batch_size", "num_workers", "accumulate"), [(8, 4, 2), (64, 8, 1), (96, 8, 3)])
def test_fewer_workers_compute_parts_of_the_same_size(
    batch_size: int, num_workers: int, accumulate: int
) -> None:
    config = UnetTraining(batch_size=batch_size, num_workers=num_workers, accumulate=accumulate)
    assert config.parts(num_workers) == accumulate
    for world in range(1, num_workers + 1):
        shares = [len(range(rank, batch_size, world)) for rank in range(world)]
        sizes = {size for share in shares for size in part_sizes(share, config.parts(world))}
        assert 1 <= min(sizes) <= max(sizes) <= batch_size // (num_workers * accumulate) + 1


def part_sizes(num_rows: int, parts: int) -> list[int]:
    none = torch.zeros(num_rows)
    batch = LatentBatch(tuple(map(str, range(num_rows))), none, none, none, none, none, (None,) * num_rows)
    split = batch.split(parts)
    assert [key for part in split for key in part.keys_B] == list(batch.keys_B)
    return [len(part.keys_B) for part in split]


def test_sharded_training_is_the_same_training(folder: Path, tmp_path: Path) -> None:
    """FSDP2 on two processes, whose snapshot one process goes on from."""
    train_on(2, tmp_path, folder, OPTIONS | {"steps": 6, "schedule": "constant", "parallel": "fsdp2"})
    run(folder, tmp_path, schedule="constant")
    run(folder, tmp_path / "one", schedule="constant")
    assert losses(tmp_path) == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
