"""Merged moments against those of everything at once."""

import numpy as np
import torch
from torch import nn

from ldm.tiling.statistics import ChannelMoments, affine_of

MAP_1CHW = torch.randn(1, 6, 20, 30, dtype=torch.float64) * 3 + torch.linspace(
    -50, 50, 30, dtype=torch.float64
)


def test_tiles_of_any_size_merge_to_the_whole() -> None:
    parts = [MAP_1CHW[..., :7, :], MAP_1CHW[..., 7:, :11], MAP_1CHW[..., 7:, 11:12], MAP_1CHW[..., 7:, 12:]]
    merged = ChannelMoments.merge(ChannelMoments.of(part) for part in parts)
    assert merged.count == 600
    values = MAP_1CHW[0].flatten(1).numpy()
    np.testing.assert_allclose(merged.mean_C, values.mean(1), rtol=1e-12)
    np.testing.assert_allclose(merged.m2_C, values.var(1) * 600, rtol=1e-12)


def test_single_precision_keeps_a_small_variance_far_from_zero() -> None:
    x = 1000 + torch.randn(1, 2, 64, 64)
    found = ChannelMoments.of(x).m2_C / 4096
    np.testing.assert_allclose(found, x.double()[0].flatten(1).var(1, correction=0), rtol=1e-4)


def test_a_norm_with_the_whole_maps_moments_is_group_norm() -> None:
    norm = nn.GroupNorm(3, 6, eps=1e-6).double()
    with torch.no_grad():
        norm.weight.copy_(torch.randn(6)), norm.bias.copy_(torch.randn(6))
    affine = affine_of(norm, ChannelMoments.merge([ChannelMoments.of(MAP_1CHW[..., i::2]) for i in (0, 1)]))
    tile = MAP_1CHW[..., 3:9, 4:13]
    with torch.no_grad():
        assert (affine(tile) - norm(MAP_1CHW)[..., 3:9, 4:13]).abs().max() < 1e-12
