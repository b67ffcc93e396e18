"""How far exact tiling is from one call of the VAE, over layouts, sizes, tiles and precisions."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from jobs.bench.photos import squares
from jobs.bench.random_vaes import latent, random_kl
from jobs.bench.tiling_ways import (
    diffusers_tiling,
    error,
    exact_decode,
    exact_encode,
    tile_statistics,
    whole_decode,
    whole_encode,
)
from ldm.autoencoder import Autoencoder, default_names, load
from ldm.image_tensors import to_model

__all__ = ["Case", "cases", "measure", "with_its_layout"]

PRECISIONS = (torch.float64, torch.float32)
# Latents, and the side of a tile.
ODD, ODD_TILE = (67, 93), 64
WIDE_PX, WIDE_TILE = (320, 512), 16
LARGE_PX, LARGE_TILE = (1024, 1024), 32


class Case(NamedTuple):
    """A VAE of a layout, and what it decodes and encodes, in one precision."""

    name: str
    autoencoder: Autoencoder
    latent_Chw: Tensor
    image_3HW: Tensor
    tile: int


def cases(quick: bool = False) -> Iterator[Case]:
    """Random weights on latents with a strong gradient, trained ones on a photograph. quick: a few small."""
    for f in (8,) if quick else (4, 8, 16):
        for layers in (1, 2):
            for attention in (False, True):
                for dtype in PRECISIONS:
                    yield from _random(f, layers, attention, dtype, quick)
    for name in default_names():
        for dtype in PRECISIONS:
            yield _trained(name, dtype, 256 if quick else 1024)


def measure(case: Case) -> dict[str, float]:
    """Largest error over the standard deviation: of ours, decoded and encoded, and of others, decoded."""
    wanted = whole_decode(case.autoencoder, case.latent_Chw)
    encoded = whole_encode(case.autoencoder, case.image_3HW)
    return {
        "decode": error(exact_decode(case.autoencoder, case.latent_Chw, case.tile), wanted),
        "encode": error(exact_encode(case.autoencoder, case.image_3HW, case.tile), encoded),
        "diffusers": error(diffusers_tiling(case.autoencoder, case.latent_Chw, case.tile), wanted),
        "tile_statistics": error(tile_statistics(case.autoencoder, case.latent_Chw, case.tile), wanted),
    }


def with_its_layout(size_px: int = 1024) -> dict[str, float]:
    """One call of the f8 VAE in fp32 against fp64, its maps with channels first and last in memory.

    torch's GroupNorm for the latter sums in single precision, so that it is the less exact one.
    """
    truth = _trained("f8", torch.float64, size_px)
    wanted = whole_decode(truth.autoencoder, truth.latent_Chw)
    found = {}
    for name, channels_last in (("channels_first", False), ("channels_last", True)):
        autoencoder = load("f8").to("cpu", channels_last=channels_last)
        found[name] = error(whole_decode(autoencoder, truth.latent_Chw.float()), wanted)
    return found


def _random(f: int, layers: int, attention: bool, dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    autoencoder = random_kl(f, dtype, layers=layers, attention=attention)
    sizes = [((WIDE_PX[0] // f, WIDE_PX[1] // f), WIDE_TILE)]
    if not quick:
        sizes.append((ODD, ODD_TILE))
        # At f = 4 there would be 65,536 positions that attend to each other.
        if layers == 1 and not (f == 4 and attention):
            sizes.append(((LARGE_PX[0] // f, LARGE_PX[1] // f), LARGE_TILE))
    for (height, width), tile in sizes:
        name = f"f{f}, {layers} layers{', attention' * attention}, {height}×{width}"
        image = latent(height * f, width * f, dtype)[:3] / 4
        yield Case(name, autoencoder, latent(height, width, dtype), image, tile)


def _trained(name: str, dtype: torch.dtype, size_px: int) -> Case:
    """A default VAE with a photograph and its encoding."""
    autoencoder = load(name).to("cpu", dtype, channels_last=False)
    _, photo_HW3 = next(squares(None, size_px))
    image_3HW = to_model(photo_HW3[None])[0].to(dtype)
    latent_Chw = whole_encode(autoencoder, image_3HW)[: autoencoder.channels]
    return Case(f"{name}, photograph of {size_px} px", autoencoder, latent_Chw, image_3HW, LARGE_TILE)
