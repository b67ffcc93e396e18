"""Latents as data: posterior moments, keyed sampling from them, exact mergeable statistics, whitening.

Shape suffixes: B batch, C latent channels, h and w latent rows and columns (pixels / f).
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
import torch
from torch import Tensor

__all__ = ["LatentStats", "Moments", "Whitening", "keyed_normal", "keyed_seed"]


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


def keyed_seed(*parts: int | str) -> int:
    """A 64-bit seed that depends on every part and on nothing else (SHA-256 of their text)."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def keyed_normal(seeds_B: Sequence[int], shape_Chw: Sequence[int]) -> Tensor:
    """Standard normal noise (B, C, h, w) float32, every row a function of its own seed alone.

    The rows of a batch therefore do not depend on each other, on their order or on the batch size.
    """
    rows = [
        np.random.Generator(np.random.Philox(seed)).standard_normal(shape_Chw, np.float32) for seed in seeds_B
    ]
    return torch.from_numpy(np.stack(rows)) if rows else torch.empty((0, *shape_Chw))


@dataclass(frozen=True)
class LatentStats:
    """Per-channel count, mean and sum of squared deviations of latents; merges exactly.

    The statistics are those of z ~ q(z | x) over posterior, pixels and images: E[z] is the mean of
    the means and E[z²] that of mean² + std². Sums are float64. ``merge`` is the pairwise update of
    Chan, Golub & LeVeque (1983), so that statistics of parts combine without a second pass.
    """

    count: int
    mean_C: tuple[float, ...]
    m2_C: tuple[float, ...]

    @classmethod
    def of(cls, moments: Moments) -> "LatentStats":
        """Statistics of one batch of moments."""
        mean_CN = moments.mean_BChw.double().transpose(0, 1).flatten(1)
        std_CN = moments.std_BChw.double().transpose(0, 1).flatten(1)
        centre_C = mean_CN.mean(1)
        m2_C = ((mean_CN - centre_C[:, None]).square() + std_CN.square()).sum(1)
        return cls(mean_CN.shape[1], tuple(centre_C.tolist()), tuple(m2_C.tolist()))

    def merge(self, other: "LatentStats") -> "LatentStats":
        """Statistics of both parts together."""
        if len(self.mean_C) != len(other.mean_C):
            raise ValueError(
                f"cannot merge statistics of {len(self.mean_C)} and {len(other.mean_C)} channels"
            )
        count = self.count + other.count
        if not count:
            return self
        a, b = np.array(self.mean_C), np.array(other.mean_C)
        delta = b - a
        mean = a + delta * (other.count / count)
        m2 = np.array(self.m2_C) + np.array(other.m2_C) + delta**2 * (self.count * other.count / count)
        return LatentStats(count, tuple(mean.tolist()), tuple(m2.tolist()))

    @classmethod
    def merge_all(cls, parts: Iterable["LatentStats"]) -> "LatentStats":
        """Statistics of all parts. Give them in a fixed order for the same bits every time."""
        return reduce(cls.merge, parts)

    @property
    def std_C(self) -> tuple[float, ...]:
        """Population standard deviation per channel."""
        return tuple(((np.array(self.m2_C) / max(self.count, 1)).clip(min=0) ** 0.5).tolist())

    @property
    def scaling_factor(self) -> float:
        """1 / std over all channels: the scalar that diffusers calls ``scaling_factor``.

        It is the one of Rombach et al. 2022, section 4.3.2, which divides by the component-wise
        standard deviation without taking the channels apart.
        """
        mean = np.array(self.mean_C)
        variance = float((np.array(self.m2_C) / max(self.count, 1) + (mean - mean.mean()) ** 2).mean())
        return float(1.0 / max(variance**0.5, 1e-12))


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
