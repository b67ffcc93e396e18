"""Intervals: as wide as theory says, the same every time, and around what is really there."""

import numpy as np
import pytest

from ldm.bootstrap import BootstrapConfig, frechet_interval, kernel_interval, mean_interval
from ldm.distribution import frechet_distance_of_rows, kernel_distance


def normal(seed: int, count: int, width: int, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, 1, (count, width))


def test_interval_of_a_mean_is_that_of_the_normal_distribution() -> None:
    x = normal(0, 400, 1)[:, 0]
    interval = mean_interval(x, BootstrapConfig(resamples=4000))
    assert interval is not None
    half = 1.96 * x.std() / 20
    assert interval.low == pytest.approx(x.mean() - half, abs=0.1 * half)
    assert interval.high == pytest.approx(x.mean() + half, abs=0.1 * half)


def test_intervals_are_keyed_by_the_seed_and_widen_with_the_level() -> None:
    x = normal(0, 30, 1)[:, 0]
    config = BootstrapConfig(resamples=200)
    assert mean_interval(x, config) == mean_interval(x, config)
    assert mean_interval(x, config) != mean_interval(x, config.model_copy(update={"seed": 1}))
    narrow = mean_interval(x, config.model_copy(update={"level": 0.5}))
    wide = mean_interval(x, config)
    assert narrow is not None and wide is not None
    assert wide.low < narrow.low < narrow.high < wide.high


@pytest.mark.parametrize("values", [[], [1.0], [1.0, np.inf]])
def test_no_interval_where_there_is_none(values: list[float]) -> None:
    assert mean_interval(values, BootstrapConfig()) is None
    config = BootstrapConfig()
    assert kernel_interval(normal(0, 1, 3), normal(1, 9, 3), config) is None
    assert frechet_interval(0.0, normal(0, 9, 3), normal(1, 1, 3), config) is None


def covered(intervals: list[tuple[float, float]], value: float) -> float:
    return float(np.mean([low <= value <= high for low, high in intervals]))


def test_intervals_of_kid_hold_the_true_distance_about_as_often_as_they_say() -> None:
    """90 % intervals of 60 pairs of sets, against the distance of two sets of 3,000."""
    truth = kernel_distance(normal(7, 3000, 4), normal(8, 3000, 4, shift=0.8))
    config = BootstrapConfig(resamples=200, level=0.9)
    intervals = [
        kernel_interval(normal(2 * i, 60, 4), normal(2 * i + 1, 60, 4, shift=0.8), config)
        for i in range(50, 110)
    ]
    assert 0.75 <= covered([i for i in intervals if i], truth) <= 1


def test_intervals_of_fid_are_as_wide_as_fid_scatters() -> None:
    """Their width, in the mean, against the spread of FID over 100 other draws of the images."""
    values = [
        frechet_distance_of_rows(normal(2 * i, 80, 4), normal(2 * i + 1, 80, 4, 1.0)) for i in range(100)
    ]
    config = BootstrapConfig(fid_resamples=100, level=0.9)
    intervals = [
        frechet_interval(values[i], normal(2 * i, 80, 4), normal(2 * i + 1, 80, 4, 1.0), config)
        for i in range(20)
    ]
    widths = [interval.high - interval.low for interval in intervals if interval]
    spread = np.quantile(values, 0.95) - np.quantile(values, 0.05)
    assert np.mean(widths) == pytest.approx(spread, rel=0.3)
    assert all(i.low < value < i.high for i, value in zip(intervals, values, strict=False) if i)


def test_pairs_are_drawn_together() -> None:
    """A set that is the other one moved: whatever is drawn, the distance is the move."""
    a = normal(0, 12, 30)
    b = a + 0.5
    value = frechet_distance_of_rows(a, b)
    paired = frechet_interval(value, a, b, BootstrapConfig(fid_resamples=20), paired=True)
    apart = frechet_interval(value, a, b, BootstrapConfig(fid_resamples=20))
    assert paired == pytest.approx((value, value), rel=1e-6)
    assert apart is not None and apart.high - apart.low > 1
    with pytest.raises(ValueError, match="12 and 11 images are not pairs"):
        frechet_interval(value, a, b[1:], BootstrapConfig(), paired=True)
