"""Sample grids: the images that diffusers makes of the EMA model, on any ranks, and no bit of training."""

from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, FlowMatchEulerDiscreteScheduler
from numpy.typing import NDArray
from PIL import Image

from ldm.image_tensors import image_grid
from pipelines.dataset import LatentDataset
from pipelines.train.plan import open_loader
from pipelines.train.sample_grid import GridSampler, SampleGrid, _conditions
from pipelines.train.state import TrainState
from tests.pipelines.train.event_files import shown
from tests.pipelines.train.test_state import OPTIONS, Stopped, assert_same_bits, new_state, run
from tests.pipelines.train.training_ranks import train_on

GRID = {"num_images": 3, "every": 2, "num_inference_steps": 4, "guidance": 2.5, "seed": 7}
SHORT: dict[str, Any] = {"steps": 5, "samples": GRID}


@pytest.fixture(scope="module")
def folder(write_latents: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_latents(tmp_path_factory.mktemp("latents") / "d", count=96)


@pytest.fixture(scope="module")
def trained(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainState, Path]:
    out = tmp_path_factory.mktemp("out")
    return run(folder, out, **SHORT), out


def pixels(path: Path | BytesIO) -> NDArray[np.int64]:
    return np.asarray(Image.open(path)).astype(np.int64)


def by_diffusers(state: TrainState, vae_folder: Path, scheduler: Any) -> NDArray[np.int64]:
    """Classes cat, dog, cat at seeds 7, 8, 9, side by side, in diffusers' own words."""
    scheduler.set_timesteps(4)
    x = torch.stack([torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(7 + i)) for i in range(3)])
    labels, null, unet = torch.tensor([0, 1, 0]), torch.full((3,), 2), state.ema.module
    with torch.no_grad():
        for t in scheduler.timesteps:
            conditional = unet(x, t, None, class_labels=labels).sample
            unconditional = unet(x, t, None, class_labels=null).sample
            x = scheduler.step(unconditional + 2.5 * (conditional - unconditional), t, x).prev_sample
        shift, scale = (torch.tensor(v).view(1, 3, 1, 1) for v in (state.info.shift, state.info.scale))
        images = AutoencoderKL.from_pretrained(vae_folder).decode(x * scale + shift).sample
    return np.hstack(list(((images.clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1).long().numpy()))


def test_a_grid_is_what_diffusers_makes(trained: tuple[TrainState, Path], vae_folder: Path) -> None:
    state, out = trained
    config = state.config.noise_schedule.scheduler_config()
    expected = by_diffusers(state, vae_folder, DDIMScheduler.from_config(config))
    found = pixels(out / "samples/step-00000005.png")
    assert found.shape == (32, 96, 3)
    assert found.std() > 10
    # A step is one of rounding, in a row of another batch.
    assert np.abs(found - expected).max() <= 1


def test_a_flow_is_sampled_as_one(folder: Path, vae_folder: Path, tmp_path: Path) -> None:
    state = run(folder, tmp_path, steps=1, prediction="flow", samples=GRID)
    config = state.config.noise_schedule.scheduler_config()
    expected = by_diffusers(state, vae_folder, FlowMatchEulerDiscreteScheduler.from_config(config))
    assert np.abs(pixels(tmp_path / "samples/step-00000001.png") - expected).max() <= 1


def test_grids_come_at_every_second_step_and_the_last_in_tensorboard_too(
    trained: tuple[TrainState, Path],
) -> None:
    _, out = trained
    assert sorted(path.name for path in (out / "samples").iterdir()) == [
        "step-00000002.png", "step-00000004.png", "step-00000005.png"
    ]  # fmt: skip
    images = {step: png for step, tag, png in shown(out / "tensorboard") if tag == "samples"}
    assert images.keys() == {2, 4, 5}
    for step, png in images.items():
        assert isinstance(png, bytes)
        assert np.array_equal(pixels(BytesIO(png)), pixels(out / f"samples/step-{step:08d}.png"))


def test_grids_change_no_bit_of_training(
    trained: tuple[TrainState, Path], folder: Path, tmp_path: Path
) -> None:
    plain = run(folder, tmp_path, steps=5)
    assert_same_bits(plain.state(), trained[0].state())
    assert not (tmp_path / "samples").exists()


def test_a_run_that_goes_on_makes_the_same_grids(
    trained: tuple[TrainState, Path], folder: Path, tmp_path: Path
) -> None:
    """Step 3 has a grid at first, and is done again with settings by which it has none."""
    with pytest.raises(Stopped):
        run(folder, tmp_path, stop_after=3, steps=5, samples=GRID | {"every": 3})
    assert (tmp_path / "samples/step-00000003.png").exists()
    run(folder, tmp_path, **SHORT)
    found, expected = (
        {path.name: path.read_bytes() for path in (out / "samples").iterdir()}
        for out in (tmp_path, trained[1])
    )
    # From step 2 on, or from 0 where that snapshot was not yet written: 3 is gone in any case.
    assert found.keys() >= {"step-00000004.png", "step-00000005.png"}
    assert found.items() <= expected.items()


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_two_ranks_make_the_grids_of_one(
    trained: tuple[TrainState, Path], folder: Path, tmp_path: Path, parallel: str
) -> None:
    train_on(2, tmp_path, folder, OPTIONS | SHORT | {"parallel": parallel})
    for name in ("step-00000002.png", "step-00000004.png", "step-00000005.png"):
        found, expected = pixels(tmp_path / "samples" / name), pixels(trained[1] / "samples" / name)
        # Sums over two ranks are rounded otherwise.
        assert np.abs(found - expected).max() <= 2


def test_an_input_that_is_more_than_a_latent_has_no_grids(folder: Path, tmp_path: Path) -> None:
    """As of an upsampler, whose U-Net sees a low-resolution latent too."""
    state = new_state(folder, **SHORT)
    sampler = GridSampler(state, open_loader(LatentDataset.open(folder), state.config), tmp_path, 0)
    assert sampler.due(5)
    state.ema.module.register_to_config(in_channels=6)
    sampler = GridSampler(state, open_loader(LatentDataset.open(folder), state.config), tmp_path, 0)
    assert not sampler.due(5)


def test_conditions_of_embeddings_are_those_held_out() -> None:
    """Two rows of different lengths and one without an embedding, in turn."""
    rng = np.random.default_rng(0)
    long, short = (rng.normal(size=(length, 4)).astype(np.float16) for length in (3, 2))
    batches = [SimpleNamespace(embeddings_B=(long, None)), SimpleNamespace(embeddings_B=(short,))]
    loader: Any = SimpleNamespace(validation=lambda *, rank, world: batches)
    info: Any = SimpleNamespace(class_names=None, embedding_width=4)
    conditions, null = _conditions(info, loader, 3)
    assert conditions.mask is not None and conditions.embeddings is not None
    for row, expected in enumerate((long, short, long)):
        assert conditions.mask[row].tolist() == [index < len(expected) for index in range(3)]
        assert np.array_equal(
            conditions.embeddings[row, : len(expected)].numpy(), expected.astype(np.float32)
        )
    assert null is not None and null.embeddings is not None
    assert torch.equal(null.embeddings, torch.zeros(1, 1, 4))


def test_without_conditions_there_is_no_guidance(write_latents: Callable[..., Path], tmp_path: Path) -> None:
    dataset = write_latents(tmp_path / "d", class_names=None)
    run(dataset, tmp_path / "out", steps=1, samples=SampleGrid(num_images=2, num_inference_steps=2))
    assert pixels(tmp_path / "out/samples/step-00000001.png").shape == (32, 64, 3)


def test_rows_of_a_grid() -> None:
    images = np.arange(3 * 2 * 2 * 3, dtype=np.uint8).reshape(3, 2, 2, 3) + 1
    grid = image_grid(images, columns=2)
    assert grid.shape == (4, 4, 3)
    assert np.array_equal(grid[:2, :2], images[0])
    assert np.array_equal(grid[:2, 2:], images[1])
    assert np.array_equal(grid[2:, :2], images[2])
    assert not grid[2:, 2:].any()
    assert np.array_equal(image_grid(images[:1], columns=8), images[0])
