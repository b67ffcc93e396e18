"""Reconstruction quality of a VAE over image shards, on Ray Data.

Protocol: preprocessing at the first of its sizes, decode of the posterior's mean, both images
rounded to 8 bits, metrics per image, mean over images.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, NonNegativeFloat, PositiveFloat, PositiveInt

from ldm.autoencoder import load
from ldm.errors import BadSampleError, UserError
from ldm.image_tensors import from_model, to_model
from ldm.latents import LatentStats
from ldm.metrics import reconstruction_quality
from ldm.preprocess import Preprocess
from pipelines.device import pick_device
from pipelines.shards import Sample, Shard, list_shards, read_samples
from pipelines.vae_source import on_every_node

__all__ = ["EvaluatePool", "ReconReport", "Reconstruction", "reconstruct"]


class EvaluatePool(BaseModel):
    """Actors that encode and decode."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: PositiveInt = 1
    num_cpus: PositiveFloat = 1.0
    num_gpus: NonNegativeFloat = 0.0


@dataclass(frozen=True)
class Reconstruction:
    """One image and what the VAE made of it; pixels are (H, W, 3) uint8, ms_ssim None below 176 px."""

    key: str
    original: NDArray[np.uint8]
    reconstruction: NDArray[np.uint8]
    psnr_db: float
    ssim: float
    ms_ssim: float | None


@dataclass(frozen=True)
class ReconReport:
    """All images in key order, inputs that could not be read, latent statistics after scaling."""

    images: tuple[Reconstruction, ...]
    rejected: dict[str, str]
    scaled_std: tuple[float, ...]

    def means(self) -> dict[str, float | None]:
        """Mean of each metric over the images."""
        ms = [r.ms_ssim for r in self.images if r.ms_ssim is not None]
        return {
            "psnr_db": float(np.mean([r.psnr_db for r in self.images])),
            "ssim": float(np.mean([r.ssim for r in self.images])),
            "ms_ssim": float(np.mean(ms)) if ms else None,
        }


class Reconstructor:
    """Actor: images → reconstructions, metrics and latent statistics, one image at a time.

    One at a time keeps a figure independent of which images share a batch.
    """

    def __init__(self, vae: str) -> None:
        self.autoencoder = load(vae).to(pick_device())

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        if row["reason"]:
            return row
        image = to_model(row["original"][None]).to(self.autoencoder.vae.device)
        moments = self.autoencoder.encode(image)
        decoded = self.autoencoder.decode(moments.mode())
        quality = reconstruction_quality(image.cpu(), decoded.cpu())[0]
        stats = LatentStats.of(moments)
        return {
            **row,
            "reconstruction": from_model(decoded)[0],
            "psnr_db": quality.psnr_db,
            "ssim": quality.ssim,
            "ms_ssim": quality.ms_ssim,
            "stats": (stats.count, stats.mean_C, stats.m2_C),
        }


def reconstruct(source: str, vae: str, preprocess: Preprocess, pool: EvaluatePool) -> ReconReport:
    """Encode and decode every image of the shards. UserError where none can be used."""
    import ray
    from ray.data import ActorPoolStrategy

    shards = list_shards(source)
    rows = (
        ray.data.from_items([{"shard": shard} for shard in shards], override_num_blocks=len(shards))
        .flat_map(lambda item: _read(item["shard"], preprocess))
        .map(
            Reconstructor,  # type: ignore[arg-type]  # Ray types callable classes for map_batches only
            fn_constructor_args=(on_every_node(vae),),
            compute=ActorPoolStrategy(size=pool.size),
            num_cpus=pool.num_cpus,
            num_gpus=pool.num_gpus,
        )
        .take_all()
    )
    return _report(sorted(rows, key=lambda row: str(row["key"])), vae)


def _read(shard: Shard, preprocess: Preprocess) -> Iterator[dict[str, Any]]:
    try:
        for sample in read_samples(shard):
            yield _row(sample, preprocess)
    except BadSampleError as damage:  # of the archive: the samples before it are whole
        yield _rejected(shard.url.rsplit("/", 1)[-1], damage, preprocess)


def _row(sample: Sample, preprocess: Preprocess) -> dict[str, Any]:
    try:
        views = preprocess.views(sample.image_bytes(), sample.key)
        return {"key": sample.key, "original": views[0], "reason": ""}
    except BadSampleError as error:
        return _rejected(sample.key, error, preprocess)


def _rejected(key: str, error: BadSampleError, preprocess: Preprocess) -> dict[str, Any]:
    # Ray Data wants the columns of all rows to be of one type.
    empty = np.zeros((preprocess.sizes_px[0], preprocess.sizes_px[0], 3), np.uint8)
    return {"key": key, "original": empty, "reason": str(error)}


def _report(rows: Sequence[dict[str, Any]], vae: str) -> ReconReport:
    good = [row for row in rows if not row["reason"]]
    if not good:
        raise UserError(f"none of {len(rows)} images can be read", do="look at the input shards")
    stats = LatentStats.merge_all(
        LatentStats(int(n), tuple(mean), tuple(m2)) for n, mean, m2 in (r["stats"] for r in good)
    )
    scale = load(vae).whitening.scale_C
    names = ("key", "original", "reconstruction", "psnr_db", "ssim", "ms_ssim")
    return ReconReport(
        tuple(Reconstruction(**{name: row[name] for name in names}) for row in good),
        {row["key"]: row["reason"] for row in rows if row["reason"]},
        tuple(std / s for std, s in zip(stats.std_C, scale, strict=True)),
    )
