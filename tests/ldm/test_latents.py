import itertools
import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm.latents import LatentStats, Moments, Whitening, keyed_normal
from ldm.seeds import keyed_seed


def moments(num_images: int, *, seed: int = 0, offset: float = 0.0) -> Moments:
    """Float64 moments of 3 channels with different means and spreads."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_images, 3, 4, 5)
    centre = torch.tensor([-1.0, 0.0, 7.0], dtype=torch.float64).view(1, 3, 1, 1) + offset
    spread = torch.tensor([0.1, 1.0, 3.0], dtype=torch.float64).view(1, 3, 1, 1)
    mean = torch.randn(shape, generator=generator, dtype=torch.float64) * spread + centre
    return Moments(mean, torch.rand(shape, generator=generator, dtype=torch.float64))


def channels(x_BChw: Tensor) -> NDArray[np.float64]:
    """(C, B·h·w)."""
    return x_BChw.double().numpy().swapaxes(0, 1).reshape(x_BChw.shape[1], -1)


def slices(whole: Moments, sizes: tuple[int, ...]) -> list[Moments]:
    pairs = zip(whole.mean_BChw.split(sizes), whole.std_BChw.split(sizes), strict=True)
    return [Moments(mean, std) for mean, std in pairs]


def test_sample_and_mode_are_closed_forms() -> None:
    whole, noise = moments(2), torch.full((2, 3, 4, 5), -2.0, dtype=torch.float64)
    assert torch.equal(whole.sample(noise), whole.mean_BChw - 2 * whole.std_BChw)
    assert torch.equal(whole.mode(), whole.mean_BChw)


@pytest.mark.parametrize(("mean", "std"), [((1, 2, 3, 3), (1, 2, 3, 4)), ((2, 3, 3), (2, 3, 3))])
def test_moments_of_unlike_shapes_are_refused(mean: tuple[int, ...], std: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="of one shape"):
        Moments(torch.zeros(mean), torch.zeros(std))


def test_statistics_are_those_of_the_posterior() -> None:
    whole = moments(6)
    mean, std = channels(whole.mean_BChw), channels(whole.std_BChw)
    stats = LatentStats.of(whole)
    # E[z²] = mean² + std² for every value, so Var[z] = E[z²] - E[z]².
    variance = (mean**2 + std**2).mean(1) - mean.mean(1) ** 2
    assert stats.count == 6 * 4 * 5
    np.testing.assert_allclose(stats.mean_C, mean.mean(1), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(stats.std_C, variance**0.5, rtol=1e-12)


def test_statistics_are_what_many_samples_have() -> None:
    whole = moments(4)
    noise = torch.randn(4000, *whole.mean_BChw.shape, generator=torch.Generator().manual_seed(3))
    samples = channels(whole.sample(noise.double()).flatten(0, 1))
    stats = LatentStats.of(whole)
    # 320,000 samples per channel: standard errors below 0.2 % of a standard deviation.
    np.testing.assert_allclose(samples.mean(1), stats.mean_C, atol=0.02)
    np.testing.assert_allclose(samples.std(1), stats.std_C, rtol=0.01)


@pytest.mark.parametrize("offset", [0.0, 1e6])
@pytest.mark.parametrize("sizes", [(6,), (1,) * 6, (5, 1), (1, 2, 3), (3, 2, 1)])
def test_any_partition_merges_to_the_whole(sizes: tuple[int, ...], offset: float) -> None:
    whole = moments(6, offset=offset)
    merged = LatentStats.merge_all(LatentStats.of(part) for part in slices(whole, sizes))
    mean, std = channels(whole.mean_BChw), channels(whole.std_BChw)
    m2 = ((mean - mean.mean(1, keepdims=True)) ** 2 + std**2).sum(1)
    assert merged.count == 120
    np.testing.assert_allclose(merged.mean_C, mean.mean(1), rtol=1e-12, atol=1e-13)
    # At 1e6 the inputs themselves have 1e-10 of absolute rounding; E[z²] - E[z]² would have 1e-4.
    np.testing.assert_allclose(merged.m2_C, m2, rtol=1e-12 if not offset else 1e-9)


def test_merging_is_a_tree_as_well_as_a_chain() -> None:
    parts = [LatentStats.of(part) for part in slices(moments(4), (1, 1, 1, 1))]
    chain = LatentStats.merge_all(parts)
    tree = parts[3].merge(parts[1]).merge(parts[2].merge(parts[0]))
    assert tree.count == chain.count
    np.testing.assert_allclose(tree.mean_C, chain.mean_C, rtol=1e-12)
    np.testing.assert_allclose(tree.m2_C, chain.m2_C, rtol=1e-12)


def test_half_precision_moments_are_summed_in_double() -> None:
    half = Moments(torch.full((1, 1, 100, 100), 300.0).half(), torch.full((1, 1, 100, 100), 0.5).half())
    stats = LatentStats.of(half)
    assert (stats.mean_C, stats.std_C) == ((300.0,), (0.5,))


def test_statistics_of_nothing_change_nothing() -> None:
    some, nothing = LatentStats.of(moments(2)), LatentStats(0, (0.0,) * 3, (0.0,) * 3)
    assert some.merge(nothing) == some
    assert nothing.merge(some) == some
    assert nothing.merge(nothing) == nothing
    assert nothing.std_C == (0.0, 0.0, 0.0)


def test_statistics_of_unlike_channels_do_not_merge() -> None:
    with pytest.raises(ValueError, match="3 and 2 channels"):
        LatentStats.of(moments(1)).merge(LatentStats(1, (0.0, 0.0), (0.0, 0.0)))


def test_the_scaling_factor_is_one_over_the_std_of_all_values() -> None:
    whole = moments(5)
    flat = whole.mean_BChw.flatten().numpy()
    variance = flat.var() + (whole.std_BChw.flatten().numpy() ** 2).mean()
    assert LatentStats.of(whole).scaling_factor == pytest.approx(variance**-0.5, rel=1e-12)
    # Two channels at ±2 with variance 12 each: 12 + 4 = 16.
    assert LatentStats(10, (-2.0, 2.0), (120.0, 120.0)).scaling_factor == 0.25


def test_a_row_of_noise_depends_on_its_seed_alone() -> None:
    seeds = [7, 0, 2**64 - 1, 7]
    together = keyed_normal(seeds, (4, 8, 8))
    assert together.dtype == torch.float32
    for row, seed in zip(together, seeds, strict=True):
        assert torch.equal(row, keyed_normal([seed], (4, 8, 8))[0])
    assert torch.equal(keyed_normal(seeds[::-1], (4, 8, 8)), together.flip(0))
    assert keyed_normal([], (4, 8, 8)).shape == (0, 4, 8, 8)
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(together[:3], 2))


def test_noise_does_not_touch_the_global_generators() -> None:
    torch.manual_seed(5)
    first = keyed_normal([1], (2, 2, 2))
    undisturbed = torch.randn(3, generator=torch.Generator().manual_seed(5))
    assert torch.equal(torch.randn(3), undisturbed)
    assert torch.equal(keyed_normal([1], (2, 2, 2)), first)


def test_noise_is_standard_normal() -> None:
    x = keyed_normal(range(100), (10, 10, 10)).double().flatten()
    error = len(x) ** -0.5
    assert abs(x.mean()) < 4 * error
    assert abs(x.square().mean() - 1) < 4 * math.sqrt(2) * error
    assert abs((x**3).mean()) < 4 * math.sqrt(15) * error
    assert abs((x**4).mean() - 3) < 4 * math.sqrt(96) * error
    # Neighbouring seeds are unrelated.
    rows = x.view(100, 1000)
    assert abs((rows[1:] * rows[:-1]).mean()) < 4 * error


def test_seeds_differ_in_every_part() -> None:
    keys: list[tuple[int | str, ...]] = [
        (), ("",), (1,), ("1",), (1, 1), (11,),
        ("ab", "c"), ("a", "bc"), ("abc",), ("a", "b", "c"), ("c", "ab"),
    ]  # fmt: skip
    seeds = [keyed_seed(*key) for key in keys]
    assert len(set(seeds)) == len(keys)
    assert seeds == [keyed_seed(*key) for key in keys]
    assert all(0 <= seed < 2**64 for seed in seeds)


def test_seeds_stay_the_same_between_versions() -> None:
    # A change here would change what every seed of a user and every stored sample means.
    assert keyed_seed(0, "sample", 3) == 0xBCBD5253F5C8AC3C


def test_whitening_gives_every_channel_unit_std_and_goes_back() -> None:
    whole = moments(5)
    whitening = Whitening.from_stats(LatentStats.of(whole))
    white = Moments(
        whitening.normalise(whole.mean_BChw),
        whole.std_BChw / torch.tensor(whitening.scale_C).double().view(1, 3, 1, 1),
    )
    stats = LatentStats.of(white)
    np.testing.assert_allclose(stats.mean_C, [0, 0, 0], atol=1e-12)
    np.testing.assert_allclose(stats.std_C, [1, 1, 1], rtol=1e-6)
    torch.testing.assert_close(
        whitening.denormalise(white.mean_BChw), whole.mean_BChw, rtol=1e-14, atol=1e-14
    )


def test_a_constant_channel_keeps_its_scale() -> None:
    constant = Moments(torch.full((1, 1, 4, 4), 3.0), torch.zeros(1, 1, 4, 4))
    whitening = Whitening.from_stats(LatentStats.of(constant))
    assert whitening == Whitening((3.0,), (1.0,))
    assert not whitening.normalise(constant.mean_BChw).any()


def test_whitening_keeps_the_dtype() -> None:
    whitening = Whitening.from_scaling_factor(0.5, 2, shift=1.0)
    assert whitening == Whitening((1.0, 1.0), (2.0, 2.0))
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        x = torch.full((1, 2, 1, 1), 5.0, dtype=dtype)
        assert torch.equal(whitening.normalise(x), torch.full((1, 2, 1, 1), 2.0, dtype=dtype))


@pytest.mark.parametrize("scale", [(1.0,), (1.0, 0.0), (1.0, -1.0), (1.0, math.nan)])
def test_a_scale_that_cannot_be_undone_is_refused(scale: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="positive scale"):
        Whitening((0.0, 0.0), scale)
