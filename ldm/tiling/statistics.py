"""GroupNorm statistics of a map that nobody sees whole: merged from those of its tiles.

Averaging the tiles' variances would lose the variance between the tiles. Counts, means and sums of squared
deviations can be merged without loss (Chan, Golub & LeVeque 1983, equations 2.1).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ldm.tiling.chain import Affine

__all__ = ["ChannelMoments", "affine_of"]

Array: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class ChannelMoments:
    """Per channel: ``count`` of values, mean_C, and m2_C, the sum of squared deviations (fp64).

    NumPy's arrays, since a tensor takes over twenty times as long to pickle, and actors send many.
    """

    count: int
    mean_C: Array
    m2_C: Array

    @classmethod
    def of(cls, x_1CHW: Tensor) -> "ChannelMoments":
        """In fp32, or in fp64 where the map is; two passes, since a tile is small."""
        x_NC = x_1CHW.permute(0, 2, 3, 1).reshape(-1, x_1CHW.shape[1])
        x_NC = x_NC if x_NC.dtype == torch.float64 else x_NC.float()
        mean_C = x_NC.mean(0)
        m2_C = (x_NC - mean_C).square_().sum(0)
        return cls(len(x_NC), *(found_C.double().cpu().numpy() for found_C in (mean_C, m2_C)))

    @classmethod
    def merge(cls, parts: Iterable["ChannelMoments"]) -> "ChannelMoments":
        """Of all together. Rounding depends on the order of the parts, and on nothing else."""
        count, mean_C, m2_C = zip(*((part.count, part.mean_C, part.m2_C) for part in parts), strict=True)
        count_P1 = np.array(count, np.float64)[:, None]
        return cls(sum(count), *_merged(count_P1, np.stack(mean_C), np.stack(m2_C)))

    def groups(self, num_groups: int) -> tuple[Tensor, Tensor]:
        """Mean and (biased) variance of each of ``num_groups`` groups of channels."""
        mean_gG, m2_gG = (part_C.reshape(num_groups, -1).T for part_C in (self.mean_C, self.m2_C))
        count_gG = np.full_like(mean_gG, self.count)
        mean_G, m2_G = _merged(count_gG, mean_gG, m2_gG)
        return torch.from_numpy(mean_G), torch.from_numpy(m2_G / count_gG.sum(0))


def _merged(count_P: Array, mean_P: Array, m2_P: Array) -> tuple[Array, Array]:
    """Mean and m2 over the first dimension, of parts."""
    mean = (count_P * mean_P).sum(0) / count_P.sum(0)
    return mean, (m2_P + count_P * np.square(mean_P - mean)).sum(0)


def affine_of(norm: nn.GroupNorm, moments: ChannelMoments) -> Affine:
    """``norm`` with these statistics of its input."""
    return Affine(norm, *moments.groups(norm.num_groups))
