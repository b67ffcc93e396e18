"""``ldm upscale``: enlarge an image or a latent with a cascade of upsamplers."""

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field
from pydantic_settings import CliPositionalArg

from jobs.cluster import ClusterConfig, connected
from jobs.config import JobConfig
from ldm.errors import UserError
from pipelines.upscale import Upscaling
from pipelines.window_pool import WindowPool

if TYPE_CHECKING:
    from torch import Tensor

    from ldm.autoencoder import Autoencoder

__all__ = ["UpscaleJob"]


class UpscaleJob(Upscaling, JobConfig):
    """Enlarge INPUT with the upsamplers of --stages, one after the other, into OUT.

    INPUT is an image, a latent .npy of shape (C, h, w) in the VAE's own scale, or DATASET#KEY. OUT is a .png,
    or a .npy for the latent. Run it again after any interruption: it goes on where it was.
    """

    input: CliPositionalArg[str] = Field(description="an image, LATENT.npy, or DATASET#KEY")
    out: CliPositionalArg[Path] = Field(description="PNG file, or .npy for the latent")
    stages: tuple[Path, ...] = Field(min_length=1, description="checkpoints of upsamplers, in their order")
    vae: str | None = Field(None, description="default: the first upsampler's")
    work: Path | None = Field(None, description="folder of the stages' files; default: OUT with .stages")
    pool: WindowPool = WindowPool()
    cluster: ClusterConfig = ClusterConfig()

    def run(self) -> dict[str, object]:
        """The files written, and the size in pixels."""
        import torch

        from ldm.autoencoder import load
        from ldm.checkpoint import read_info
        from ldm.preview import LatentPreview
        from pipelines.latent_source import read_input
        from pipelines.upscale import check, open_run, upscale
        from pipelines.window_pool import require_room, window_actors

        if self.out.suffix.lower() not in (".png", ".npy"):
            raise UserError(f"output {self.out} is neither PNG nor latent", allowed="a name in .png or .npy")
        autoencoder = load(self.vae or read_info(self.stages[0]).vae)
        source = read_input(self.input, autoencoder)
        upsamplers = check(source.latent_Chw, self.stages, self, autoencoder)
        work = self.work or self.out.with_suffix(".stages")
        open_run(work, source.latent_Chw, upsamplers, self, self.pool.threads)
        preview = LatentPreview(autoencoder, torch.from_numpy(source.latent_Chw))
        with connected(self.cluster):
            if self.cluster.address is None:
                require_room(self.pool)
            with window_actors(self.pool) as open_stage:
                latent_CHW = upscale(
                    source.latent_Chw, upsamplers, self, open_stage, work, preview, self._tell
                )
        factor = latent_CHW.shape[1] // source.latent_Chw.shape[1]
        height, width = (side * factor for side in source.size_px)
        self._write(latent_CHW, autoencoder, height, width)
        print(f"{width}×{height} px: {self.out}")
        return {"out": str(self.out), "work": str(work), "width": width, "height": height}

    def _tell(self, stage: int, done: int, steps: int) -> None:
        if done % self.snapshot_every == 0 or done == steps:
            print(f"stage {stage} of {len(self.stages)}: step {done} of {steps}", flush=True)

    def _write(self, latent_CHW: "Tensor", autoencoder: "Autoencoder", height: int, width: int) -> None:
        """As an image, without what was added to the input's sides, or as a latent."""
        import io

        import numpy as np
        from fsspec.implementations.local import LocalFileSystem

        from ldm.image_tensors import from_model
        from ldm.images import encode_png
        from pipelines.publish import publish

        if self.out.suffix.lower() == ".npy":
            buffer = io.BytesIO()
            np.save(buffer, latent_CHW.numpy())
            data = buffer.getvalue()
        else:
            image_HW3 = from_model(autoencoder.decode(latent_CHW[None]))[0]
            data = encode_png(np.ascontiguousarray(image_HW3[:height, :width]))
        publish(LocalFileSystem(), str(self.out), data)
