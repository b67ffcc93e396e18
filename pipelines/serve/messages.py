"""What travels between the stages of a server.

Latents and embeddings travel as they are, being small; the latents of a cascade and pixels by reference.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from ldm.conditioning import Conditioning
from pipelines.serve.step_costs import LatentShape
from pipelines.serve.tickets import Reason

__all__ = [
    "Accepted",
    "Condition",
    "DecodeRequest",
    "Edit",
    "ImageFormat",
    "Paste",
    "Progress",
    "Rejected",
    "SampleEvent",
    "SampleRequest",
    "Sampled",
    "UpsampleRequest",
]

ImageFormat: TypeAlias = Literal["png", "jpeg", "webp"]


class Condition(NamedTuple):
    """One row of `ldm.conditioning.Conditioning`: a class's label, an embedding (L, D), or neither."""

    label: int | None = None
    embedding_LD: NDArray[Any] | None = None

    def conditioning(self) -> Conditioning:
        """As the sampler takes it."""
        # A copy: what comes from another process cannot be written to, and torch would warn.
        embeddings = None if self.embedding_LD is None else torch.tensor(self.embedding_LD)[None].float()
        labels = None if self.label is None else torch.tensor([self.label])
        return Conditioning(labels, embeddings)


@dataclass(frozen=True)
class Edit:
    """What is edited: a latent (C, h, w) in the VAE's own scale. strength: 0 to 1, as `ldm.editing` has it;
    mask_hw: bool, True where it is made anew."""

    latent_Chw: NDArray[np.float32]
    strength: float
    mask_hw: NDArray[np.bool_] | None


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """An image to sample, all of it: who makes it elsewhere makes the same.

    shape: of the latent. deadline: wall time in seconds since the epoch, None for no hurry. preview_every:
    steps between two `Progress` events, 0 for none. refresh_every: 1 runs the whole U-Net in every step;
    k runs its deep part in every k-th.
    """

    model: str
    shape: LatentShape
    scheduler: str
    num_steps: int
    guidance: float
    seed: int
    condition: Condition
    null: Condition | None = None
    deadline: float | None = None
    preview_every: int = 0
    refresh_every: int = 1
    edit: "Edit | None" = None


class Accepted(NamedTuple):
    """It will be done."""


class Progress(NamedTuple):
    """``step`` of ``num_steps`` is taken; preview: uint8 (h, w, 3)."""

    step: int
    num_steps: int
    preview: NDArray[np.uint8] | None


class Sampled(NamedTuple):
    """The latent (C, h, w) float32, in the VAE's own scale."""

    latent_Chw: NDArray[np.float32]


class Rejected(NamedTuple):
    """Not accepted, or not done in time."""

    reason: Reason | Literal["late"]
    retry_after_s: float


SampleEvent: TypeAlias = Accepted | Progress | Sampled | Rejected


@dataclass(frozen=True)
class Paste:
    """What an edit leaves as it was: the image (H, W, 3), where the mask (H, W) is False."""

    image_HW3: NDArray[np.uint8]
    mask_HW: NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class UpsampleRequest:
    """A stage of a cascade: what a latent becomes. stage: from 1 on."""

    stage: int
    seed: int
    noise_level: int
    preview_every: int = 0


@dataclass(frozen=True, kw_only=True)
class DecodeRequest:
    """How a latent becomes a file; quality: 0 to 100, for what loses something."""

    model: str
    format: ImageFormat = "png"
    quality: int = 100
