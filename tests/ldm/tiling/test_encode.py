"""Tiled encoding against one call of the VAE."""

import numpy as np
import pytest
import torch

from jobs.bench.random_vaes import random_kl, random_tiny
from ldm.autoencoder import Autoencoder
from ldm.images import padded
from ldm.tiling import exact
from ldm.tiling.chain import encoder_chain
from ldm.tiling.config import Tiling
from ldm.tiling.encode import encode
from ldm.tiling.grid import grid_of
from ldm.tiling.maps import BandedMap, Storage


def image(height: int, width: int) -> np.ndarray:
    """Noise on a strong gradient."""
    noise = np.random.default_rng(0).integers(0, 100, (height, width, 3))
    ramp = np.linspace(0, 155, width)[None, :, None]
    return (noise + ramp).astype(np.uint8)


def tiled(autoencoder: Autoencoder, x_3HW: torch.Tensor, tile: int) -> torch.Tensor:
    steps = encoder_chain(autoencoder.vae)
    size = (x_3HW.shape[1], x_3HW.shape[2])
    grid = grid_of(steps, size, (size[0] // autoencoder.f, size[1] // autoencoder.f), tile)
    with torch.inference_mode():
        rows = exact.run(steps, grid, BandedMap.whole(x_3HW, Storage()), Storage())
        return torch.cat([band.values_rWC for band in rows]).permute(2, 0, 1)


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("f", [4, 8, 16])
def test_exact_is_the_whole_encode(f: int, layers: int, attention: bool) -> None:
    autoencoder = random_kl(f, layers=layers, attention=attention)
    x_3HW = torch.from_numpy(image(11 * f, 14 * f)).permute(2, 0, 1).double() / 127.5 - 1
    with torch.inference_mode():
        wanted = autoencoder.vae._encode(x_3HW[None])[0]
    for tile in (3, 16):
        got = tiled(autoencoder, x_3HW, tile)
        assert (got - wanted).abs().max() / wanted.std() < 1e-10


def test_a_tiny_encoder() -> None:
    autoencoder = random_tiny()
    x_3HW = torch.from_numpy(image(44, 52)).permute(2, 0, 1).double() / 127.5 - 1
    with torch.inference_mode():
        wanted = autoencoder.vae.encode(x_3HW[None]).latents[0]
    assert (tiled(autoencoder, x_3HW, 4) - wanted).abs().max() / wanted.std() < 1e-10


@pytest.mark.parametrize("size", [(67, 93), (64, 96)])
def test_moments_of_any_size(size: tuple[int, int]) -> None:
    autoencoder = random_kl(8, torch.float32)
    whole, tiles = (encode(autoencoder, image(*size), Tiling(mode=m, tile=4)) for m in ("whole", "exact"))
    assert whole.mean_BChw.shape == (1, 4, -(-size[0] // 8), -(-size[1] // 8))
    for wanted, got in ((whole.mean_BChw, tiles.mean_BChw), (whole.std_BChw, tiles.std_BChw)):
        assert (got - wanted).abs().max() / wanted.std() < 1e-4


def test_fast_of_an_image_with_the_statistics_of_its_copy() -> None:
    """Blocks of 8 × 8 equal pixels look the same at half the size, but for how many of them there are."""
    autoencoder = random_kl(4, torch.float32)
    blocks = np.random.default_rng(1).integers(0, 255, (20, 24, 3)).astype(np.uint8)
    large = blocks.repeat(16, 0).repeat(16, 1)
    exact_moments, fast_moments = (
        encode(autoencoder, large, Tiling(mode=m, tile=8)) for m in ("exact", "fast")
    )
    wanted = exact_moments.mean_BChw
    assert (fast_moments.mean_BChw - wanted).abs().mean() / wanted.std() < 0.1


def test_padding_repeats_the_edge_and_is_cropped_back() -> None:
    small = image(5, 6)
    assert padded(small, 4).shape == (8, 8, 3)
    np.testing.assert_array_equal(padded(small, 4)[:5, :6], small)
    np.testing.assert_array_equal(padded(small, 4)[7, :6], small[4])
    np.testing.assert_array_equal(padded(small, 4)[:5, 7], small[:, 5])
