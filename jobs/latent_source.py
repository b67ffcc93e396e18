"""Latents that a user names: a .npy file, or a row of a latent dataset."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ldm.errors import UserError

__all__ = ["from_dataset", "from_npy"]


def from_npy(path: Path) -> NDArray[np.float32]:
    """The latent (C, h, w) in a .npy of any floating dtype. UserError where there is none."""
    try:
        latent = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(
            f"cannot read latent {path}: {error}", allowed="a .npy array without pickle"
        ) from error
    if not isinstance(latent, np.ndarray):
        latent.close()
        raise UserError(f"{path} is an archive of arrays", allowed="a .npy array without pickle")
    if latent.ndim != 3 or latent.dtype.kind != "f":
        raise UserError(f"{path} holds {latent.dtype} {latent.shape}", allowed="floats of shape (C, h, w)")
    as_fp32: NDArray[np.float32] = latent.astype(np.float32)
    return as_fp32


def from_dataset(name: str) -> tuple[NDArray[np.float32], str, str]:
    """(mean (C, h, w), VAE, its fingerprint) of the row DATASET#KEY. UserError where there is none."""
    from pipelines.dataset import LatentDataset
    from pipelines.latent_table import read_latents

    url, _, key = name.rpartition("#")
    dataset = LatentDataset.open(url)
    for entry in dataset.derived().manifest.to_pylist():
        with dataset.filesystem.open(dataset.path(entry["path"]), "rb") as file:
            rows = read_latents(file)
        if key in rows.keys:
            return (
                rows.moments.mean_NChw[rows.keys.index(key)].astype(np.float32),
                dataset.header.vae,
                dataset.header.vae_fingerprint,
            )
    raise UserError(f"no row {key!r} in latent dataset {url}", do="list its keys with a Parquet reader")
