"""``ldm evaluate recon``: how well a VAE reconstructs the images of some shards."""

from dataclasses import asdict
from pathlib import Path

from pydantic import Field
from pydantic_settings import CliPositionalArg

from jobs.cluster import ClusterConfig, connected
from jobs.config import JobConfig
from ldm.preprocess import Preprocess
from pipelines.evaluate import EvaluatePool

__all__ = ["EvaluateReconJob"]


class EvaluateReconJob(JobConfig):
    """Reconstruct the images in INPUT with a VAE; prints PSNR, SSIM and MS-SSIM per image and in the mean."""

    input: CliPositionalArg[str] = Field(description="folder or URL of .tar shards, or one .tar")
    vae: str = Field("f8", description="default model, diffusers folder, URL or hub id")
    preprocess: Preprocess = Preprocess()
    pictures: Path | None = Field(None, description="folder for PNGs of originals beside reconstructions")
    pool: EvaluatePool = EvaluatePool()
    cluster: ClusterConfig = ClusterConfig()

    def run(self) -> dict[str, object]:
        """Means, per-image metrics, std of the latents after the VAE's own scaling."""
        import numpy as np
        from rich.console import Console
        from rich.table import Table

        from ldm.autoencoder import load
        from ldm.images import encode_png
        from pipelines.evaluate import reconstruct
        from pipelines.shards import list_shards

        list_shards(self.input)
        autoencoder = load(self.vae)
        for height, width in self.preprocess.shapes():
            autoencoder.check_size(height, width)
        with connected(self.cluster):
            report = reconstruct(self.input, self.vae, self.preprocess, self.pool)
        means = report.means()
        table = Table(
            "image", "PSNR dB", "SSIM", "MS-SSIM", title=f"{self.vae} on {self.input}", title_justify="left"
        )
        for r in report.images:
            table.add_row(
                r.key, f"{r.psnr_db:.2f}", f"{r.ssim:.4f}", "" if r.ms_ssim is None else f"{r.ms_ssim:.4f}"
            )
        table.add_section()
        table.add_row(
            f"mean of {len(report.images)}", *("" if v is None else f"{v:.4f}" for v in means.values())
        )
        Console().print(table)
        for key, reason in report.rejected.items():
            print(f"not used: {key}: {reason}")
        if self.pictures:
            self.pictures.mkdir(parents=True, exist_ok=True)
            for r in report.images:
                side_by_side = np.concatenate([r.original, r.reconstruction], axis=1)
                (self.pictures / f"{r.key.replace('/', '_')}.png").write_bytes(encode_png(side_by_side))
        return {
            **means,
            "num_images": len(report.images),
            "rejected": report.rejected,
            "scaled_std": report.scaled_std,
            "fingerprint": autoencoder.fingerprint,
            "images": [
                {k: v for k, v in asdict(r).items() if k not in ("original", "reconstruction")}
                for r in report.images
            ],
        }
