"""Images of any size to posterior moments, band by band."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm.autoencoder import Autoencoder
from ldm.image_tensors import to_model
from ldm.images import padded
from ldm.latents import Moments
from ldm.tiling import exact, fast
from ldm.tiling.chain import Step, encoder_chain, sizes
from ldm.tiling.config import Tiling
from ldm.tiling.exact import BandRunner, Rows
from ldm.tiling.grid import grid_of
from ldm.tiling.maps import BandedMap, ImageMap, Storage
from ldm.tiling.statistics import ChannelMoments

__all__ = ["encode"]


@torch.inference_mode()
def encode(autoencoder: Autoencoder, image_HW3: NDArray[np.uint8], tiling: Tiling) -> Moments:
    """Moments (1, C, ⌈H/f⌉, ⌈W/f⌉), float32 on the CPU, of the image, `ldm.images.padded` to multiples of f.

    image_HW3: uint8; a memory map will do. To get back the image's own size, crop what the moments decode to.
    UserError, before anything is computed, for a VAE that cannot be tiled, and where there is no room.
    """
    image_HW3 = padded(image_HW3, autoencoder.f)
    if tiling.mode == "whole":
        moments = autoencoder.encode(to_model(image_HW3[None]))
        return Moments(moments.mean_BChw.cpu(), moments.std_BChw.cpu())
    steps, source = encoder_chain(autoencoder.vae), ImageMap(image_HW3)
    storage = Storage(tiling.spill)
    rows = (_exact if tiling.mode == "exact" else _fast)(steps, source, autoencoder.f, storage, tiling)
    values_hwC = torch.cat([band.values_rWC for band in rows])
    return autoencoder.moments_of(values_hwC.permute(2, 0, 1)[None])


def _exact(
    steps: Sequence[Step], source: ImageMap, f: int, storage: Storage, tiling: Tiling
) -> Iterator[Rows]:
    grid = grid_of(steps, source.size, _latent_size(source, f), tiling.tile)
    storage.require(exact.needed_bytes(steps, grid, source.size))
    return exact.run(steps, grid, source, storage)


def _fast(
    steps: Sequence[Step], source: ImageMap, f: int, storage: Storage, tiling: Tiling
) -> Iterator[Rows]:
    latent_size = _latent_size(source, f)
    num_wide = sizes(steps, source.size).index(latent_size)
    wide, narrow = steps[:num_wide], steps[num_wide:]
    grid = grid_of(steps, source.size, latent_size, tiling.tile)
    storage.require(exact.needed_bytes(narrow, grid, latent_size))
    small = {} if all(step.norm is None for step in wide) else _small_moments(wide, source, f, tiling)
    found, moments = BandedMap(wide[-1].out_channels, latent_size), []
    for rows in fast.sweep(wide, grid, source, small, range(grid.num_bands), storage):
        found.put(*rows)
        moments.append(ChannelMoments.of(rows.values_rWC.permute(2, 0, 1)[None]))
    return exact.run(narrow, grid, found, storage, moments)


def _small_moments(wide: Sequence[Step], source: ImageMap, f: int, tiling: Tiling) -> fast.MomentsByStep:
    factor = fast.pooling_factor(_latent_size(source, f), tiling.coarse)
    small = BandedMap.whole(_pooled(source.image_HW3, factor, f), Storage())
    latent_size = (small.size[0] // f, small.size[1] // f)
    grid = grid_of(wide, small.size, latent_size, tiling.tile)
    return fast.small_moments(wide, BandRunner(wide, grid, small, range(grid.num_bands), Storage()))


def _pooled(image_HW3: NDArray[np.uint8], factor: int, f: int) -> Tensor:
    """Mean over ``factor`` × ``factor`` pixels, (3, H', W') in multiples of f; the rest is left out."""
    height, width = (side // (factor * f) * f for side in image_HW3.shape[:2])
    small = np.empty((height, width, 3), np.float32)
    for row in range(height):
        block = image_HW3[row * factor : (row + 1) * factor, : width * factor]
        small[row] = block.reshape(factor, width, factor, 3).mean((0, 2), dtype=np.float32)
    return torch.from_numpy(small / 127.5 - 1).permute(2, 0, 1)


def _latent_size(source: ImageMap, f: int) -> tuple[int, int]:
    return source.size[0] // f, source.size[1] // f
