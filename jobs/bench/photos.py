"""Real photographs as input of a measurement: square JPEG crops in WebDataset tars."""

import io
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from jobs.demo import photo_paths
from pipelines.shards import Sample, write_tar

__all__ = ["crops", "write_shards"]

JPEG_QUALITY = 92


def crops(size_px: int, seed: int = 0) -> Iterator[Sample]:
    """Endless random crops of the demo's photographs, keys ``000000`` …; the same for the same seed."""
    rng = np.random.default_rng(seed)
    photos = [Image.open(path).convert("RGB") for path in photo_paths().values()]
    index = 0
    while True:
        photo = photos[index % len(photos)]
        side = int(rng.integers(min(size_px, *photo.size), min(photo.size) + 1))
        left, top = (int(rng.integers(0, length - side + 1)) for length in photo.size)
        crop = photo.resize(
            (size_px, size_px), Image.Resampling.LANCZOS, (left, top, left + side, top + side)
        )
        buffer = io.BytesIO()
        crop.save(buffer, format="JPEG", quality=JPEG_QUALITY)
        yield Sample(f"{index:06d}", buffer.getvalue())
        index += 1


def write_shards(folder: Path, count: int, size_px: int, per_shard: int) -> Path:
    """``count`` crops in tars of ``per_shard``; returns the folder."""
    folder.mkdir(parents=True)
    stream = islice(crops(size_px), count)
    for number in range(-(-count // per_shard)):
        write_tar(folder / f"shard-{number:05d}.tar", islice(stream, per_shard))
    return folder
