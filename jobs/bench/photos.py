"""Real photographs as input of a measurement: square JPEG crops in WebDataset tars."""

import io
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from jobs.demo import photo_paths
from ldm.images import decode_image
from pipelines.shards import Sample, write_tar

__all__ = ["crops", "squares", "write_shards"]

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


def squares(folder: Path | None, size_px: int) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """(name, uint8 (size, size, 3)) of photographs in ``folder``, or of the demo's: the middle, resized."""
    paths = photo_paths().values() if folder is None else sorted(p for p in folder.iterdir() if p.is_file())
    for path in paths:
        photo = decode_image(path.read_bytes())
        side = min(photo.size)
        left, top = ((length - side) // 2 for length in photo.size)
        box = (left, top, left + side, top + side)
        square = photo.resize((size_px, size_px), Image.Resampling.LANCZOS, box)
        yield path.stem, np.asarray(square)
