"""Images as data: hostile bytes → upright RGB pixels, and back to PNG.

Images are uint8 (H, W, 3) arrays in sRGB. Imports no torch: decode workers start fast.
"""

import io
import re
import struct
import threading
import warnings
import zlib
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, features

from ldm.colour import to_srgb
from ldm.errors import BadSampleError
from ldm.greys import grey_levels

__all__ = [
    "DAMAGE",
    "MAX_PIXELS",
    "REDUCING_GAP",
    "decode_image",
    "encode_png",
    "open_image",
    "resize_short_side",
    "upright_rgb",
]

# Raster formats that Pillow decodes in process. It would run Ghostscript on an EPS.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
# 8192²: what a decode worker may hold, 268 MB at Pillow's four bytes a pixel.
MAX_PIXELS = 2**26
# From 3.0 on the result is close to full resampling, as Pillow documents it, and the reduction faster.
REDUCING_GAP = 3.0
# What Pillow's readers raise on damaged bytes.
DAMAGE = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)
# Formats that a build of Pillow may lack, by the bytes with which they start.
OPTIONAL_CODECS = {
    "avif": re.compile(rb".{4}ftypavi[fs]", re.DOTALL),
    "jpg_2000": re.compile(rb"\xff\x4f\xff\x51|\x00\x00\x00\x0cjP  "),
    "webp": re.compile(rb"RIFF.{4}WEBP", re.DOTALL),
}
GREYS = ("1", "L", "LA", "La")
PILLOW_LIMIT = threading.Lock()
PILLOW_MODULES = r"PIL\."
REMARKS_OF_PILLOW = ("ignore", None, Warning, re.compile(PILLOW_MODULES), 0)


def decode_image(data: bytes, *, background: str = "white", max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Encoded bytes → an upright RGB image in sRGB; transparency is laid over ``background``.

    The first frame of an animation, the first page of a document. BadSampleError as `open_image`
    and `upright_rgb` raise it.
    """
    return upright_rgb(open_image(data, max_pixels=max_pixels), background)


def open_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Encoded bytes → an image whose header alone has been read.

    BadSampleError ``not_an_image``; ``codec_missing``, where this build of Pillow cannot read the
    format; ``too_many_pixels`` (known from the header: a 10 kB PNG can hold 400 Mpx).
    """
    _prepare_pillow(max_pixels)
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise BadSampleError("too_many_pixels", type(error).__name__) from error
    except DAMAGE as error:
        _require_codec(data)
        raise BadSampleError("not_an_image", type(error).__name__) from error
    if image.width * image.height > max_pixels:
        raise BadSampleError("too_many_pixels", f"{image.width}×{image.height}, at most {max_pixels}")
    return image


def upright_rgb(image: Image.Image, background: str = "white") -> Image.Image:
    """An image as `open_image` gave it → an upright RGB image in sRGB. Decodes its pixels.

    BadSampleError ``truncated_image`` where they are damaged, ``too_many_pixels`` where a frame
    turns out larger than the header said.
    """
    try:
        image.load()
        _turn_upright(image)
        return _to_rgb(image, background)
    except Image.DecompressionBombError as error:
        raise BadSampleError("too_many_pixels", type(error).__name__) from error
    except DAMAGE as error:
        raise BadSampleError("truncated_image", str(error)) from error


def _turn_upright(image: Image.Image) -> None:
    # A damaged EXIF block says nothing, and the pixels are whole.
    with suppress(*DAMAGE):
        ImageOps.exif_transpose(image, in_place=True)


def _to_rgb(image: Image.Image, background: str) -> Image.Image:
    if image.mode[0] in "IF":
        return grey_levels(image).convert("RGB")
    profile = image.info.get("icc_profile")
    if not image.has_transparency_data:
        return to_srgb(_opaque(image), profile)
    rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    rgb = to_srgb(rgba.convert("L" if image.mode in GREYS else "RGB"), profile)
    rgb.putalpha(rgba.getchannel("A"))
    return Image.alpha_composite(Image.new("RGBA", rgb.size, background), rgb).convert("RGB")


def _opaque(image: Image.Image) -> Image.Image:
    """The same picture in one of the modes that `to_srgb` takes."""
    if image.mode in GREYS:
        return image.convert("L")
    return image if image.mode in ("RGB", "CMYK", "LAB") else image.convert("RGB")


def _prepare_pillow(max_pixels: int) -> None:
    """Make Pillow accept ``max_pixels``, and keep its remarks to itself.

    Both settings are the process's, and other threads decode meanwhile: so neither is ever taken
    back. Pillow refuses above twice its limit, which is only raised.
    """
    with PILLOW_LIMIT:
        if Image.MAX_IMAGE_PIXELS is not None and max_pixels > 2 * Image.MAX_IMAGE_PIXELS:
            Image.MAX_IMAGE_PIXELS = -(-max_pixels // 2)
        # It warns of bombs, and of odd metadata that is not used; first in the list, or another
        # filter may turn a warning into an error.
        if list(warnings.filters[:1]) != [REMARKS_OF_PILLOW]:
            warnings.filterwarnings("ignore", module=PILLOW_MODULES)


def _require_codec(data: bytes) -> None:
    for codec, start in OPTIONAL_CODECS.items():
        if start.match(data) and not features.check(codec):
            raise BadSampleError("codec_missing", f"this build of Pillow has no {codec}")


def resize_short_side(image: Image.Image, size_px: int) -> Image.Image:
    """Antialiased resize so that the shorter side has ``size_px`` pixels."""
    scale = size_px / min(image.size)
    size = max(size_px, round(image.width * scale)), max(size_px, round(image.height * scale))
    if size == image.size:
        return image
    return image.resize(size, Image.Resampling.LANCZOS, reducing_gap=REDUCING_GAP)


def padded(image: NDArray[np.uint8], multiple_px: int) -> NDArray[np.uint8]:
    """(H, W, …) with its last row and column repeated until both sides are multiples."""
    extra = [(0, -side % multiple_px) for side in image.shape[:2]]
    return np.pad(image, extra + [(0, 0)] * (image.ndim - 2), mode="edge")


def encode_png(image_HW3: NDArray[np.uint8]) -> bytes:
    """uint8 (H, W, 3) → PNG."""
    buffer = io.BytesIO()
    Image.fromarray(image_HW3).save(buffer, format="PNG")
    return buffer.getvalue()
