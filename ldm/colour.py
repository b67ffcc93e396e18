"""Colours of a picture → sRGB, by its ICC profile where it has a usable one.

A profile that cannot be used (damaged, or of another kind than the pixels) is passed over, as
browsers do: the pixels are then taken for sRGB.
"""

import io
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms

__all__ = ["to_srgb"]

# The colour space in a profile's header → the mode of the pixels that it describes.
MODES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}
# The profiles of a corpus are few, and most pictures carry one of them.
CACHED_PROFILES = 64
# Most profiles are sRGB written down by someone: rounding alone would move their pixels.
ROUNDING_LEVELS = 1
PROBE_STEPS = 17


class _Conversion(NamedTuple):
    """From pixels of ``mode`` to sRGB; no ``transform`` where the two are the same."""

    mode: str
    transform: ImageCms.ImageCmsTransform | None


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Opaque image of mode L, RGB, CMYK or LAB → RGB, perceptual intent.

    Without a profile L, RGB and CMYK are converted as Pillow does (CMYK by subtraction).
    """
    if image.mode == "LAB":
        return _lab_to_srgb().apply(image)
    conversion = _conversion(profile) if profile else None
    if conversion is None or conversion.transform is None or not _describes(conversion.mode, image.mode):
        return image.convert("RGB")
    return conversion.transform.apply(image.convert(conversion.mode))


def _describes(profile_mode: str, image_mode: str) -> bool:
    # A grey picture with an RGB profile is one whose three channels are equal.
    return profile_mode == image_mode or (profile_mode, image_mode) == ("RGB", "L")


@lru_cache(maxsize=CACHED_PROFILES)
def _conversion(profile: bytes) -> _Conversion | None:
    """None where the profile cannot be used."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = MODES.get(source.profile.xcolor_space)
        if mode is None:
            return None
        srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
        transform = ImageCms.ImageCmsTransform(source, srgb, mode, "RGB")
    except (OSError, ValueError):
        return None
    return _Conversion(mode, None if mode != "CMYK" and _changes_nothing(transform, mode) else transform)


def _changes_nothing(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether no colour of a lattice moves by more than rounding does."""
    levels = np.linspace(0, 255, PROBE_STEPS).round().astype(np.uint8)
    axes = np.meshgrid(levels, levels, levels, indexing="ij")
    probe = Image.fromarray(np.stack(axes, axis=-1).reshape(1, -1, 3)).convert(mode)
    before, after = np.asarray(probe.convert("RGB"), np.int16), np.asarray(transform.apply(probe), np.int16)
    return bool(np.abs(after - before).max() <= ROUNDING_LEVELS)


@lru_cache(maxsize=1)
def _lab_to_srgb() -> ImageCms.ImageCmsTransform:
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
    return ImageCms.ImageCmsTransform(
        lab, ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")), "LAB", "RGB"
    )
