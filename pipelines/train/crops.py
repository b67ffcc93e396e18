"""Random crops of image shards, as an endless-enough stream for VAE training."""

import math
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

from ldm.errors import BadSampleError
from ldm.images import decode_image
from ldm.seeds import keyed_seed
from pipelines.shards import Shard, list_shards, read_samples

if TYPE_CHECKING:
    from ray.data import Dataset

__all__ = ["CropConfig", "crop_dataset", "crops", "num_passes", "usable_images"]


class CropConfig(BaseModel):
    """Which crops to take. One pass over the input makes ``crops_per_megapixel`` of each image."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    crop_px: PositiveInt = 64
    zoom_max: PositiveFloat = Field(
        2.0, ge=1, description="a crop shows 1 to this many times crop_px, reduced"
    )
    crops_per_megapixel: PositiveFloat = 30.0
    seed: int = 0


def crops(shard: Shard, pass_index: int, config: CropConfig) -> Iterator[dict[str, Any]]:
    """Random crops (crop_px, crop_px, 3) uint8 of every image of a shard, seeded by (seed, pass, key)."""
    for key, image in usable_images(shard):
        rng = np.random.default_rng(keyed_seed(config.seed, pass_index, shard.name, key))
        # The fraction is kept in expectation: a small picture gives a crop in some passes only.
        for _ in range(int(_crops_expected(image, config) + rng.random())):
            side = min(config.crop_px * rng.uniform(1.0, config.zoom_max), *image.size)
            left, top = rng.uniform(0, image.width - side), rng.uniform(0, image.height - side)
            crop = image.resize((config.crop_px,) * 2, 1, box=(left, top, left + side, top + side))
            pixels = np.asarray(crop)
            yield {"image": np.ascontiguousarray(pixels[:, ::-1] if rng.random() < 0.5 else pixels)}


def usable_images(shard: Shard) -> Iterator[tuple[str, Image.Image]]:
    """(key, image) of every sample that can be used; `ldm encode` is where none may be lost."""
    with suppress(BadSampleError):  # a torn archive: what lies before the damage is learned from
        for sample in read_samples(shard):
            with suppress(BadSampleError):
                yield sample.key, decode_image(sample.image or b"")


def crop_dataset(source: str, config: CropConfig, needed: int) -> "Dataset":
    """A stream of at least ``needed`` shuffled crops, as a lazy Ray Dataset (column ``image``)."""
    import ray

    shards = list_shards(source)
    per_pass = sum(_crops_expected(image, config) for shard in shards for _, image in usable_images(shard))
    rng = np.random.default_rng(config.seed)
    items = [
        {"shard": shards[i], "pass_index": p}
        for p in range(num_passes(per_pass, needed))
        for i in rng.permutation(len(shards))
    ]
    return ray.data.from_items(items, override_num_blocks=len(items)).flat_map(
        lambda item: crops(item["shard"], item["pass_index"], config)
    )


def num_passes(crops_per_pass: float, needed: int) -> int:
    """Passes that yield ``needed`` crops.

    Enough also where a picture gives a crop in some passes only: such counts spread no more than
    a Poisson variable's, of which four standard deviations are added.
    """
    return math.ceil((needed + 4 * math.sqrt(needed) + 16) / crops_per_pass)


def _crops_expected(image: Image.Image, config: CropConfig) -> float:
    return image.width * image.height / 1e6 * config.crops_per_megapixel
