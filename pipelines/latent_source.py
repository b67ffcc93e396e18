"""One latent from where a user names it: a .npy file, a row of a latent dataset, or an image to encode."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ldm.autoencoder import Autoencoder
from ldm.checkpoint import check_vae
from ldm.errors import BadSampleError, UserError
from ldm.images import decode_image
from ldm.tiling.config import Tiling
from ldm.tiling.encode import encode
from pipelines.dataset import LatentDataset
from pipelines.latent_table import read_latents

__all__ = ["Input", "SourceLatent", "read_input", "read_latent"]


class SourceLatent(NamedTuple):
    """latent_Chw: float32, in the VAE's own scale; its VAE and fingerprint, None where the user must know."""

    latent_Chw: NDArray[np.float32]
    vae: str | None
    vae_fingerprint: str | None


class Input(NamedTuple):
    """latent_Chw: float32, in the VAE's own scale; size_px: rows and columns of the image that it is of."""

    latent_Chw: NDArray[np.float32]
    size_px: tuple[int, int]


def read_latent(name: str) -> SourceLatent:
    """``name``: LATENT.npy of shape (C, h, w), or DATASET#KEY for the mean of a row.

    UserError where there is no such thing, or it is another kind of array.
    """
    if "#" in name:
        return _from_dataset(name)
    return SourceLatent(_from_npy(Path(name)), None, None)


def read_input(name: str, autoencoder: Autoencoder, tiling: Tiling) -> Input:
    """What `read_latent` reads, or an image, encoded, of any size.

    UserError where there is no such thing, or the row is of another VAE.
    """
    if not name.lower().endswith(".npy") and Path(name).is_file():
        return _from_image(Path(name), autoencoder, tiling)
    source = read_latent(name)
    if source.vae_fingerprint is not None:
        check_vae(autoencoder, source.vae_fingerprint, name)
    _, height, width = source.latent_Chw.shape
    return Input(source.latent_Chw, (height * autoencoder.f, width * autoencoder.f))


def _from_image(path: Path, autoencoder: Autoencoder, tiling: Tiling) -> Input:
    """The posterior's mean."""
    try:
        image_HW3 = np.asarray(decode_image(path.read_bytes()))
    except (OSError, BadSampleError) as error:
        raise UserError(f"cannot read image {path}: {error}") from error
    height, width = image_HW3.shape[:2]
    return Input(encode(autoencoder, image_HW3, tiling).mode()[0].numpy(), (height, width))


def _from_npy(path: Path) -> NDArray[np.float32]:
    try:
        # Mapped, not read: memory need not hold it.
        latent = np.load(path, mmap_mode="c", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(
            f"cannot read latent {path}: {error}", allowed="a .npy array without pickle"
        ) from error
    if not isinstance(latent, np.ndarray):
        latent.close()
        raise UserError(f"{path} is an archive of arrays", allowed="a .npy array without pickle")
    if latent.ndim != 3 or latent.dtype.kind != "f":
        raise UserError(f"{path} holds {latent.dtype} {latent.shape}", allowed="floats of shape (C, h, w)")
    as_fp32: NDArray[np.float32] = latent.astype(np.float32, copy=False)
    return as_fp32


def _from_dataset(name: str) -> SourceLatent:
    url, _, key = name.rpartition("#")
    dataset = LatentDataset.open(url)
    for entry in dataset.derived().manifest.to_pylist():
        with dataset.filesystem.open(dataset.path(entry["path"]), "rb") as file:
            rows = read_latents(file)
        if key in rows.keys:
            latent_Chw = rows.moments.mean_NChw[rows.keys.index(key)].astype(np.float32)
            return SourceLatent(latent_Chw, dataset.header.vae, dataset.header.vae_fingerprint)
    raise UserError(f"no row {key!r} in latent dataset {url}", do="list its keys with a Parquet reader")
