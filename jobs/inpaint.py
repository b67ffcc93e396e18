"""``ldm inpaint``: let a checkpoint paint what a mask covers, and keep the rest."""

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, PositiveInt
from pydantic_settings import CliPositionalArg

from jobs.config import JobConfig, save_resolved
from jobs.edit_report import MeasureOptions, Networks, write_edits
from ldm.denoiser import DenoiseOptions, Denoiser
from ldm.errors import BadSampleError, UserError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["InpaintJob"]

WHITE_FROM = 128


class InpaintJob(JobConfig):
    """Repaint IMAGE where MASK is white; one PNG and one .npy for each of --images seeds.

    MASK is a PNG of IMAGE's size: white (128 or more) is painted anew, black is kept. A latent with any
    white pixel in its area is painted; outside the mask the pixels are IMAGE's own unless --no-paste.
    """

    image: CliPositionalArg[str] = Field(description="image file, or DATASET#KEY, or LATENT.npy")
    mask: CliPositionalArg[Path] = Field(description="PNG of the image's size, white where to repaint")
    checkpoint: Path = Field(description="folder written by ldm train")
    out: Path = Field(Path("out/inpaint"), description="folder for sheet.png, the images and their latents")
    images: PositiveInt = Field(4, description="how many, with seeds counting up from --denoise.seed")
    strength: float = Field(1.0, description="below 1 the masked part begins from what the image has there")
    paste: bool = Field(True, description="outside the mask take the pixels of the image itself")
    denoise: DenoiseOptions = DenoiseOptions()
    vae: str | None = Field(None, description="default: the checkpoint's")
    measure: MeasureOptions = MeasureOptions()

    def run(self) -> dict[str, object]:
        """The files, and of each image what was kept."""
        import numpy as np
        import torch

        from jobs.edit_source import load_vae, read_source
        from ldm.editing import first_step, inpaint, latent_mask
        from ldm.images import padded

        first_step(self.strength, self.denoise.steps)
        networks, denoiser = Networks(self.measure), Denoiser.load(self.checkpoint)
        autoencoder = load_vae(self.vae, (), denoiser.info)
        source = read_source(self.image, autoencoder, None, denoiser.size_multiple)
        mask_HW = read_mask(self.mask, source.image_HW3.shape[:2])
        area = padded(mask_HW.numpy(), autoencoder.f * denoiser.size_multiple)
        seeds = range(self.denoise.seed, self.denoise.seed + self.images)
        mask_hw = latent_mask(torch.from_numpy(area), autoencoder.f)
        z_BChw = inpaint(denoiser, source.z_Chw, mask_hw, seeds, self.denoise, self.strength)
        images = source.decode(autoencoder, z_BChw)
        if self.paste:
            images = np.where(mask_HW.numpy()[..., None], images, source.image_HW3)
        kept = networks.kept(source.image_HW3, images, mask_HW)
        files = write_edits(self.out, [f"seed{seed}" for seed in seeds], source.image_HW3, images, z_BChw)
        save_resolved(self, self.out / "inpaint.yaml")
        share = float(mask_HW.float().mean())
        print(f"{len(images)} images, {share:.1%} repainted: {files['sheet']}")
        edits = [{"seed": seed, **figures} for seed, figures in zip(seeds, kept, strict=True)]
        return {**files, "masked_share": share, "edits": edits}


def read_mask(path: Path, shape: tuple[int, ...]) -> "Tensor":
    """bool (H, W), True where the PNG is white. UserError for another size than ``shape``, or all black."""
    import numpy as np
    import torch

    from jobs.edit_source import read_bytes
    from ldm.images import decode_image

    try:
        # A transparent mask is laid over black: what is not there is not white.
        levels = np.asarray(decode_image(read_bytes(path), background="black").convert("L"))
    except BadSampleError as error:
        raise UserError(f"mask {path} is no image that can be read: {error}") from error
    if levels.shape != shape:
        raise UserError(
            f"mask {path} is {levels.shape[1]}×{levels.shape[0]}, the image {shape[1]}×{shape[0]}",
            do="give a mask of the image's size",
        )
    if not (levels >= WHITE_FROM).any():
        raise UserError(f"mask {path} is black all over", do="paint white what is to be repainted")
    return torch.from_numpy(levels >= WHITE_FROM)
