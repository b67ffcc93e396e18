"""Small AutoencoderKLs of every layout, with random weights that are not near the identity."""

from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import nn

from ldm.autoencoder import Autoencoder

WIDTHS = {4: (8, 8, 16), 8: (8, 8, 8, 16), 16: (8, 8, 8, 8, 16)}


def random_kl(
    f: int, dtype: torch.dtype = torch.float64, *, layers: int = 1, attention: bool = False, **options: Any
) -> Autoencoder:
    """Random weights, biases and norms included."""
    blocks = len(WIDTHS[f])
    with torch.random.fork_rng():
        torch.manual_seed(f + layers)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * blocks,
            up_block_types=("UpDecoderBlock2D",) * blocks,
            block_out_channels=WIDTHS[f],
            layers_per_block=layers,
            latent_channels=4,
            norm_num_groups=4,
            mid_block_add_attention=attention,
            **options,
        )
        return _shaken(vae, dtype)


def random_tiny(dtype: torch.dtype = torch.float64) -> Autoencoder:
    """f = 4."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tiny = AutoencoderTiny(
            encoder_block_out_channels=(8, 8, 8),
            decoder_block_out_channels=(8, 8, 8),
            num_encoder_blocks=(1, 2, 1),
            num_decoder_blocks=(1, 2, 1),
        )
        return _shaken(tiny, dtype)


def _shaken(vae: nn.Module, dtype: torch.dtype) -> Autoencoder:
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    autoencoder = Autoencoder(vae)
    return autoencoder.to("cpu", dtype, channels_last=False)


def latent(height: int, width: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """(4, h, w) with a strong gradient from left to right, which tiles do not see."""
    noise = torch.randn((4, height, width), generator=torch.Generator().manual_seed(0), dtype=dtype)
    return noise + torch.linspace(-4, 4, width, dtype=dtype)
