"""Seconds of the ways to decode one latent, in turns."""

from collections.abc import Callable

import torch
from torch import Tensor

from jobs.bench.rounds import median_seconds
from jobs.bench.tiling_ways import diffusers_tiling, whole_decode
from ldm.autoencoder import load
from ldm.tiling.config import Tiling
from ldm.tiling.decode import decode

__all__ = ["measure"]


def measure(size_px: int, tile: int, rounds: int, threads: int) -> dict[str, float]:
    """Medians of ``rounds``; each round runs whole, exact, fast and diffusers, every other one backwards."""
    torch.set_num_threads(threads)
    autoencoder = load("f8").to("cpu")
    latent_Chw = torch.randn(4, size_px // 8, size_px // 8, generator=torch.Generator().manual_seed(0))
    ways: dict[str, Callable[[], Tensor]] = {
        "whole": lambda: whole_decode(autoencoder, latent_Chw),
        "exact": lambda: decode(autoencoder, latent_Chw, Tiling(mode="exact", tile=tile)),
        "fast": lambda: decode(autoencoder, latent_Chw, Tiling(mode="fast", tile=tile)),
        "diffusers": lambda: diffusers_tiling(autoencoder, latent_Chw, tile),
    }
    return median_seconds(ways, rounds)
