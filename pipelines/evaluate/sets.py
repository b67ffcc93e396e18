"""Sets of images and their features: those of shards, those that are at hand as arrays."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ldm.errors import UserError
from ldm.feature_stats import FeatureSummary
from ldm.features import load_extractor
from ldm.image_tensors import to_model
from ldm.preprocess import Preprocess
from pipelines.device import pick_device
from pipelines.evaluate.images import (
    ImageId,
    Rejected,
    image_rows,
    pixel_digest,
    rejected_of,
    set_digest,
    shards_with,
)
from pipelines.evaluate.pool import EvaluatePool
from pipelines.evaluate.summaries import summarise

if TYPE_CHECKING:
    from ray.data import Dataset

__all__ = ["ImageSet", "array_set", "pictures_of", "shard_set"]

Pixels = NDArray[np.uint8]
Columns = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class ImageSet:
    """Features of a set, the digest of every image in it, and what could not be read."""

    summary: FeatureSummary
    digests: tuple[str, ...]
    rejected: tuple[Rejected, ...] = ()

    @property
    def digest(self) -> str:
        """Of the whole set, whatever its order."""
        return set_digest(self.digests)

    def merge(self, other: "ImageSet") -> "ImageSet":
        """Both sets together."""
        return ImageSet(
            self.summary.merge(other.summary), self.digests + other.digests, self.rejected + other.rejected
        )


class FeatureActor:
    """Actor: adds ``features`` (B, D) float32 to a batch, and drops its ``pixels``."""

    def __init__(self, extractor: str) -> None:
        self.device = pick_device()
        self.extractor = load_extractor(extractor).to(self.device)

    def __call__(self, batch: Columns) -> Columns:
        images = to_model(np.stack(list(batch.pop("pixels")))).to(self.device)
        return {**batch, "features": self.extractor(images).cpu().numpy()}


def shard_set(
    source: str, preprocess: Preprocess, extractor: str, pool: EvaluatePool, *, keep: int = 1000
) -> ImageSet:
    """Features of the images in the shards, all preprocessed to one shape. UserError where none can be used.

    keep: see `ldm.feature_stats.FeatureSample`.
    """
    return _image_set(image_rows(shards_with(source), preprocess), extractor, pool, keep)


def array_set(
    images: Sequence[tuple[ImageId, Pixels]], extractor: str, pool: EvaluatePool, *, keep: int = 1000
) -> ImageSet:
    """Features of images that are here: uint8 (H, W, 3), all of one shape."""
    import ray

    rows = [
        {
            "shard": image.shard,
            "position": image.position,
            "key": str(image),
            "pixels": pixels,
            "digest": pixel_digest(pixels),
            "reason": "",
        }
        for image, pixels in images
    ]
    blocks = -(-len(rows) // pool.batch_size)
    return _image_set(ray.data.from_items(rows, override_num_blocks=blocks), extractor, pool, keep)


def pictures_of(source: str, preprocess: Preprocess, only: Collection[ImageId]) -> dict[ImageId, Pixels]:
    """The preprocessed pixels of a few images."""
    rows = image_rows(shards_with(source, only), preprocess, only).take_all()
    return {ImageId.of(row): row["pixels"] for row in rows if not row["reason"]}


def _image_set(rows: "Dataset", extractor: str, pool: EvaluatePool, keep: int) -> ImageSet:
    dataset = rows.map_batches(
        FeatureActor,
        fn_constructor_args=(extractor,),
        batch_size=pool.batch_size,
        compute=pool.strategy(),
        num_cpus=pool.num_cpus,
        num_gpus=pool.num_gpus,
    ).materialize()
    names = dataset.select_columns(["shard", "position", "key", "digest", "reason"])
    found = sorted(names.take_all(), key=ImageId.of)
    digests = tuple(row["digest"] for row in found if not row["reason"])
    if not digests:
        raise UserError(f"none of {len(found)} images can be read", do="look at the input shards")
    return ImageSet(summarise(dataset, ["features"], keep)["features"], digests, rejected_of(found))
