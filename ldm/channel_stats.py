"""Exact mergeable statistics of latents per channel. Imports no torch, for whoever only merges them."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from ldm.latents import Moments

__all__ = ["LatentStats"]


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
    def of(cls, moments: "Moments") -> "LatentStats":
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
