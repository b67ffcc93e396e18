"""Pixels to files of the formats that a client may ask for."""

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ldm.images import encode_png
from pipelines.serve.job_record import ContentType
from pipelines.serve.messages import ImageFormat

__all__ = ["CONTENT_TYPES", "encode_image", "reencode"]

CONTENT_TYPES: dict[ImageFormat, ContentType] = {
    "png": "image/png",
    "jpeg": "image/jpeg",
    "webp": "image/webp",
}


def encode_image(image_HW3: NDArray[np.uint8], kind: ImageFormat, quality: int) -> bytes:
    """uint8 (H, W, 3) → a file; quality: 0 to 100, of jpeg and webp."""
    if kind == "png":
        return encode_png(image_HW3)
    buffer = io.BytesIO()
    Image.fromarray(image_HW3).save(buffer, kind, quality=quality)
    return buffer.getvalue()


def reencode(png: Path, kind: ImageFormat, quality: int) -> Path:
    """A PNG file as one of another format, beside it."""
    if kind == "png":
        return png
    import pyvips

    path = png.with_suffix(f".{kind}")
    # Row by row: the image may be larger than memory.
    pyvips.Image.new_from_file(str(png), access="sequential").write_to_file(str(path), Q=quality)
    return path
