"""Reconstruction quality of a VAE over image shards.

Protocol: preprocessing at the first of its sizes, decode of the posterior's mean, both images
rounded to 8 bits, figures per image.
"""

import os
import platform
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm.autoencoder import load
from ldm.errors import UserError
from ldm.feature_stats import FeatureSummary
from ldm.features import load_extractor
from ldm.image_tensors import from_model, to_model
from ldm.latents import LatentStats
from ldm.metrics import reconstruction_quality
from ldm.preprocess import Preprocess
from pipelines.device import pick_device
from pipelines.evaluate.images import ImageId, Rejected, image_rows, rejected_of, set_digest, shards_with
from pipelines.evaluate.pool import EvaluatePool
from pipelines.evaluate.summaries import summarise
from pipelines.shards import Shard
from pipelines.storage_form import dequantise, quantise

if TYPE_CHECKING:
    from ray.data import Dataset

__all__ = ["ImageFigures", "Measured", "ReconModels", "Reconstruction", "measure", "reconstruct"]

Row = dict[str, Any]
FEATURES = ("original_features", "reconstruction_features")


@dataclass(frozen=True)
class ReconModels:
    """Sources of the networks as every node finds them; extractor and perceptual empty: not computed.

    stored: dtype that latents are stored in before they are decoded, float16 or int8; empty: not stored.
    """

    vae: str
    extractor: str = ""
    perceptual: str = ""
    stored: str = ""


@dataclass(frozen=True)
class ImageFigures:
    """Figures of one image; ms_ssim None below 176 px, distance (perceptual) None where not computed."""

    shard: str
    position: int
    key: str
    psnr_db: float
    ssim: float
    ms_ssim: float | None
    distance: float | None

    @property
    def id(self) -> ImageId:
        return ImageId(self.shard, self.position)


@dataclass(frozen=True)
class Reconstruction(ImageFigures):
    """With the pixels: (H, W, 3) uint8."""

    original: NDArray[np.uint8]
    reconstruction: NDArray[np.uint8]


@dataclass(frozen=True)
class Measured:
    """Figures in the order of shards and positions, latent statistics after scaling, the set's digest.

    processes: host and process of every actor that took part; originals, reconstructions: their
    features, None where no extractor was asked for.
    """

    images: tuple[ImageFigures, ...]
    rejected: tuple[Rejected, ...]
    scaled_std: tuple[float, ...]
    digest: str
    processes: tuple[str, ...]
    originals: FeatureSummary | None
    reconstructions: FeatureSummary | None

    def values(self) -> dict[str, list[float]]:
        """Metric → its value of every image that has one; metrics that no image has are left out."""
        names = ("psnr_db", "ssim", "ms_ssim", "distance")
        columns = {name: [v for r in self.images if (v := getattr(r, name)) is not None] for name in names}
        return {name: column for name, column in columns.items() if column}


class Reconstructor:
    """Actor: images → figures and latent statistics, and features and pictures where asked for.

    One image at a time keeps a figure independent of which images share a batch.
    """

    def __init__(self, models: ReconModels, with_pictures: bool) -> None:
        self.device, self.stored, self.with_pictures = pick_device(), models.stored, with_pictures
        self.autoencoder = load(models.vae).to(self.device)
        self.extractor = load_extractor(models.extractor).to(self.device) if models.extractor else None
        self.perceptual = None
        if models.perceptual:
            from ldm.perceptual import load_perceptual

            self.perceptual = load_perceptual(models.perceptual).to(self.device)

    def __call__(self, row: Row) -> Row:
        pixels = row.pop("pixels")
        image = to_model(pixels[None]).to(self.device)
        moments = self.autoencoder.encode(image)
        reconstruction = from_model(self.autoencoder.decode(_stored(moments.mode(), self.stored)))[0]
        decoded = to_model(reconstruction[None]).to(self.device)
        stats = LatentStats.of(moments)
        made = {
            **row,
            **asdict(reconstruction_quality(image.cpu(), decoded.cpu())[0]),
            "distance": None if self.perceptual is None else float(self.perceptual(image, decoded)[0]),
            "latent_count": stats.count,
            "latent_mean": np.array(stats.mean_C),
            "latent_m2": np.array(stats.m2_C),
            "process": f"{platform.node()}:{os.getpid()}",
        }
        if self.extractor is not None:
            for name, shown in zip(FEATURES, (image, decoded), strict=True):
                made[name] = self.extractor(shown)[0].cpu().numpy()
        if self.with_pictures:
            made |= {"original": pixels, "reconstruction": reconstruction}
        return made


