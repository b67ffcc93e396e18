"""What happens between an encoded image and the VAE: filters, crop, resize, several sizes from one decode.

The crop is a box in the upright picture, and one antialiased resize brings the box to its shape:
nothing outside of the box is computed.
"""

from contextlib import suppress
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, model_validator

from ldm.aspect_buckets import AspectBuckets, Shape
from ldm.errors import BadSampleError
from ldm.images import DAMAGE, MAX_PIXELS, REDUCING_GAP, open_image, upright_rgb
from ldm.seeds import keyed_seed

__all__ = ["Preprocess"]

Pixels = NDArray[np.uint8]
Box = tuple[float, float, float, float]  # left, top, right, bottom
Position = tuple[float, float]  # share of the room (vertical, horizontal), 0 ≤ share < 1
# A JPEG is decoded at 1/2, 1/4 or 1/8 while its pixels stay this many times as dense as the largest
# view's. On 14 photographs of 2 to 24 Mpx, at 64 and 256 px, the views then agree with those of a full
# decode to 49 dB or better; at 2 times the worst were at 43 dB.
DRAFT_GAP = 3


class Preprocess(BaseModel):
    """How images become the VAE's pixels; recorded with every dataset."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sizes_px: tuple[PositiveInt, ...] = Field(
        (256,), min_length=1, description="size of the pixels; several, as 256,512, for pairs of resolutions"
    )
    crop: Literal["center", "random", "none"] = Field("center", description="which part of a picture is kept")
    seed: int = Field(0, description="of the random crop, together with the sample's key")
    buckets: AspectBuckets | None = Field(None, description="shapes near the picture's own, not squares")
    multiple_px: PositiveInt = Field(64, description="crop none: what the sides are multiples of")
    resize_filter: Literal["lanczos"] = "lanczos"
    background: Literal["white", "black"] = Field("white", description="what shows through transparency")
    max_pixels: PositiveInt = Field(MAX_PIXELS, description="larger images are refused before decoding")
    min_side_px: NonNegativeInt = Field(0, description="images with a shorter side are refused")
    max_aspect: float | None = Field(None, ge=1, allow_inf_nan=False, description="longer ÷ shorter side")
    jpeg_draft: bool = Field(True, description="decode large JPEGs at 1/2, 1/4 or 1/8 of the size")

    @model_validator(mode="after")
    def _check_sizes(self) -> "Preprocess":
        smallest = min(self.sizes_px)
        if len(set(self.sizes_px)) < len(self.sizes_px):
            raise ValueError("sizes_px names a size twice")
        if (self.buckets or self.crop == "none") and any(size % smallest for size in self.sizes_px):
            raise ValueError(
                f"with buckets or crop none every size must be a multiple of the smallest, {smallest}: "
                "the views of a picture would differ in aspect"
            )
        return self

    @model_validator(mode="after")
    def _check_shapes(self) -> "Preprocess":
        smallest = min(self.sizes_px)
        if self.buckets and self.crop == "none":
            raise ValueError("buckets need a crop, center or random: few pictures have a bucket's aspect")
        if self.buckets and not self.buckets.shapes(smallest):
            raise ValueError(f"no bucket fits size {smallest}; make buckets.step_px smaller")
        if not self.buckets and self.crop == "none" and smallest % self.multiple_px:
            raise ValueError(f"crop none: size {smallest} is no multiple of multiple_px, {self.multiple_px}")
        return self

    def views(self, data: bytes, key: str) -> list[Pixels]:
        """Encoded image → one uint8 (H, W, 3) for each of ``sizes_px``, in their order, from one decode.

        All show the same part of the picture. A random crop depends on ``seed`` and ``key`` alone.
        BadSampleError as `ldm.images` raises it; ``too_small`` and ``extreme_aspect`` by the limits
        of this config, and ``extreme_aspect`` where an uncropped view would exceed ``max_pixels``.
        """
        image = open_image(data, max_pixels=self.max_pixels)
        self._filter(image.width, image.height)
        rgb, (width, height), reduction = self._decode(image)
        position = self._position(key)
        views = []
        for shape in self._view_shapes(height, width):
            left, top, right, bottom = _cover_box(height, width, shape, position)
            box = left / reduction, top / reduction, right / reduction, bottom / reduction
            view = rgb.resize(shape[::-1], Image.Resampling.LANCZOS, box, reducing_gap=REDUCING_GAP)
            views.append(np.asarray(view))
        return views

    def shapes(self) -> list[Shape]:
        """Every (height, width) that a view can have, sorted.

        Of crop none without buckets, whose shapes have no bound, the square of ``multiple_px`` alone:
        what divides it divides every side.
        """
        if self.buckets:
            smallest = min(self.sizes_px)
            shapes = self.buckets.shapes(smallest)
            return sorted({_times(shape, size // smallest) for size in self.sizes_px for shape in shapes})
        if self.crop == "none":
            return [(self.multiple_px, self.multiple_px)]
        return sorted((size, size) for size in self.sizes_px)

    def _filter(self, width: int, height: int) -> None:
        short, long = sorted((width, height))
        if short < self.min_side_px:
            raise BadSampleError("too_small", f"{width}×{height}, sides of at least {self.min_side_px}")
        if self.max_aspect is not None and long > self.max_aspect * short:
            raise BadSampleError("extreme_aspect", f"{width}×{height}, aspect of at most {self.max_aspect:g}")
        if self.crop == "none":
            view_height, view_width = max(self._view_shapes(height, width))
            if view_height * view_width > max(self.max_pixels, max(self.sizes_px) ** 2):
                detail = f"{width}×{height} would become {view_width}×{view_height}"
                raise BadSampleError("extreme_aspect", detail)

    def _view_shapes(self, height: int, width: int) -> list[Shape]:
        """The shape of every view of a picture."""
        smallest = min(self.sizes_px)
        if self.buckets:
            shape = self.buckets.nearest(height, width, smallest)
        elif self.crop == "none":
            shape = _uncropped(height, width, smallest, self.multiple_px)
        else:
            return [(size, size) for size in self.sizes_px]
        return [_times(shape, size // smallest) for size in self.sizes_px]

    def _decode(self, image: Image.Image) -> tuple[Image.Image, tuple[int, int], int]:
        """Pixels, the upright (width, height) at full size, and by how much the pixels are reduced."""
        header_size, is_turned = image.size, _is_turned(image)
        reduction = self._draft(image, is_turned)
        rgb = upright_rgb(image, self.background)
        if reduction > 1 and not is_turned:
            # The last pixel of a side may stand for less than a whole one: only the header knows.
            return rgb, header_size, reduction
        return rgb, (rgb.width * reduction, rgb.height * reduction), reduction

    def _draft(self, image: Image.Image, is_turned: bool) -> int:
        """Have a JPEG decoded at 1/2, 1/4 or 1/8 of its sides; returns the divisor, 1 where it is not.

        The views are then computed from pixels at least `DRAFT_GAP` times as dense as theirs.
        """
        if image.format not in ("JPEG", "MPO") or not self.jpeg_draft:
            return 1
        short, long = sorted(image.size)
        view_short, view_long = sorted(max(self._view_shapes(image.height, image.width)))
        for divisor in (8, 4, 2):
            is_dense = min(short // view_short, long // view_long) >= DRAFT_GAP * divisor
            # A turned picture may begin with what was the last pixel of a side: it must be a whole one.
            is_whole = not is_turned or not (short % divisor or long % divisor)
            if is_dense and is_whole:
                image.draft(None, (image.width // divisor, image.height // divisor))
                return divisor
        return 1

    def _position(self, key: str) -> Position | None:
        """Where a random crop lies in its room, the same at every size; None for the middle."""
        if self.crop != "random":
            return None
        rng = np.random.Generator(np.random.Philox(keyed_seed("crop", self.seed, key)))
        return float(rng.random()), float(rng.random())


def _is_turned(image: Image.Image) -> bool:
    with suppress(*DAMAGE):
        return bool(image.getexif().get(ExifTags.Base.Orientation, 1) != 1)
    return False


def _uncropped(height: int, width: int, size_px: int, multiple_px: int) -> Shape:
    """Short side ``size_px``; the long one in proportion, cut down to a multiple of ``multiple_px``."""
    short, long = sorted((height, width))
    cut = round(long * size_px / short) // multiple_px * multiple_px
    return (cut, size_px) if height > width else (size_px, cut)


def _cover_box(height: int, width: int, shape: Shape, position: Position | None) -> Box:
    """The largest box of the shape's aspect in a picture, its corner on a whole pixel."""
    view_height, view_width = shape
    if width * view_height <= height * view_width:
        box_width, box_height = float(width), width * view_height / view_width
    else:
        box_width, box_height = height * view_width / view_height, float(height)
    rows, columns = int(height - box_height), int(width - box_width)
    if position is None:
        top, left = rows // 2, columns // 2
    else:
        top, left = int(position[0] * (rows + 1)), int(position[1] * (columns + 1))
    return left, top, left + box_width, top + box_height


def _times(shape: Shape, factor: int) -> Shape:
    return shape[0] * factor, shape[1] * factor
