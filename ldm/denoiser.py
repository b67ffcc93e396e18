"""A checkpoint in memory, and the trajectories that it can run: what an edit of a latent needs of it.

Shape suffixes: C, h, w a latent's channels, rows and columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor

from ldm import checkpoint, unet
from ldm.conditioning import ClassConditioner, Conditioning, EmbeddingConditioner
from ldm.errors import UserError
from ldm.objective import kind_of
from ldm.sampling import Trajectory
from ldm.schedulers import default_scheduler

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

    from ldm.checkpoint import CheckpointInfo

__all__ = ["DenoiseOptions", "Denoiser", "seed_noise"]


class DenoiseOptions(BaseModel):
    """How a checkpoint denoises."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: PositiveInt = Field(50, description="of the whole way from pure noise")
    scheduler: str = Field(
        "", description="ddim, ddpm, euler, dpmpp, flow_euler; default ddim, or flow_euler"
    )
    class_name: str | None = Field(None, description="class name or index; default: no condition")
    guidance: NonNegativeFloat = Field(3.0, description="towards the class; 1 is none")
    seed: NonNegativeInt = 0
    batch_size: PositiveInt = 16


@dataclass(frozen=True)
class Denoiser:
    """The U-Net of a checkpoint with what belongs to it."""

    unet: UNet2DConditionModel
    info: CheckpointInfo
    scheduler_config: dict[str, object]

    @classmethod
    def load(cls, folder: Path) -> Denoiser:
        """On the CPU, in fp32. UserError for a folder that is no checkpoint, or an upsampler's."""
        info = checkpoint.read_info(folder)
        if info.upsampling_factor is not None:
            raise UserError(
                f"{folder} is an upsampler, which cannot denoise alone",
                do="give a checkpoint that was trained without --train.data.low-size-px",
            )
        return cls(unet.load(folder).eval(), info, checkpoint.read_scheduler_config(folder))

    @cached_property
    def size_multiple(self) -> int:
        """What rows and columns of a latent must be multiples of."""
        return unet.size_multiple(self.unet)

    def check_shape(self, shape: Sequence[int]) -> None:
        """UserError where the U-Net cannot take a latent of this shape (C, h, w)."""
        channels, height, width = shape
        multiple = self.size_multiple
        if channels != self.info.latent_shape[0] or height % multiple or width % multiple:
            raise UserError(
                f"the checkpoint cannot denoise a latent of shape {tuple(shape)}",
                allowed=f"({self.info.latent_shape[0]}, height, width), both multiples of {multiple}",
            )

    def trajectory(
        self,
        shape: tuple[int, int, int],
        options: DenoiseOptions,
        *,
        seed: int | None = None,
        noise: Tensor | None = None,
        x0: Tensor | None = None,
        first_step: int = 0,
        mask: Tensor | None = None,
    ) -> Trajectory:
        """A trajectory of whitened latents; see `ldm.sampling.Trajectory`. seed: the options' unless given.

        UserError for options that this checkpoint cannot serve.
        """
        condition, null = self._conditions(options.class_name)
        return Trajectory(
            shape=shape,
            scheduler=options.scheduler or default_scheduler(kind_of(self.scheduler_config)),
            scheduler_config=self.scheduler_config,
            num_inference_steps=options.steps,
            # Without a condition both predictions of a guided step are the same one.
            guidance=1.0 if options.class_name is None else options.guidance,
            seed=options.seed if seed is None else seed,
            condition=condition,
            null=null,
            noise=noise,
            x0=x0,
            first_step=first_step,
            mask=mask,
        )

    def _conditions(self, class_name: str | None) -> tuple[Conditioning, Conditioning | None]:
        """The condition and its null."""
        if self.info.class_names is not None:
            conditioner = ClassConditioner(self.info.class_names)
            return conditioner.encode([class_name]), conditioner.null
        if class_name is not None:
            raise UserError(f"class {class_name!r} for a model without classes", do="leave the class out")
        if self.info.embedding_width is not None:
            null = EmbeddingConditioner(torch.zeros(1, self.info.embedding_width)).null
            return null, null
        return Conditioning(), None


def seed_noise(shape: Sequence[int], seed: int) -> Tensor:
    """The noise, float32, that the trajectory of a seed begins with."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))
