"""``ldm decode``: decode a latent into an image."""

import time
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, PositiveInt
from pydantic_settings import CliPositionalArg

from jobs.cluster import ClusterConfig
from jobs.config import JobConfig
from jobs.decoded_image import write_decoded
from ldm.errors import UserError
from ldm.tiling.config import Tiling
from pipelines.tile_actors import TileActors

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["DecodeJob"]


class DecodeJob(JobConfig):
    """Decode LATENT, a .npy file or a row of a latent dataset, into the image OUT.

    LATENT is a .npy of shape (C, h, w) in the VAE's own scale, or DATASET#KEY for the mean of a row. OUT is a
    PNG, a TIFF or a .npy. It is written as it is decoded, and never in memory as a whole.
    """

    latent: CliPositionalArg[str] = Field(description="LATENT.npy, or DATASET#KEY")
    out: CliPositionalArg[Path] = Field(description="file: .png, .tif or .npy")
    vae: str | None = Field(None, description="default: the dataset's; f8 for a .npy")
    tiling: Tiling = Tiling(mode="exact")
    crop_px: tuple[PositiveInt, PositiveInt] | None = Field(
        None, description="height and width to crop to: of an image that was padded to be encoded"
    )
    actors: TileActors = TileActors()
    cluster: ClusterConfig = ClusterConfig()

    def run(self) -> dict[str, object]:
        """The file, its size in pixels, and how long it took."""
        import torch

        from ldm.autoencoder import load
        from ldm.checkpoint import check_vae
        from ldm.image_rows import check_suffix

        check_suffix(self.out)
        if "#" in self.latent:
            latent, vae, fingerprint = _from_dataset(self.latent)
            autoencoder = load(self.vae or vae)
            check_vae(autoencoder, fingerprint, self.latent)
        else:
            latent, autoencoder = _from_npy(Path(self.latent)), load(self.vae or "f8")
        start = time.perf_counter()
        height, width = write_decoded(
            self.out,
            autoencoder,
            torch.from_numpy(latent),
            self.tiling,
            self.actors,
            self.cluster,
            self.crop_px,
        )
        seconds = time.perf_counter() - start
        return {"out": str(self.out), "width": width, "height": height, "seconds": seconds}


def _from_npy(path: Path) -> "NDArray[np.float32]":
    import numpy as np

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


def _from_dataset(name: str) -> "tuple[NDArray[np.float32], str, str]":
    """(latent, VAE, its fingerprint) of DATASET#KEY."""
    import numpy as np

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
