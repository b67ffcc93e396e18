"""A cascade's files: stopped in any stage it goes on to the same bits, and does little twice."""

import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ldm.cascade import Denoise, Upsampler, WindowBatch
from ldm.checkpoint import CheckpointInfo
from ldm.objective import NoiseSchedule
from pipelines.upscale import Upscaling, Watch, upscale

# Of diffusers' DPM solver, with numpy 2.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)

LOW = np.random.default_rng(0).normal(size=(3, 6, 5)).astype(np.float32)
CONFIG = Upscaling(steps=6, snapshot_every=2, window_batch=2, seed=5, noise_level=10)


class Stopped(Exception):
    """As if the process had died."""


def stage(prediction: str) -> Upsampler:
    info = CheckpointInfo(
        step=1, latent_shape=(3, 8, 8), shift=(0.5, -0.5, 0.0), scale=(1.0, 2.0, 0.5), vae="f8",
        vae_fingerprint="0", class_names=None, upsampling_factor=2, max_noise_level=100,
        residual_shift=(0.0, 0.0, 0.0), residual_scale=(0.5, 1.0, 0.25),
    )  # fmt: skip
    schedule = NoiseSchedule(prediction=prediction)  # type: ignore[arg-type]
    return Upsampler(Path("none"), info, schedule.scheduler_config(), 1, "0")


STAGES = (stage("v_prediction"), stage("flow"))


def blurred(batches: Iterable[WindowBatch]) -> Iterator[Tensor]:
    """A "U-Net" that mixes neighbours, so windows matter."""
    for x_NChw, timestep, level in batches:
        noisy, low = x_NChw.chunk(2, 1)
        yield (noisy + noisy.roll(1, 2) + low * (timestep + level) / 1000) / 3


def picture(latent_CHW: Tensor) -> np.ndarray:
    return np.zeros((*latent_CHW.shape[1:], 3), np.uint8)


def run(
    work: Path,
    watch: Watch,
    config: Upscaling = CONFIG,
    denoise: Denoise = blurred,
    stages: Sequence[Upsampler] = STAGES,
) -> Tensor:
    return upscale(LOW, stages, config, lambda upsampler: denoise, work, picture, watch)


def nothing(stage: int, done: int, steps: int) -> None:
    pass


def files(work: Path) -> set[str]:
    return {path.name for path in work.iterdir()}


@pytest.mark.parametrize("at", [(1, 1), (1, 2), (1, 5), (1, 6), (2, 1), (2, 3), (2, 6)])
@pytest.mark.parametrize("scheduler", ["", "dpmpp"])
def test_stopped_at_every_step(tmp_path: Path, scheduler: str, at: tuple[int, int]) -> None:
    """At the worst the steps since the last snapshot are done again."""
    stages = STAGES if not scheduler else (STAGES[0], STAGES[0])
    config = CONFIG.model_copy(update={"scheduler": scheduler})
    undisturbed = run(tmp_path / "undisturbed", nothing, config, stages=stages)
    assert undisturbed.shape == (3, 24, 20)

    def stop(stage: int, done: int, steps: int) -> None:
        if (stage, done) == at:
            raise Stopped

    with pytest.raises(Stopped):
        run(tmp_path / "stopped", stop, config, stages=stages)
    taken: list[tuple[int, int]] = []
    again = run(
        tmp_path / "stopped", lambda stage, done, steps: taken.append((stage, done)), config, stages=stages
    )
    assert torch.equal(again, undisturbed)
    # The last step was taken, but what it gave was not yet written.
    assert taken[0] == (at[0], min(4, at[1] // 2 * 2) + 1)


def test_files_of_a_run(tmp_path: Path) -> None:
    seen: dict[tuple[int, int], set[str]] = {}
    run(tmp_path, lambda stage, done, steps: seen.update({(stage, done): files(tmp_path)}))
    assert seen[1, 2] == {"stage1.npz", "stage1.png"}
    assert seen[2, 1] == {"stage1.npy", "stage1.png"}
    assert seen[2, 4] == seen[2, 1] | {"stage2.npz", "stage2.png"}
    assert files(tmp_path) == {"stage1.npy", "stage1.png", "stage2.npy", "stage2.png"}
    sizes = [Image.open(io.BytesIO((tmp_path / f"stage{n}.png").read_bytes())).size for n in (1, 2)]
    assert sizes == [(10, 12), (20, 24)]


def test_a_finished_stage_is_not_taken_again(tmp_path: Path) -> None:
    first = run(tmp_path, nothing)

    def never(batches: Iterable[WindowBatch]) -> Iterator[Tensor]:
        raise AssertionError("no step is left")

    assert torch.equal(run(tmp_path, nothing, denoise=never), first)


def test_no_preview(tmp_path: Path) -> None:
    run(tmp_path, nothing, CONFIG.model_copy(update={"preview": False}))
    assert files(tmp_path) == {"stage1.npy", "stage2.npy"}
