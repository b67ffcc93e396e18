"""The images of some shards as rows: preprocessed pixels, or why there are none.

An image is known by its shard and its position there: keys of two shards can be equal.
"""

import hashlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ldm.errors import BadSampleError
from ldm.preprocess import Preprocess
from pipelines.shards import Sample, Shard, list_shards, read_samples

if TYPE_CHECKING:
    from ray.data import Dataset

__all__ = [
    "ImageId",
    "Rejected",
    "image_rows",
    "pixel_digest",
    "rejected_of",
    "set_digest",
    "shards_with",
]

Row = dict[str, Any]


class ImageId(NamedTuple):
    """Name of the shard, and the sample's place in it from 0."""

    shard: str
    position: int

    @classmethod
    def of(cls, row: Row) -> "ImageId":
        return cls(str(row["shard"]), int(row["position"]))

    @classmethod
    def parse(cls, text: str) -> "ImageId":
        """The inverse of ``str``."""
        shard, _, position = text.rpartition("/")
        return cls(shard, int(position))

    def __str__(self) -> str:
        return f"{self.shard}/{self.position}"


class Rejected(NamedTuple):
    """An input that could not be read: a sample by its key, or a damaged archive by its file name."""

    shard: str
    key: str
    reason: str


def shards_with(source: str, only: Collection[ImageId] | None = None) -> list[Shard]:
    """The shards of an input, or those that images in ``only`` lie in. UserError as `list_shards`."""
    shards = list_shards(source)
    if only is None:
        return shards
    names = {image.shard for image in only}
    return [shard for shard in shards if shard.name in names]


def image_rows(
    shards: Sequence[Shard], preprocess: Preprocess, only: Collection[ImageId] | None = None
) -> "Dataset":
    """A row per sample, lazily: shard, position, key, pixels, digest, reason (empty where it is usable).

    pixels: uint8 (H, W, 3), the first of the preprocessing's sizes; only: leave out the others.
    """
    import ray

    items = [{"shard": shard} for shard in shards]
    return ray.data.from_items(items, override_num_blocks=max(len(items), 1)).flat_map(
        lambda item: _read(item["shard"], preprocess, only)
    )


def rejected_of(rows: Iterable[Row]) -> tuple[Rejected, ...]:
    """What could not be used, in the order of ``rows``."""
    return tuple(Rejected(row["shard"], row["key"], row["reason"]) for row in rows if row["reason"])


def pixel_digest(pixels_HW3: NDArray[np.uint8]) -> str:
    """sha256 of an image's shape and pixels."""
    digest = hashlib.sha256(str(pixels_HW3.shape).encode())
    digest.update(np.ascontiguousarray(pixels_HW3).tobytes())
    return digest.hexdigest()


def set_digest(digests: Sequence[str]) -> str:
    """sha256 of a set of images: the same in whatever order and shards they come."""
    return hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()


def _read(shard: Shard, preprocess: Preprocess, only: Collection[ImageId] | None) -> Iterator[Row]:
    position = 0
    try:
        for position, sample in enumerate(read_samples(shard)):
            image = ImageId(shard.name, position)
            if only is None or image in only:
                yield _row(image, sample, preprocess)
    except BadSampleError as damage:  # of the archive: the samples before it are whole
        file_name = shard.url.rsplit("/", 1)[-1]
        yield _rejected(ImageId(shard.name, position + 1), file_name, damage, preprocess)


def _row(image: ImageId, sample: Sample, preprocess: Preprocess) -> Row:
    try:
        pixels = preprocess.views(sample.image_bytes(), sample.key)[0]
    except BadSampleError as error:
        return _rejected(image, sample.key, error, preprocess)
    return {**_names(image, sample.key), "pixels": pixels, "digest": pixel_digest(pixels), "reason": ""}


def _rejected(image: ImageId, key: str, error: BadSampleError, preprocess: Preprocess) -> Row:
    # Ray Data wants the columns of all rows to be of one type.
    empty = np.zeros((*preprocess.shapes()[0], 3), np.uint8)
    return {**_names(image, key), "pixels": empty, "digest": "", "reason": str(error)}


def _names(image: ImageId, key: str) -> Row:
    return {"shard": image.shard, "position": image.position, "key": key}
