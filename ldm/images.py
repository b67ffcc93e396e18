"""Images as data: hostile bytes → RGB pixels, and back to PNG. Imports no torch: decode workers start fast.

Images are uint8 (H, W, 3) arrays in sRGB.
"""

import io
import warnings
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from pydantic import BaseModel, ConfigDict, PositiveInt

from ldm.errors import BadSampleError

__all__ = ["Preprocess", "decode_image", "encode_png", "resize_short_side"]

Pixels = NDArray[np.uint8]

# Raster formats that Pillow decodes in process. It would run Ghostscript on an EPS.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
# From 3.0 on the result is close to full resampling, as Pillow documents it, and the reduction faster.
REDUCING_GAP = 3.0
# What Pillow's decoders raise on damaged bytes.
DAMAGE = (OSError, ValueError, SyntaxError, RuntimeError, EOFError)


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
        return np.asarray(central_square(image, self.size_px))


def decode_image(data: bytes, *, background: str = "white", max_pixels: int = 100_000_000) -> Image.Image:
    """Encoded bytes → an upright RGB image; transparency is laid over ``background``.

    BadSampleError with reason ``not_an_image``, ``too_many_pixels`` (checked before any pixel is
    decoded: a 10 kB PNG can hold 400 Mpx) or ``truncated_image``.
    """
    with warnings.catch_warnings():
        # Pillow warns of bombs and of odd metadata; the limit is ours and the metadata is not used.
        warnings.simplefilter("ignore")
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        except Image.DecompressionBombError as error:
            raise BadSampleError("too_many_pixels", type(error).__name__) from error
        except DAMAGE as error:
            raise BadSampleError("not_an_image", type(error).__name__) from error
        if image.width * image.height > max_pixels:
            raise BadSampleError("too_many_pixels", f"{image.width}×{image.height}, at most {max_pixels}")
        try:
            return _to_rgb(ImageOps.exif_transpose(image), background)
        except DAMAGE as error:
            raise BadSampleError("truncated_image", str(error)) from error


def _to_rgb(image: Image.Image, background: str) -> Image.Image:
    if image.mode.startswith("I"):
        # 16 bits per pixel, which Pillow would clip to 8 instead of scaling them.
        grey = np.asarray(image).clip(0, 65535).astype(np.uint32)
        return Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, background), rgba).convert("RGB")
    return image.convert("RGB")


def resize_short_side(image: Image.Image, size_px: int) -> Image.Image:
    """Antialiased resize so that the shorter side has ``size_px`` pixels."""
    scale = size_px / min(image.size)
    size = max(size_px, round(image.width * scale)), max(size_px, round(image.height * scale))
    if size == image.size:
        return image
    return image.resize(size, Image.Resampling.LANCZOS, reducing_gap=REDUCING_GAP)


def central_square(image: Image.Image, size_px: int) -> Image.Image:
    """The largest square in the middle, antialiased to ``size_px``² pixels.

    Only the square is resized: a whole image of 1×50,000,000 pixels would not fit any memory.
    """
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    return image.resize((size_px, size_px), Image.Resampling.LANCZOS, box, reducing_gap=REDUCING_GAP)


def encode_png(image_HW3: NDArray[np.uint8]) -> bytes:
    """uint8 (H, W, 3) → PNG."""
    buffer = io.BytesIO()
    Image.fromarray(image_HW3).save(buffer, format="PNG")
    return buffer.getvalue()
