"""``ldm decode``: decode a latent into an image."""

import time
from pathlib import Path

from pydantic import Field, PositiveInt
from pydantic_settings import CliPositionalArg

from jobs.cluster import ClusterConfig
from jobs.config import JobConfig
from jobs.decoded_image import write_decoded
from ldm.tiling.config import Tiling
from pipelines.tile_actors import TileActors

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
        from pipelines.latent_source import read_latent

        check_suffix(self.out)
        source = read_latent(self.latent)
        autoencoder = load(self.vae or source.vae or "f8")
        if source.vae_fingerprint is not None:
            check_vae(autoencoder, source.vae_fingerprint, self.latent)
        start = time.perf_counter()
        height, width = write_decoded(
            self.out,
            autoencoder,
            torch.from_numpy(source.latent_Chw),
            self.tiling,
            self.actors,
            self.cluster,
            self.crop_px,
        )
        seconds = time.perf_counter() - start
        return {"out": str(self.out), "width": width, "height": height, "seconds": seconds}
