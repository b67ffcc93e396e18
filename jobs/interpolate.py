"""``ldm interpolate``: a path between two images, or a grid between four, through latents or noise."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, PositiveInt
from pydantic_settings import CliPositionalArg

from jobs.config import JobConfig, save_resolved
from ldm.denoiser import DenoiseOptions, Denoiser, seed_noise
from ldm.errors import UserError
from ldm.interpolation import Method, grid, path
from ldm.sampling import MAX_SEED

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from ldm.perceptual import Perceptual

__all__ = ["InterpolateJob"]

SEED = "seed:"


class InterpolateJob(JobConfig):
    """Make the images between ENDS: two for a path, four for a grid with them in its corners.

    An end is an image file, a latent .npy, DATASET#KEY, or seed:N, the noise that a checkpoint's image
    with seed N begins with. Between images the path is one of latents; between seeds every noise of the
    path is denoised with the checkpoint.
    """

    ends: CliPositionalArg[list[str]] = Field(
        description="two or four of IMAGE, LATENT.npy, DATASET#KEY; or of seed:N"
    )
    out: Path = Field(Path("out/interpolation"), description="folder for sheet.png and the frames")
    method: Method | None = Field(
        None, description="lerp, a straight line, or slerp, a great circle; default lerp, of seeds slerp"
    )
    frames: PositiveInt = Field(9, ge=2, description="images of a path, or along a side of a grid")
    size_px: PositiveInt | None = Field(None, description="square that images are cropped and resized to")
    checkpoint: Path | None = Field(None, description="folder written by ldm train; for seeds")
    denoise: DenoiseOptions = DenoiseOptions()
    vae: str | None = Field(None, description="default: that of the checkpoint or dataset, else f8")
    perceptual: str = Field(
        "", description="distance to measure the path by: lpips-vgg, lpips-alex, stlpips, random, a folder"
    )

    def run(self) -> dict[str, object]:
        """The contact sheet, the frames, and how smooth a path is."""
        from jobs.output_file import write_png
        from ldm.image_tensors import image_grid
        from ldm.perceptual import load_perceptual

        self._check()
        perceptual = load_perceptual(self.perceptual) if self.perceptual else None
        of_seeds = self.ends[0].startswith(SEED)
        images = self._between_seeds() if of_seeds else self._between_latents()
        files = [self.out / f"frame-{index:03d}.png" for index in range(len(images))]
        for file, image in zip(files, images, strict=True):
            write_png(file, image)
        write_png(self.out / "sheet.png", image_grid(images, self.frames))
        save_resolved(self, self.out / "interpolate.yaml")
        print(f"{len(images)} images: {self.out / 'sheet.png'}")
        return {
            "sheet": str(self.out / "sheet.png"),
            "files": [str(file) for file in files],
            "smoothness": None if perceptual is None else _smoothness(perceptual, images),
        }

    def _check(self) -> None:
        if len(self.ends) not in (2, 4):
            raise UserError(f"{len(self.ends)} ends", allowed="two for a path, four for a grid")
        seeds = sum(end.startswith(SEED) for end in self.ends)
        if seeds not in (0, len(self.ends)):
            raise UserError(f"ends of two kinds: {', '.join(self.ends)}", allowed="all seeds, or none")
        if seeds and self.checkpoint is None:
            raise UserError("there is no path between seeds without a checkpoint", do="give --checkpoint")
        if not seeds and self.checkpoint is not None:
            raise UserError("a path between images takes no --checkpoint", do="leave it out")
        if self.perceptual and len(self.ends) == 4:
            raise UserError("a grid is no path to measure", do="leave --perceptual out")

    def _between_latents(self) -> "NDArray[np.uint8]":
        """Frames (T, H, W, 3)."""
        import torch

        from jobs.edit_source import load_vae, read_source

        autoencoder = load_vae(self.vae, self.ends, None)
        sources = [read_source(end, autoencoder, self.size_px) for end in self.ends]
        sizes = {source.image_HW3.shape[:2] for source in sources}
        if len(sizes) > 1:
            said = ", ".join(f"{width}×{height}" for height, width in sorted(sizes))
            raise UserError(f"the ends have different sizes: {said}", do="give --size-px")
        whitening = autoencoder.whitening
        corners = whitening.normalise(torch.stack([source.z_Chw for source in sources]))
        z_TChw = whitening.denormalise(self._frames(list(corners), "lerp"))
        return sources[0].decode(autoencoder, z_TChw)

    def _between_seeds(self) -> "NDArray[np.uint8]":
        """Frames (T, H, W, 3). The noise of a stochastic scheduler's steps is the first seed's in all."""
        from jobs.edit_source import load_vae
        from ldm.image_tensors import from_model
        from ldm.sampling import sample

        assert self.checkpoint is not None
        denoiser = Denoiser.load(self.checkpoint)
        autoencoder = load_vae(self.vae, (), denoiser.info)
        seeds = [_seed(end) for end in self.ends]
        noises = self._frames([seed_noise(denoiser.info.latent_shape, seed) for seed in seeds], "slerp")
        trajectories = [
            denoiser.trajectory(denoiser.info.latent_shape, self.denoise, seed=seeds[0], noise=noise)
            for noise in noises
        ]
        x_TChw = sample(denoiser.unet, trajectories, self.denoise.batch_size)
        return from_model(autoencoder.decode(denoiser.info.whitening.denormalise(x_TChw)))

    def _frames(self, corners: "list[Tensor]", default: Method) -> "Tensor":
        method = self.method or default
        if len(corners) == 4:
            return grid(corners, self.frames, method)
        start, end = corners
        return path(start, end, self.frames, method)


def _smoothness(perceptual: "Perceptual", images_THW3: "NDArray[np.uint8]") -> dict[str, object]:
    """Figures of the path, and by which network."""
    from ldm.image_tensors import to_model
    from ldm.path_smoothness import frame_features, smoothness

    found = asdict(smoothness(perceptual, frame_features(perceptual, to_model(images_THW3))))
    print("  ".join(f"{name} {value:.3f}" for name, value in found.items()))
    return {"perceptual": perceptual.name, "sha256": perceptual.fingerprint, **found}


def _seed(end: str) -> int:
    digits = end.removeprefix(SEED)
    if not digits.isdecimal() or int(digits) > MAX_SEED:
        raise UserError(f"end {end!r}", allowed=f"{SEED}N with N from 0 to {MAX_SEED}")
    return int(digits)
