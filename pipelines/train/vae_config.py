"""How a VAE is trained: the config."""

from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from ldm import autoencoder
from ldm.perceptual import SOURCES
from pipelines.custom_resources import CustomResources
from pipelines.train.crops import CropConfig

__all__ = ["VaeTraining"]


class VaeTraining(CropConfig):
    """How to train a VAE, on which crops."""

    preset: str = Field("f8", description=f"layout to start from: {', '.join(autoencoder.PRESETS)}")
    init: str | None = Field(None, description="VAE to start from instead: a default, folder, URL or hub id")
    parts: Literal["all", "decoder"] = Field(
        "all", description="decoder: encoder and latents stay as they are; needs init"
    )
    steps: PositiveInt = 1000
    batch_size: PositiveInt = Field(8, description="crops per step over all workers")
    loss: Literal["l1", "mse"] = "mse"
    kl_weight: NonNegativeFloat = Field(1e-3, description="of the KL per pixel value, in nats")
    perceptual: str | None = Field(
        None,
        description=f"adds a perceptual distance: {', '.join(SOURCES)}, or a folder with torchvision's file",
    )
    perceptual_weight: PositiveFloat = Field(0.1, description="of that distance")
    gan_weight: NonNegativeFloat = Field(
        0.0, description="of a PatchGAN's term, beside its adaptive weight; 0: no discriminator"
    )
    gan_start_step: PositiveInt = Field(1, description="the discriminator is at rest before this step")
    learning_rate: PositiveFloat = 1.5e-4
    discriminator_lr: PositiveFloat = Field(1.5e-4, description="constant, without warm-up")
    warmup_steps: PositiveInt = 100
    ema_decay: float = Field(0.999, ge=0, lt=1)
    clip_norm: PositiveFloat = 1.0
    log_every: PositiveInt = 100
    checkpoint_every: PositiveInt = Field(
        2000, description="steps that a kill loses at most; a snapshot is begun twice as often"
    )
    keep_checkpoints: PositiveInt = Field(3, ge=2, description="an older one helps if the newest is torn")
    num_workers: PositiveInt = 1
    num_gpus: float = Field(0.0, ge=0, description="per worker")
    resources: CustomResources = Field({})
    threads: PositiveInt | None = Field(None, description="torch threads per worker; default: Ray's choice")
    max_failures: NonNegativeInt = Field(3, description="of workers, after which the job gives up")
    dtype: Literal["fp32", "fp16"] = Field("fp32", description="of the exported weights")

    @property
    def snapshot_every(self) -> int:
        """Half of it: one is written while training goes on, and the one before it is there by then."""
        return max(1, self.checkpoint_every // 2)
