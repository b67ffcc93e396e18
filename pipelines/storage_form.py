"""In which form latents are stored: what of the posterior, in how many bits, mirrored or not."""

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

__all__ = ["Quantised", "StorageForm", "dequantise", "quantise"]

INT8_MAX = 127


class StorageForm(BaseModel):
    """Recorded in ``dataset.json``; the measured cost of each form is what ``ldm stats`` prints."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stored: Literal["moments", "mode", "sample"] = Field(
        "moments", description="mean and std; the mean alone; or one sample, seeded by key"
    )
    dtype: Literal["float16", "int8"] = Field("float16", description="int8 has a scale per channel")
    mirrored: bool = Field(False, description="also store the latents of the mirrored image")
    seed: int = Field(0, description="of stored samples")


class Quantised(NamedTuple):
    """values_NChw int8; scale_NC float32: what a step of 1 stands for, per image and channel."""

    values_NChw: NDArray[np.int8]
    scale_NC: NDArray[np.float32]


def quantise(latents_NChw: NDArray[np.float16]) -> Quantised:
    """Nearest of 255 levels between ± the largest absolute value of each image's channel.

    ``quantise(dequantise(q))`` is ``q``: fp16 is fine enough to tell the levels apart.
    """
    values = latents_NChw.astype(np.float32)
    scale = np.abs(values).max(axis=(2, 3)) / np.float32(INT8_MAX)
    # A channel of zeros: any scale will do, but not the 0 that one would divide by.
    steps = np.where(scale > 0, scale, np.float32(1))[:, :, None, None]
    return Quantised(np.rint(values / steps).clip(-INT8_MAX, INT8_MAX).astype(np.int8), scale)


def dequantise(quantised: Quantised) -> NDArray[np.float16]:
    """The latents that stand for the levels, float16 (N, C, h, w)."""
    scale = quantised.scale_NC[:, :, None, None]
    return (quantised.values_NChw.astype(np.float32) * scale).astype(np.float16)
