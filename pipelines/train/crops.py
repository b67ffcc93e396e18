"""Random crops of image shards, for VAE training: which ones a pass over the input makes."""

from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

from ldm.errors import BadSampleError
from ldm.images import decode_image
from ldm.seeds import keyed_seed
from pipelines.shards import Shard, read_samples

__all__ = ["CropConfig", "CropRate", "crop_rate", "crops", "crops_before", "usable_images"]


class CropConfig(BaseModel):
    """Which crops to take. One pass over the input makes ``crops_per_megapixel`` of each image."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    crop_px: PositiveInt = 64
    zoom_max: PositiveFloat = Field(
        2.0, ge=1, description="a crop shows 1 to this many times crop_px, reduced"
    )
    crops_per_megapixel: PositiveFloat = 30.0
    seed: int = 0


class CropRate(NamedTuple):
    """How many crops an image gives: ``per_pass``, any fraction, and where in it the first pass begins."""

    per_pass: float
    phase: float


def crop_rate(shard: Shard, key: str, image: Image.Image, config: CropConfig) -> CropRate:
    """Of the image's area; the phase is uniform in [0, 1), so small pictures do not all come in one pass."""
    phase = np.random.default_rng(keyed_seed("phase", config.seed, shard.name, key)).random()
    return CropRate(image.width * image.height / 1e6 * config.crops_per_megapixel, phase)


def crops_before(pass_index: int, per_pass: Any, phase: Any) -> Any:
    """Crops of an image, or of an array of images, in all passes before ``pass_index``: a whole float."""
    return np.floor(per_pass * pass_index + phase)


def crops(shard: Shard, pass_index: int, config: CropConfig) -> Iterator[dict[str, Any]]:
    """Random crops (crop_px, crop_px, 3) uint8 of every image of a shard, seeded by (seed, pass, key)."""
    for key, image in usable_images(shard):
        rate = crop_rate(shard, key, image, config)
        rng = np.random.default_rng(keyed_seed(config.seed, pass_index, shard.name, key))
        for _ in range(int(crops_before(pass_index + 1, *rate) - crops_before(pass_index, *rate))):
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
