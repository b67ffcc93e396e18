"""Ways to decode or encode one image: ours, and those to compare with."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ldm.autoencoder import Autoencoder
from ldm.tiling import exact
from ldm.tiling.chain import decoder_chain, encoder_chain
from ldm.tiling.grid import grid_of
from ldm.tiling.maps import BandedMap, Storage

__all__ = [
    "diffusers_tiling",
    "error",
    "exact_decode",
    "exact_encode",
    "psnr_db",
    "tile_statistics",
    "whole_decode",
    "whole_encode",
]

Way = Callable[[Autoencoder, Tensor, int], Tensor]
# As wide as the decoder of Stable Diffusion sees, in latents.
HALO = 18


@torch.inference_mode()
def whole_decode(autoencoder: Autoencoder, latent_Chw: Tensor, tile: int = 0) -> Tensor:
    """(3, H, W), not bounded, in the VAE's dtype."""
    image: Tensor = autoencoder.vae.decode(latent_Chw[None]).sample[0]
    return image


@torch.inference_mode()
def whole_encode(autoencoder: Autoencoder, image_3HW: Tensor, tile: int = 0) -> Tensor:
    """Mean and log variance (2C, h, w)."""
    encoded: Tensor = autoencoder.vae.encode(image_3HW[None]).latent_dist.parameters[0]
    return encoded


@torch.inference_mode()
def exact_decode(autoencoder: Autoencoder, latent_Chw: Tensor, tile: int) -> Tensor:
    """As `whole_decode`, by `ldm.tiling`."""
    steps, source = decoder_chain(autoencoder.vae), BandedMap.whole(latent_Chw, Storage())
    grid = grid_of(steps, source.size, source.size, tile)
    return _joined(exact.run(steps, grid, source, Storage()))


@torch.inference_mode()
def exact_encode(autoencoder: Autoencoder, image_3HW: Tensor, tile: int) -> Tensor:
    """As `whole_encode`, by `ldm.tiling`."""
    steps, source = encoder_chain(autoencoder.vae), BandedMap.whole(image_3HW, Storage())
    latent_size = (source.size[0] // autoencoder.f, source.size[1] // autoencoder.f)
    return _joined(exact.run(steps, grid_of(steps, source.size, latent_size, tile), source, Storage()))


def diffusers_tiling(autoencoder: Autoencoder, latent_Chw: Tensor, tile: int) -> Tensor:
    """The library's own tiles, blended over a quarter of their width."""
    with _tiling_of_diffusers(autoencoder, tile):
        return whole_decode(autoencoder, latent_Chw)


def tile_statistics(autoencoder: Autoencoder, latent_Chw: Tensor, tile: int) -> Tensor:
    """Every tile with the neighbours that convolutions see, but statistics and attention of its own."""
    _, height, width = latent_Chw.shape
    f, made = autoencoder.f, []
    for top in range(0, height, tile):
        row = []
        for left in range(0, width, tile):
            above, before = min(HALO, top), min(HALO, left)
            part = latent_Chw[:, top - above : top + tile + HALO, left - before : left + tile + HALO]
            decoded = whole_decode(autoencoder, part)
            rows, columns = min(tile, height - top), min(tile, width - left)
            row.append(decoded[:, above * f : (above + rows) * f, before * f : (before + columns) * f])
        made.append(torch.cat(row, dim=2))
    return torch.cat(made, dim=1)


def error(got: Tensor, wanted: Tensor) -> float:
    """Largest difference over the standard deviation of what is wanted."""
    return float((got - wanted).abs().max() / wanted.std())


def psnr_db(got: Tensor, wanted: Tensor) -> float:
    """Of images in [-1, 1]; both are bounded to it."""
    mse = (got.clamp(-1, 1) - wanted.clamp(-1, 1)).double().square().mean()
    return float(10 * torch.log10(4 / mse))


@contextmanager
def _tiling_of_diffusers(autoencoder: Autoencoder, tile: int) -> Iterator[None]:
    vae = autoencoder.vae
    vae.tile_latent_min_size, vae.tile_sample_min_size = tile, tile * autoencoder.f
    vae.enable_tiling()
    try:
        yield
    finally:
        vae.disable_tiling()


def _joined(bands: Iterator[exact.Rows]) -> Tensor:
    return torch.cat([band.values_rWC for band in bands]).permute(2, 0, 1)
