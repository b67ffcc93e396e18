"""Which image sizes fit a device, for Stable Diffusion 2.1's layout: fp16, one image, guidance.

Computed on the meta device, never run. The text encoder has done its work by then and is not counted.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ldm import autoencoder
from ldm.autoencoder import Autoencoder
from ldm.meta_cost import meta_cost, weight_bytes
from ldm.savings import denoiser, step_cost

__all__ = ["ALLOWANCE_BYTES", "FIT_SIZES_PX", "Fit", "SizePeak", "decode_bytes", "fits", "size_peaks"]

FIT_SIZES_PX = (512, 768, 1024, 1536, 2048, 3072, 4096)
# Context and workspaces of CUDA: an allowance, nothing that was measured.
ALLOWANCE_BYTES = 1_000_000_000
# Bytes of device memory → the side that is usually said to fit.
CLAIMED_PX: Mapping[int, int] = {8_000_000_000: 1024, 24_000_000_000: 2048}
GUIDED_BATCH = 2
# Of fp16. First overlapping tiles (one advances by three quarters of its side), their rows and the picture;
# at the end the picture, and twice in fp32.
PICTURES_OF_TILES = 5


@dataclass(frozen=True)
class SizePeak:
    """Bytes at most for a picture of side ``size_px``: both networks' weights, and activations of each."""

    size_px: int
    weight_bytes: int
    denoise_bytes: int
    decode_bytes: int
    tiled_decode_bytes: int

    def needs(self, *, tiled: bool) -> int:
        """Denoising and decoding come one after the other."""
        decode = self.tiled_decode_bytes if tiled else self.decode_bytes
        return self.weight_bytes + max(self.denoise_bytes, decode) + ALLOWANCE_BYTES


@dataclass(frozen=True)
class Fit:
    """The largest side that was found to fit a device, beside what is usually said to."""

    device_bytes: int
    claimed_px: int
    tiled: bool
    largest_px: int


def size_peaks(sizes_px: Sequence[int] = FIT_SIZES_PX) -> list[SizePeak]:
    """Of sizes that are multiples of 64."""
    with torch.device("meta"):
        vae = Autoencoder(nn.Module.to(autoencoder.build("sd"), dtype=torch.float16))
    unet = denoiser("sd21", vae.channels, torch.float16)
    weights = weight_bytes(unet) + weight_bytes(vae.vae)

    def peak(size_px: int) -> SizePeak:
        side = size_px // vae.f
        denoise = step_cost(unet, (vae.channels, side, side), GUIDED_BATCH).activation_bytes
        return SizePeak(size_px, weights, denoise, decode_bytes(vae, side), tiled_decode_bytes(vae, side))

    return [peak(size_px) for size_px in sizes_px]


def decode_bytes(vae: Autoencoder, side: int) -> int:
    """Activations of decoding one latent of ``side`` rows and columns, by a VAE on the meta device."""
    return meta_cost(
        lambda: vae.decode(torch.empty(1, vae.channels, side, side, dtype=vae.vae.dtype))
    ).activation_bytes


def tiled_decode_bytes(vae: Autoencoder, side: int) -> int:
    """An upper bound of the same with diffusers' ``enable_tiling``: one tile, and pictures of all tiles."""
    tile = int(vae.vae.tile_latent_min_size)
    if side <= tile:
        return decode_bytes(vae, side)
    picture = 3 * (side * vae.f) ** 2 * torch.float16.itemsize
    return decode_bytes(vae, tile) + PICTURES_OF_TILES * picture


def fits(peaks: Sequence[SizePeak]) -> Iterator[Fit]:
    """For every claim and way of decoding the largest of the sizes that fits, 0 where none does."""
    for device_bytes, claimed_px in CLAIMED_PX.items():
        for tiled in (False, True):
            sizes = [peak.size_px for peak in peaks if peak.needs(tiled=tiled) <= device_bytes]
            yield Fit(device_bytes, claimed_px, tiled, max(sizes, default=0))
