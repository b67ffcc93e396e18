"""``ldm upscale``: enlarge an image or a latent with a cascade of upsamplers."""

from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field
from pydantic_settings import CliPositionalArg

from jobs.cluster import ClusterConfig, connected
from jobs.config import JobConfig
from jobs.decoded_image import require_room as require_room_to_decode
from jobs.decoded_image import write_decoded
from ldm.tiling.config import Tiling
from pipelines.tile_actors import TileActors
from pipelines.upscale import Upscaling
from pipelines.window_pool import WindowPool

if TYPE_CHECKING:
    from torch import Tensor

    from ldm.autoencoder import Autoencoder

__all__ = ["UpscaleJob"]


class UpscaleJob(Upscaling, JobConfig):
    """Enlarge INPUT with the upsamplers of --stages, one after the other, into OUT.

    INPUT is an image, a latent .npy of shape (C, h, w) in the VAE's own scale, or DATASET#KEY. OUT is a PNG,
    a TIFF, or a .npy for the latent. Run it again after any interruption: it goes on where it was.
    """

    input: CliPositionalArg[str] = Field(description="an image, LATENT.npy, or DATASET#KEY")
    out: CliPositionalArg[Path] = Field(description="file: .png or .tif, or .npy for the latent")
    stages: tuple[Path, ...] = Field(min_length=1, description="checkpoints of upsamplers, in their order")
    vae: str | None = Field(None, description="default: the first upsampler's")
    work: Path | None = Field(None, description="folder of the stages' files; default: OUT with .stages")
    pool: WindowPool = WindowPool()
    tiling: Tiling = Tiling(mode="exact")
    actors: TileActors = TileActors()
    cluster: ClusterConfig = ClusterConfig()

    def run(self) -> dict[str, object]:
        """The files written, and the size in pixels."""
        import torch

        from ldm.autoencoder import load
        from ldm.checkpoint import read_info
        from ldm.image_rows import check_suffix
        from ldm.preview import LatentPreview
        from pipelines.latent_source import read_input
        from pipelines.upscale import check, open_run, upscale
        from pipelines.window_pool import require_room, window_actors

        check_suffix(self.out)
        autoencoder = load(self.vae or read_info(self.stages[0]).vae)
        source = read_input(self.input, autoencoder, self.tiling)
        upsamplers = check(source.latent_Chw, self.stages, self, autoencoder)
        factor = prod(upsampler.factor for upsampler in upsamplers)
        if self.out.suffix.lower() != ".npy" and not self.actors.size:
            # Not after days of denoising.
            channels, rows, columns = source.latent_Chw.shape
            require_room_to_decode(autoencoder, (channels, rows * factor, columns * factor), self.tiling)
        work = self.work or self.out.with_suffix(".stages")
        open_run(work, source.latent_Chw, upsamplers, self, self.pool.threads)
        preview = LatentPreview.fit(autoencoder, torch.from_numpy(source.latent_Chw))
        with connected(self.cluster):
            if self.cluster.address is None:
                require_room(self.pool)
            with window_actors(self.pool) as open_stage:
                latent_CHW = upscale(
                    source.latent_Chw, upsamplers, self, open_stage, work, preview, self._tell
                )
            height, width = (side * factor for side in source.size_px)
            self._write(latent_CHW, autoencoder, (height, width))
        print(f"{width}×{height} px: {self.out}")
        return {"out": str(self.out), "work": str(work), "width": width, "height": height}

    def _tell(self, stage: int, done: int, steps: int) -> None:
        if done % self.snapshot_every == 0 or done == steps:
            print(f"stage {stage} of {len(self.stages)}: step {done} of {steps}", flush=True)

    def _write(self, latent_CHW: "Tensor", autoencoder: "Autoencoder", size_px: tuple[int, int]) -> None:
        """As an image, without what was added to the input's sides, or as a latent."""
        from jobs.output_file import write_npy

        if self.out.suffix.lower() == ".npy":
            write_npy(self.out, latent_CHW)
            return
        write_decoded(self.out, autoencoder, latent_CHW, self.tiling, self.actors, self.cluster, size_px)
