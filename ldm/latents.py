"""Latents as data: posterior moments, keyed sampling from them, exact mergeable statistics, whitening.

Shape suffixes: B batch, C latent channels, h and w latent rows and columns (pixels / f).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ldm.channel_stats import LatentStats

__all__ = ["LatentStats", "Moments", "Whitening", "keyed_normal"]


@dataclass(frozen=True)
class Moments:
    """Mean and standard deviation of a diagonal Gaussian posterior q(z | x).

    mean_BChw, std_BChw: floating point, the VAE's own scale (not whitened), std ≥ 0; a
    deterministic autoencoder has std 0.
    """

    mean_BChw: Tensor
    std_BChw: Tensor

    def __post_init__(self) -> None:
        if self.mean_BChw.shape != self.std_BChw.shape or self.mean_BChw.ndim != 4:
            raise ValueError(
                f"moments need two (B, C, h, w) tensors of one shape, not "
                f"{tuple(self.mean_BChw.shape)} and {tuple(self.std_BChw.shape)}"
            )

    def sample(self, noise_BChw: Tensor) -> Tensor:
        """z = mean + std · noise (Kingma & Welling 2014, eq. 10); noise is standard normal."""
        return self.mean_BChw + self.std_BChw * noise_BChw

    def mode(self) -> Tensor:
        """The most probable latent: the mean."""
        return self.mean_BChw


def keyed_normal(seeds_B: Sequence[int], shape_Chw: Sequence[int]) -> Tensor:
    """Standard normal noise (B, C, h, w) float32, every row a function of its own seed alone.

    The rows of a batch therefore do not depend on each other, on their order or on the batch size.
    """
    rows = [
        np.random.Generator(np.random.Philox(seed)).standard_normal(shape_Chw, np.float32) for seed in seeds_B
    ]
    return torch.from_numpy(np.stack(rows)) if rows else torch.empty((0, *shape_Chw))


@dataclass(frozen=True)
class Whitening:
    """The affine map between the VAE's latents and those that the U-Net sees: (z − shift) / scale.

    shift_C, scale_C: one value per latent channel, scale > 0.
    """

    shift_C: tuple[float, ...]
    scale_C: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.shift_C) != len(self.scale_C) or not all(s > 0 for s in self.scale_C):
            raise ValueError(f"whitening needs one shift and one positive scale per channel, not {self}")

    @classmethod
    def from_stats(cls, stats: LatentStats) -> "Whitening":
        """Mean 0 and standard deviation 1 in every channel; a constant channel keeps its scale."""
        return cls(stats.mean_C, tuple(s if s > 1e-6 else 1.0 for s in stats.std_C))

    @classmethod
    def from_scaling_factor(cls, factor: float, num_channels: int, shift: float = 0.0) -> "Whitening":
        """diffusers' convention: (z − shift) · scaling_factor, the same for every channel."""
        return cls((shift,) * num_channels, (1.0 / factor,) * num_channels)

    def normalise(self, z_BChw: Tensor) -> Tensor:
        """VAE latents → U-Net latents."""
        shift, scale = self._like(z_BChw)
        return (z_BChw - shift) / scale

    def denormalise(self, x_BChw: Tensor) -> Tensor:
        """U-Net latents → VAE latents."""
        shift, scale = self._like(x_BChw)
        return x_BChw * scale + shift

    def _like(self, x_BChw: Tensor) -> tuple[Tensor, Tensor]:
        shift = torch.tensor(self.shift_C, dtype=x_BChw.dtype, device=x_BChw.device)
        scale = torch.tensor(self.scale_C, dtype=x_BChw.dtype, device=x_BChw.device)
        return shift.view(1, -1, 1, 1), scale.view(1, -1, 1, 1)
