"""Images of the EMA model at fixed seeds: the same noise, made into a better picture from grid to grid."""

from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from ldm.conditioning import ClassConditioner, Conditioning, EmbeddingConditioner
from ldm.sampling import MAX_STEPS, Trajectory, sample
from ldm.schedulers import default_scheduler

if TYPE_CHECKING:
    from ldm.checkpoint import CheckpointInfo
    from pipelines.train.loader import LatentLoader
    from pipelines.train.state import TrainState

__all__ = ["SAMPLES", "GridSampler", "SampleGrid"]

# In the output: one PNG for each grid.
SAMPLES = "samples"
COLUMNS = 8
# Trajectories of one U-Net call: training has room for that many, and a full-size model for no more.
BATCH_SIZE = 8


class SampleGrid(BaseModel):
    """Which images are made while training."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_images: NonNegativeInt = Field(8, description="0 for no grids")
    every: PositiveInt = Field(1_000, description="at the first logged step of as many, and at the last")
    num_inference_steps: int = Field(20, ge=1, le=MAX_STEPS)
    guidance: NonNegativeFloat = Field(3.0, description="where there are conditions; 1 is none")
    seed: NonNegativeInt = Field(0, description="of the first image; the next ones count up")


class GridSampler:
    """Makes the grids of a run on this rank. It draws from generators of its own, and changes no state.

    A sharded model is sampled by all ranks together, another one by the first alone, which decodes
    and writes. UserError where that one cannot read the VAE.
    """

    def __init__(self, state: "TrainState", loader: "LatentLoader", folder: Path, start: int) -> None:
        """start: the step that training goes on from; grids in ``folder`` of later ones are removed."""
        self.state, self.folder, self.config = state, folder, state.config.samples
        self.is_first = not dist.is_initialized() or dist.get_rank() == 0
        model: Any = state.ema.module
        # An upsampler's input carries a low-resolution latent as well, which is not at hand here.
        takes_latents = model.config["in_channels"] == state.info.latent_shape[0]
        takes_part = self.is_first or state.config.parallel == "fsdp2"
        self.is_on: bool = self.config.num_images > 0 and takes_latents and takes_part
        if self.is_on:
            self.conditions, self.null = _conditions(state.info, loader, self.config.num_images)
        if self.is_on and self.is_first:
            self._prepare_decoding(start)

    def due(self, step: int) -> bool:
        """Whether this rank takes part in a grid at a logged step."""
        training = self.state.config
        return self.is_on and (step == training.steps or step % self.config.every < training.log_every)

    def draw(self, step: int) -> NDArray[np.uint8] | None:
        """Publish the grid of ``step``; returns its pixels (H, W, 3) on the first rank, None on others."""
        from fsspec.implementations.local import LocalFileSystem

        from ldm.image_tensors import from_model, image_grid
        from ldm.images import encode_png
        from pipelines.publish import publish

        x_BChw = self._sample()
        if not self.is_first:
            return None
        z_BChw = self.state.info.whitening.denormalise(x_BChw)
        # One by one: a decoder's activations are far larger than the U-Net's.
        images = np.concatenate([from_model(self.autoencoder.decode(z_1Chw)) for z_1Chw in z_BChw[:, None]])
        grid_HW3 = image_grid(images, COLUMNS)
        publish(LocalFileSystem(), str(self.folder / f"step-{step:08d}.png"), encode_png(grid_HW3))
        return grid_HW3

    def _prepare_decoding(self, start: int) -> None:
        from ldm import autoencoder, checkpoint

        info = self.state.info
        # Before the first step, so that a VAE which is not there ends nothing that has begun.
        self.autoencoder = autoencoder.load(info.vae).to(self.state.device)
        checkpoint.check_vae(self.autoencoder, info.vae_fingerprint, "the training")
        for path in self.folder.glob("step-*.png"):
            if int(path.stem.removeprefix("step-")) > start:
                path.unlink()

    def _sample(self) -> torch.Tensor:
        training, device = self.state.config, self.state.device
        trajectories = [self._trajectory(index) for index in range(self.config.num_images)]
        with torch.autocast(device.type, torch.bfloat16, enabled=training.precision == "bf16"):
            return sample(self.state.ema.module, trajectories, BATCH_SIZE)

    def _trajectory(self, index: int) -> Trajectory:
        schedule = self.state.config.noise_schedule
        return Trajectory(
            shape=self.state.info.latent_shape,
            scheduler=default_scheduler(schedule.kind),
            scheduler_config=schedule.scheduler_config(),
            num_inference_steps=self.config.num_inference_steps,
            guidance=self.config.guidance if self.null else 1.0,
            seed=self.config.seed + index,
            condition=self.conditions.select(torch.tensor([index])),
            null=self.null,
            device=self.state.device,
        )


def _conditions(
    info: "CheckpointInfo", loader: "LatentLoader", count: int
) -> tuple[Conditioning, Conditioning | None]:
    """``count`` conditions and the null: classes in turn, or embeddings of the first rows held out."""
    if info.class_names:
        classes = ClassConditioner(info.class_names)
        return classes.encode([index % len(info.class_names) for index in range(count)]), classes.null
    if info.embedding_width is None:
        return Conditioning(), None
    held_out = loader.validation(rank=0, world=1)
    embeddings = [torch.from_numpy(e).float() for b in held_out for e in b.embeddings_B if e is not None]
    conditioner = EmbeddingConditioner(torch.zeros(1, info.embedding_width))
    if not embeddings:
        return conditioner.null.select(torch.zeros(count, dtype=torch.int64)), conditioner.null
    return conditioner.encode(list(islice(cycle(embeddings), count))), conditioner.null
