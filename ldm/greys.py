"""Greys of more than 8 bits → 8 bits, scaled and never clipped."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = ["grey_levels"]

BITS_PER_SAMPLE, SAMPLE_FORMAT = 258, 339  # tags of TIFF 6.0
UNSIGNED = 1


def grey_levels(image: Image.Image) -> Image.Image:
    """Image of mode I;16, I or F → mode L, black at 0 and white at the full scale.

    The full scale is that of the file's bits up to 16 (65,535; 4,095 of a 12-bit TIFF) and 1 for
    floats. Values of 32 bits have none that writers agree on: where one lies outside of 0 … 65,535
    (0 … 1 for floats), black and white are the least and the greatest of the image. NaN is black.
    """
    values = _values(image)
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    full = _full_scale(image)
    if low >= 0 and high <= full:
        low, high = 0.0, full
    share = (np.nan_to_num(values, nan=low, posinf=high, neginf=low) - low) / ((high - low) or 1.0)
    return Image.fromarray((share * 255 + 0.5).astype(np.uint8))


def _values(image: Image.Image) -> NDArray[np.float64]:
    pixels = np.asarray(image)
    if pixels.dtype == np.int32 and _tag(image, SAMPLE_FORMAT) == UNSIGNED:
        # Pillow reads both kinds of 32-bit integers as signed ones.
        pixels = pixels.view(np.uint32)
    return pixels.astype(np.float64)


def _full_scale(image: Image.Image) -> float:
    if image.mode == "F":
        return 1.0
    bits = _tag(image, BITS_PER_SAMPLE)
    return float(2**bits - 1) if bits is not None and 8 < bits < 16 else 65535.0


def _tag(image: Image.Image, number: int) -> int | None:
    """First value of a TIFF's tag; None in other formats."""
    tags = getattr(image, "tag_v2", None)
    value = tags.get(number) if tags is not None else None
    return int(value[0]) if value else None
