"""Statistics of what an upsampler is trained to make."""

from typing import TYPE_CHECKING

import numpy as np
import torch

from ldm.latents import LatentStats, Moments
from ldm.upsampling import enlarged
from pipelines.train.order import Span

if TYPE_CHECKING:
    from pipelines.latent_table import MomentArrays
    from pipelines.train.loader import LatentLoader

__all__ = ["residual_stats"]

# Some hundreds of images, thousands of positions each: no training needs to know them better.
GROUPS_OF_BUCKET = 16


def residual_stats(loader: "LatentLoader") -> LatentStats:
    """Of latents less their enlarged low-resolution latents, in the VAE's own scale, over some row groups.

    They lie evenly in every bucket that is trained on, so the same dataset has the same statistics. Spread of
    the low-resolution posterior is left out: interpolation takes means of it.
    """
    return LatentStats.merge_all(
        _of_group(loader, bucket.name, int(group), int(bucket.rows_G[group]))
        for bucket in loader.buckets
        if bucket.name in loader.orders
        for group in _evenly(len(bucket.rows_G))
    )


def _evenly(num_groups: int) -> list[int]:
    return sorted({*np.linspace(0, num_groups - 1, GROUPS_OF_BUCKET).round().astype(int).tolist()})


def _of_group(loader: "LatentLoader", bucket: str, group: int, num_rows: int) -> LatentStats:
    rows = loader.readers[bucket].read([Span(group, 0, num_rows)])
    assert rows.low is not None
    high, low = _moments(rows.moments), _moments(rows.low.moments)
    size_HW = high.mean_BChw.shape[2:]
    return LatentStats.of(Moments(high.mean_BChw - enlarged(low.mean_BChw, size_HW), high.std_BChw))


def _moments(stored: "MomentArrays") -> Moments:
    mean, std = (torch.from_numpy(moment.astype(np.float32)) for moment in stored)
    return Moments(mean, std)
