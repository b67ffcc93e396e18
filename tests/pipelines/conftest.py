"""Small VAEs with random weights, and images to encode with them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from ldm.images import encode_png


def save_random_vae(folder: Path, seed: int) -> Path:
    """An AutoencoderKL of 8 channels, f = 4, 3 latent channels, in diffusers' format."""
    from diffusers import AutoencoderKL

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 8, 8),
            latent_channels=3,
            norm_num_groups=4,
            mid_block_add_attention=False,
        )
    vae.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def vae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random VAE with f = 4."""
    return save_random_vae(tmp_path_factory.mktemp("vae"), seed=0)


@pytest.fixture(scope="session")
def other_vae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VAE of the same layout with other weights."""
    return save_random_vae(tmp_path_factory.mktemp("other_vae"), seed=1)


@pytest.fixture(scope="session")
def photo() -> Callable[[int], bytes]:
    """seed → a PNG of 40×32 pixels."""

    def make(seed: int) -> bytes:
        rng = np.random.default_rng(seed)
        return encode_png(rng.integers(0, 256, (32, 40, 3), dtype=np.uint8))

    return make
