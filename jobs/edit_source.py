"""What a user gives to be edited: an image file, a latent .npy or DATASET#KEY → a latent and its pixels."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm.autoencoder import Autoencoder, load
from ldm.checkpoint import CheckpointInfo, check_vae
from ldm.errors import BadSampleError, UserError
from ldm.image_tensors import from_model, to_model
from ldm.images import decode_image, padded
from ldm.preprocess import Preprocess
from pipelines.latent_source import read_latent

__all__ = ["Source", "load_vae", "read_bytes", "read_source"]


@dataclass(frozen=True, eq=False)
class Source:
    """A latent (C, h, w), float32 in the VAE's own scale, and the image (H, W, 3) that it stands for.

    The image is the original where there is one, else the decoded latent. It may be smaller than the
    latent's area, right and below: then it was padded to be encoded.
    """

    name: str
    z_Chw: Tensor
    image_HW3: NDArray[np.uint8]

    def decode(self, autoencoder: Autoencoder, z_BChw: Tensor) -> NDArray[np.uint8]:
        """Latents of this one's shape → images (B, H, W, 3) of this one's size."""
        height, width, _ = self.image_HW3.shape
        return from_model(autoencoder.decode(z_BChw))[:, :height, :width]


def load_vae(vae: str | None, names: Sequence[str], info: CheckpointInfo | None) -> Autoencoder:
    """``vae``, or the checkpoint's, or that of the first DATASET#KEY among the names, or f8.

    UserError where it is not the VAE of the checkpoint.
    """
    of_datasets = (read_latent(name).vae for name in names if "#" in name)
    autoencoder = load(vae or (info.vae if info else next(of_datasets, None)) or "f8")
    if info:
        check_vae(autoencoder, info.vae_fingerprint, "the checkpoint")
    return autoencoder


def read_source(name: str, autoencoder: Autoencoder, size_px: int | None, multiple: int = 1) -> Source:
    """Encode or read what is named.

    size_px: an image is cropped to the square in its middle and resized to it; None leaves its size.
    multiple: what rows and columns of the latent must be multiples of; an image is padded up to it.
    UserError for what cannot be read, and a latent of another VAE.
    """
    if "#" in name or name.endswith(".npy"):
        latent = read_latent(name)
        if latent.vae_fingerprint is not None:
            check_vae(autoencoder, latent.vae_fingerprint, name)
        return _of_latent(name, latent.latent_Chw, autoencoder)
    image = _image(name, size_px)
    pixels = padded(image, autoencoder.f * multiple)
    return Source(name, autoencoder.encode(to_model(pixels[None])).mode()[0].clone(), image)


def read_bytes(path: Path) -> bytes:
    """UserError where there is no such file."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def _of_latent(name: str, latent_Chw: NDArray[np.float32], autoencoder: Autoencoder) -> Source:
    z_Chw = torch.from_numpy(latent_Chw)
    return Source(name, z_Chw, from_model(autoencoder.decode(z_Chw[None]))[0])


def _image(name: str, size_px: int | None) -> NDArray[np.uint8]:
    data = read_bytes(Path(name))
    try:
        if size_px is not None:
            return Preprocess(sizes_px=(size_px,)).views(data, name)[0]
        return np.asarray(decode_image(data))
    except BadSampleError as error:
        raise UserError(f"{name} is no image that can be read: {error}") from error
