"""``ldm edit``: change an image, part of the way to noise and back, or along an attribute's direction."""

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, PositiveInt
from pydantic_settings import CliPositionalArg

from jobs.config import JobConfig, save_resolved
from jobs.edit_report import MeasureOptions, Networks, write_edits
from ldm.denoiser import DenoiseOptions, Denoiser
from ldm.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from jobs.edit_source import Source
    from ldm.autoencoder import Autoencoder
    from ldm.directions import Direction

__all__ = ["EditJob"]


class EditJob(JobConfig):
    """Edit INPUT, an image file, a latent .npy or DATASET#KEY; one PNG and one .npy for each strength.

    With --checkpoint (SDEdit) a strength from 0 to 1 says how far INPUT is noised before it is denoised:
    0 gives its own encoding back, 1 is plain sampling. With --direction, a file of ldm direction, the
    strength times the direction is added; any number goes.
    """

    input: CliPositionalArg[str] = Field(description="IMAGE, LATENT.npy or DATASET#KEY")
    out: Path = Field(Path("out/edit"), description="folder for sheet.png, the images and their latents")
    strength: tuple[float, ...] = Field((0.5,), min_length=1, description="one edit for each, as 0,0.3,0.6")
    checkpoint: Path | None = Field(None, description="folder written by ldm train")
    direction: Path | None = Field(None, description="file written by ldm direction")
    size_px: PositiveInt | None = Field(None, description="square that the image is cropped and resized to")
    denoise: DenoiseOptions = DenoiseOptions()
    vae: str | None = Field(None, description="default: that of the checkpoint or direction")
    measure: MeasureOptions = MeasureOptions()

    def run(self) -> dict[str, object]:
        """The files, and of each strength what was kept and how far the attribute moved."""
        if (self.checkpoint is None) == (self.direction is None):
            raise UserError("an edit needs one of --checkpoint and --direction")
        networks = Networks(self.measure)
        source, autoencoder, edited_BChw, direction = self._edit()
        images = source.decode(autoencoder, edited_BChw)
        kept = networks.kept(source.image_HW3, images)
        moved = _moved(direction, autoencoder, source, edited_BChw)
        edits = [{"strength": s, **k, **m} for s, k, m in zip(self.strength, kept, moved, strict=True)]
        names = [f"strength{strength:+g}" for strength in self.strength]
        files = write_edits(self.out, names, source.image_HW3, images, edited_BChw)
        save_resolved(self, self.out / "edit.yaml")
        for edit in edits:
            print("  ".join(f"{key} {value:.4g}" for key, value in edit.items() if value is not None))
        return {**files, "edits": edits}

    def _edit(self) -> "tuple[Source, Autoencoder, Tensor, Direction | None]":
        """Source, VAE, edited latents (B, C, h, w), direction."""
        import torch

        from jobs.edit_source import load_vae, read_source
        from ldm.direction_file import read_direction
        from ldm.editing import first_step, sdedit

        if self.checkpoint is not None:
            for strength in self.strength:
                first_step(strength, self.denoise.steps)
            denoiser = Denoiser.load(self.checkpoint)
            autoencoder = load_vae(self.vae, (), denoiser.info)
            source = read_source(self.input, autoencoder, self.size_px, denoiser.size_multiple)
            z_BChw = source.z_Chw.expand(len(self.strength), *source.z_Chw.shape)
            return source, autoencoder, sdedit(denoiser, z_BChw, self.strength, self.denoise), None
        assert self.direction is not None
        direction = read_direction(self.direction)
        autoencoder = load_vae(self.vae or direction.about["vae"], (), None)
        source = read_source(self.input, autoencoder, self.size_px)
        direction.check(tuple(source.z_Chw.shape), autoencoder.fingerprint)
        moved = [direction.moved(source.z_Chw, strength) for strength in self.strength]
        return source, autoencoder, torch.stack(moved), direction


def _moved(
    direction: "Direction | None", autoencoder: "Autoencoder", source: "Source", edited_BChw: "Tensor"
) -> list[dict[str, float]]:
    """Position and probability of the attribute before and after; after is of the image, encoded again.

    The edited latent itself moves by exactly the strength, which would say nothing.
    """
    import torch

    if direction is None:
        return [{}] * len(edited_BChw)
    again_BChw = autoencoder.encode(autoencoder.decode(edited_BChw)).mode()
    z_NChw = torch.cat([source.z_Chw[None], again_BChw])
    position_N, probability_N = direction.position(z_NChw), direction.probability(z_NChw)
    found = []
    for after in range(1, len(z_NChw)):
        figures = {"position_before": float(position_N[0]), "position_after": float(position_N[after])}
        if probability_N is not None:
            figures["probability_before"] = float(probability_N[0])
            figures["probability_after"] = float(probability_N[after])
        found.append(figures)
    return found
