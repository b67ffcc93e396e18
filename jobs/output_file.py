"""Files that a job writes: each appears under its name when it is whole."""

import io
from pathlib import Path

import numpy as np
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray
from torch import Tensor

from ldm.images import encode_png
from pipelines.publish import publish

__all__ = ["write_npy", "write_png"]


def write_png(path: Path, image_HW3: NDArray[np.uint8]) -> None:
    """An image that fits into memory; others: `ldm.image_rows.write_image`."""
    publish(LocalFileSystem(), str(path), encode_png(image_HW3))


def write_npy(path: Path, z_Chw: Tensor) -> None:
    """A latent as `pipelines.latent_source.read_latent` reads it."""
    buffer = io.BytesIO()
    np.save(buffer, z_Chw.numpy(), allow_pickle=False)
    publish(LocalFileSystem(), str(path), buffer.getvalue())
