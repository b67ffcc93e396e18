"""Images as data: hostile bytes → RGB pixels → model input, and back to PNG.

uint8 images are (H, W, 3) arrays in sRGB; model images are float (B, 3, H, W) in [-1, 1].
"""

import io
import warnings
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from pydantic import BaseModel, ConfigDict, PositiveInt
from torch import Tensor

from ldm.errors import BadSampleError

__all__ = ["Preprocess", "decode_image", "encode_png", "from_model", "resize_short_side", "to_model"]

Pixels = NDArray[np.uint8]


class Preprocess(BaseModel):
    """What happens between a decoded image and the VAE; recorded with every dataset."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size_px: PositiveInt = 256
    crop: Literal["center"] = "center"
    resize_filter: Literal["lanczos"] = "lanczos"
    background: Literal["white", "black"] = "white"
    max_pixels: PositiveInt = 100_000_000

    def __call__(self, data: bytes) -> Pixels:
        """Encoded image → (size_px, size_px, 3) uint8. BadSampleError where it cannot be used."""
        image = decode_image(data, background=self.background, max_pixels=self.max_pixels)
        return np.asarray(center_crop(resize_short_side(image, self.size_px), self.size_px))


def decode_image(data: bytes, *, background: str = "white", max_pixels: int = 100_000_000) -> Image.Image:
    """Encoded bytes → an upright RGB image; transparency is laid over ``background``.

    BadSampleError with reason ``not_an_image``, ``too_many_pixels`` (checked before any pixel is
    decoded: a 10 kB PNG can hold 400 Mpx) or ``truncated_image``.
    """
    with warnings.catch_warnings():
        # Pillow warns of bombs and of odd metadata; the limit is ours and the metadata is not used.
        warnings.simplefilter("ignore")
        try:
            image = Image.open(io.BytesIO(data))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            bomb = isinstance(error, Image.DecompressionBombError)
            raise BadSampleError(
                "too_many_pixels" if bomb else "not_an_image", type(error).__name__
            ) from error
        if image.width * image.height > max_pixels:
            raise BadSampleError("too_many_pixels", f"{image.width}×{image.height}, at most {max_pixels}")
        try:
            return _to_rgb(ImageOps.exif_transpose(image), background)
        except (OSError, ValueError, SyntaxError) as error:
            raise BadSampleError("truncated_image", str(error)) from error


def _to_rgb(image: Image.Image, background: str) -> Image.Image:
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, background), rgba).convert("RGB")
    return image.convert("RGB")


def resize_short_side(image: Image.Image, size_px: int) -> Image.Image:
    """Antialiased resize so that the shorter side has ``size_px`` pixels."""
    scale = size_px / min(image.size)
    size = max(size_px, round(image.width * scale)), max(size_px, round(image.height * scale))
    # reducing_gap trades a difference below one grey level for a several times faster reduction.
    return image if size == image.size else image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)


def center_crop(image: Image.Image, size_px: int) -> Image.Image:
    """The square of ``size_px`` pixels in the middle."""
    left, top = (image.width - size_px) // 2, (image.height - size_px) // 2
    return image.crop((left, top, left + size_px, top + size_px))


def to_model(images_BHW3: NDArray[np.uint8]) -> Tensor:
    """uint8 (B, H, W, 3) → float32 (B, 3, H, W) in [-1, 1], channels last in memory."""
    return (
        torch.from_numpy(np.ascontiguousarray(images_BHW3)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)
    )


def from_model(images_B3HW: Tensor) -> NDArray[np.uint8]:
    """float (B, 3, H, W) in [-1, 1] → uint8 (B, H, W, 3), rounded to nearest."""
    images = images_B3HW.float().clamp(-1, 1).add(1.0).mul(127.5).round().to(torch.uint8)
    return np.ascontiguousarray(images.permute(0, 2, 3, 1).cpu().numpy())


def encode_png(image_HW3: NDArray[np.uint8]) -> bytes:
    """uint8 (H, W, 3) → PNG."""
    buffer = io.BytesIO()
    Image.fromarray(image_HW3).save(buffer, format="PNG")
    return buffer.getvalue()
