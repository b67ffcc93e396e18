"""``ldm decode``: decode a latent into an image."""

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field
from pydantic_settings import CliPositionalArg

from jobs.config import JobConfig
from ldm.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

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

        if self.out.suffix.lower() != ".png":
            raise UserError(f"output {self.out} is no PNG", allowed="a name that ends in .png")
        if "#" in self.latent:
            latent, vae, fingerprint = _from_dataset(self.latent)
            autoencoder = load(self.vae or vae)
            check_vae(autoencoder, fingerprint, self.latent)
        else:
            latent, autoencoder = _from_npy(Path(self.latent)), load(self.vae or "f8")
        image = from_model(autoencoder.decode(torch.from_numpy(latent)[None]))[0]
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.out.write_bytes(encode_png(image))
        return {"out": str(self.out), "width": image.shape[1], "height": image.shape[0]}


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
