"""A VAE training that is stopped and goes on ends with the bits of one that was not, with every term on."""

import json
from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm.discriminator import Discriminator
from pipelines.train import vae_state
from pipelines.train.metrics_log import METRICS_FILE
from pipelines.train.progress import DivergedError
from pipelines.train.snapshots import SNAPSHOTS, find_snapshot, load_snapshot
from pipelines.train.vae import train
from pipelines.train.vae_config import VaeTraining
from pipelines.train.vae_state import VaeState
from pipelines.train.vae_step import Step
from tests.same_bits import differing

STEPS = 6


class Stopped(Exception):
    """Thrown in place of a kill."""


@pytest.fixture(autouse=True, scope="module")
def _narrow_discriminator() -> Iterator[None]:
    """A quicker one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vae_state, "Discriminator", partial(Discriminator, width=4))
        yield


@pytest.fixture(autouse=True)
def _own_random_state() -> Iterator[None]:
    with torch.random.fork_rng():
        yield


def batches_after(step: int) -> Iterator[Tensor]:
    """The batch of a step is a function of the step."""
    for number in count(step + 1):
        yield torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(number)) * 2 - 1


def training(vae: Path, **options: object) -> VaeTraining:
    values: dict[str, object] = {
        "init": str(vae), "steps": STEPS, "batch_size": 1, "crop_px": 32, "warmup_steps": 3, "log_every": 1,
        "checkpoint_every": 4, "keep_checkpoints": 20, "learning_rate": 1e-3, "perceptual": "random",
        "gan_weight": 0.5, "gan_start_step": 4,
    }  # fmt: skip
    return VaeTraining.model_validate(values | options)


def new_state(config: VaeTraining) -> VaeState:
    return VaeState(config, torch.device("cpu"), lambda module: module)


def run(config: VaeTraining, out: Path, stop_after: int | None = None) -> dict[str, Any]:
    out.mkdir(exist_ok=True)
    state = new_state(config)
    learn = state.step

    def step(images: Tensor, number: int) -> Step:
        if number - 1 == stop_after:
            raise Stopped
        return learn(images, number)

    state.step = step  # type: ignore[method-assign]  # the seam where a kill would hit
    train(state, batches_after, out)
    return state.state()


def stored(config: VaeTraining, out: Path, step: int) -> dict[str, Any]:
    state = new_state(config).state()
    load_snapshot(out / SNAPSHOTS, step, state)
    return state


def lines(out: Path) -> list[dict[str, float]]:
    varying = ("steps_per_s", "images_per_s", "elapsed_s", "left_s", "data_wait_share", "pid")
    kept = [json.loads(line) for line in (out / METRICS_FILE).read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in varying} for line in kept]


@pytest.fixture(scope="module")
def undisturbed(vae_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    out = tmp_path_factory.mktemp("undisturbed")
    with torch.random.fork_rng():
        return run(training(vae_folder), out), out


# Before the first snapshot; after one from before the discriminator's first step; after one from behind it.
@pytest.mark.parametrize("stop_after", [1, 3, 5])
def test_a_stopped_run_ends_with_the_same_bits(
    vae_folder: Path, undisturbed: tuple[dict[str, Any], Path], tmp_path: Path, stop_after: int
) -> None:
    config = training(vae_folder)
    with pytest.raises(Stopped):
        run(config, tmp_path, stop_after)
    torch.manual_seed(stop_after)
    again = run(config, tmp_path)
    assert differing(again, undisturbed[0]) == []
    assert differing(stored(config, tmp_path, STEPS), undisturbed[0]) == []
    assert lines(tmp_path) == lines(undisturbed[1])
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, STEPS + 1))


def test_the_comparison_sees_another_noise(
    vae_folder: Path, undisturbed: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    found = differing(run(training(vae_folder, seed=1), tmp_path), undisturbed[0])
    for part in (".vae", ".ema", ".optimizer", ".latents", ".discriminator", ".discriminator_optimizer"):
        assert any(name.startswith(f"{part}.") for name in found), part


def test_how_often_snapshots_are_taken_changes_no_bit(
    vae_folder: Path, undisturbed: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    """Nor does a look at the state of a discriminator that has not begun."""
    often = run(training(vae_folder, checkpoint_every=1), tmp_path)
    assert differing(often, undisturbed[0]) == []


def test_moments_begin_as_an_optimiser_without_them(vae_folder: Path) -> None:
    """Two steps against the same two of optimisers whose state was never asked for."""
    made, plain = (new_state(training(vae_folder, gan_start_step=1)) for _ in range(2))
    for optimizer in (plain.optimisation.optimizer, plain.adversary.optimizer):
        assert len(optimizer.state) > 0
        optimizer.state.clear()
    for step, images in zip((1, 2), batches_after(0), strict=False):
        for state in (made, plain):
            state.step(images, step)
    assert differing(made.state(), plain.state()) == []


def test_ranks_draw_other_noise(vae_folder: Path) -> None:
    config = training(vae_folder, gan_weight=0.0, perceptual=None)
    losses = []
    for rank in (0, 0, 1):
        state = VaeState(config, torch.device("cpu"), lambda module: module, rank=rank)
        losses.append(float(state.step(next(batches_after(0)), 1).terms["loss"]))
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("broken", ["vae", "discriminator"])
def test_what_is_no_number_stops_the_run_before_a_snapshot(
    vae_folder: Path, tmp_path: Path, broken: str
) -> None:
    state = new_state(training(vae_folder, log_every=2, checkpoint_every=1))
    learn = state.step

    def step(images: Tensor, number: int) -> Step:
        made = learn(images, number)
        model: nn.Module = state.vae if broken == "vae" else state.adversary.model
        if number == 3:
            with torch.no_grad():
                next(model.parameters()).fill_(float("nan"))
        return made

    state.step = step  # type: ignore[method-assign]
    with pytest.raises(DivergedError, match="norm of the weights is nan at step 3;"):
        train(state, batches_after, tmp_path)
    assert find_snapshot(tmp_path / SNAPSHOTS).step in (1, 2)


def test_a_loss_that_is_no_number_stops_the_run_within_an_interval(vae_folder: Path, tmp_path: Path) -> None:
    config = training(vae_folder, log_every=2, learning_rate=1e30, warmup_steps=1, checkpoint_every=1000)
    with pytest.raises(DivergedError, match=r"(loss|reconstruction|kl) is (nan|inf) at step [24];"):
        train(new_state(config), batches_after, tmp_path)
    assert find_snapshot(tmp_path / SNAPSHOTS).step == 0