def measure(
    source: str, models: ReconModels, preprocess: Preprocess, pool: EvaluatePool, *, keep: int = 1000
) -> Measured:
    """Figures of every image of the shards. UserError where none can be used.

    keep: images whose features are kept for KID and for intervals. Pictures do not reach this process.
    """
    dataset = _dataset(shards_with(source), models, preprocess, pool).materialize()
    wanted = [name for name in dataset.columns() or [] if name not in FEATURES]
    rows = sorted(dataset.select_columns(wanted).take_all(), key=ImageId.of)
    good = [row for row in rows if not row["reason"]]
    if not good:
        raise UserError(f"none of {len(rows)} images can be read", do="look at the input shards")
    summaries = summarise(dataset, FEATURES, keep) if models.extractor else {}
    return Measured(
        images=tuple(ImageFigures(**_figures(row)) for row in good),
        rejected=rejected_of(rows),
        scaled_std=_scaled_std(good, models.vae),
        digest=set_digest([row["digest"] for row in good]),
        processes=tuple(sorted({row["process"] for row in rows})),
        originals=summaries.get(FEATURES[0]),
        reconstructions=summaries.get(FEATURES[1]),
    )


def reconstruct(
    source: str,
    vae: str,
    preprocess: Preprocess,
    pool: EvaluatePool,
    only: Collection[ImageId] | None = None,
) -> Iterator[Reconstruction]:
    """Originals and reconstructions of the images that can be read, or of those in ``only``, as they come.

    In no fixed order; no more than a few blocks of them are in memory.
    """
    dataset = _dataset(
        shards_with(source, only), ReconModels(vae), preprocess, pool, only, with_pictures=True
    )
    for row in dataset.iter_rows():
        if not row["reason"]:
            yield Reconstruction(
                **_figures(row), original=row["original"], reconstruction=row["reconstruction"]
            )


def _dataset(
    shards: Sequence[Shard],
    models: ReconModels,
    preprocess: Preprocess,
    pool: EvaluatePool,
    only: Collection[ImageId] | None = None,
    *,
    with_pictures: bool = False,
) -> "Dataset":
    # An unreadable image goes through the networks as an empty one: its row has the same columns so.
    return image_rows(shards, preprocess, only).map(
        Reconstructor,  # type: ignore[arg-type]  # Ray types callable classes for map_batches only
        fn_constructor_args=(models, with_pictures),
        compute=pool.strategy(len(shards)),
        num_cpus=pool.num_cpus,
        num_gpus=pool.num_gpus,
    )


def _stored(latent_1Chw: Tensor, dtype: str) -> Tensor:
    """What comes back of a latent from a dataset of this dtype."""
    if not dtype:
        return latent_1Chw
    half = latent_1Chw.half().cpu().numpy()
    return torch.from_numpy(half if dtype == "float16" else dequantise(quantise(half))).float()


def _figures(row: Row) -> Row:
    optional = {name: None if row[name] is None else float(row[name]) for name in ("ms_ssim", "distance")}
    return {
        "shard": row["shard"],
        "position": int(row["position"]),
        "key": row["key"],
        "psnr_db": float(row["psnr_db"]),
        "ssim": float(row["ssim"]),
        **optional,
    }


def _scaled_std(rows: Sequence[Row], vae: str) -> tuple[float, ...]:
    stats = LatentStats.merge_all(
        LatentStats(int(row["latent_count"]), tuple(row["latent_mean"]), tuple(row["latent_m2"]))
        for row in rows
    )
    scale = load(vae).whitening.scale_C
    return tuple(float(std / s) for std, s in zip(stats.std_C, scale, strict=True))
