"""``ldm decode``: decode a latent into an image."""

from pathlib import Path

from pydantic import Field
from pydantic_settings import CliPositionalArg

from jobs.config import JobConfig
from ldm.errors import UserError

__all__ = ["DecodeJob"]


class DecodeJob(JobConfig):
    """Decode LATENT, a .npy file or a row of a latent dataset, into the PNG file OUT.

    LATENT is a .npy of shape (C, h, w) in the VAE's own scale, or DATASET#KEY for the mean of a row.
    """

    latent: CliPositionalArg[str] = Field(description="LATENT.npy, or DATASET#KEY")
    out: CliPositionalArg[Path] = Field(description="PNG file")
    vae: str | None = Field(None, description="default: the dataset's; f8 for a .npy")

    def run(self) -> dict[str, object]:
        """The file and its size in pixels."""
        import torch

        from ldm.autoencoder import load
        from ldm.checkpoint import check_vae
        from ldm.image_tensors import from_model
        from ldm.images import encode_png
        from pipelines.latent_source import read_latent

        if self.out.suffix.lower() != ".png":
            raise UserError(f"output {self.out} is no PNG", allowed="a name that ends in .png")
        source = read_latent(self.latent)
        autoencoder = load(self.vae or source.vae or "f8")
        if source.vae_fingerprint is not None:
            check_vae(autoencoder, source.vae_fingerprint, self.latent)
        image = from_model(autoencoder.decode(torch.from_numpy(source.latent_Chw)[None]))[0]
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.out.write_bytes(encode_png(image))
        return {"out": str(self.out), "width": image.shape[1], "height": image.shape[0]}
