"""Percentile bootstrap: how far a figure would move, had other images been drawn (Efron 1979).

Resampling is keyed by the config's seed: the same images give the same interval.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from ldm.distribution import frechet_distance_of_rows, polynomial_kernel, weighted_kernel_distance
from ldm.seeds import keyed_seed

__all__ = ["BootstrapConfig", "Figure", "Interval", "frechet_interval", "kernel_interval", "mean_interval"]

Features = NDArray[np.floating]


class BootstrapConfig(BaseModel):
    """How intervals are computed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    resamples: PositiveInt = Field(1000, description="of means and of KID")
    fid_resamples: PositiveInt = Field(100, description="of FID, each of which costs a decomposition")
    level: float = Field(0.95, gt=0, lt=1, description="share of the resamples within the interval")
    seed: int = 0


class Interval(NamedTuple):
    """The ends of an interval."""

    low: float
    high: float


class Figure(NamedTuple):
    """A measured value and its interval; None where too few images gave none."""

    value: float
    interval: Interval | None


def mean_interval(values: Sequence[float] | NDArray[np.generic], config: BootstrapConfig) -> Interval | None:
    """Of the mean of independent values; None for fewer than two, or where one is not finite."""
    x = np.asarray(values, np.float64)
    if len(x) < 2 or not np.isfinite(x).all():
        return None
    rng = _generator("mean", config)
    means = [x[rng.integers(0, len(x), len(x))].mean() for _ in range(config.resamples)]
    return _percentiles(means, config)


def kernel_interval(
    a_ND: Features, b_MD: Features, config: BootstrapConfig, *, paired: bool = False
) -> Interval | None:
    """Of KID, both sets resampled; None for fewer than two images in one. paired: see `frechet_interval`."""
    if min(len(a_ND), len(b_MD)) < 2:
        return None
    kernels = polynomial_kernel(a_ND, a_ND), polynomial_kernel(b_MD, b_MD), polynomial_kernel(a_ND, b_MD)
    distances = [
        weighted_kernel_distance(
            *kernels, _times_drawn(i, len(a_ND)), _times_drawn(j, len(b_MD)), paired=paired
        )
        for i, j in _draws(len(a_ND), len(b_MD), config.resamples, config, paired=paired)
    ]
    return _percentiles(distances, config)


def frechet_interval(
    value: float, a_ND: Features, b_MD: Features, config: BootstrapConfig, *, paired: bool = False
) -> Interval | None:
    """Of FID ``value``, from a sample of the features of both sets; None for fewer than two images in one.

    The percentiles of the resamples' deviations from their own mean, around ``value``, and never below
    0: FID rises as distinct images get fewer, and a resample has fewer, so its level says nothing.
    paired: image i of one set is made from image i of the other, and they are drawn together.
    """
    if min(len(a_ND), len(b_MD)) < 2:
        return None
    distances = [
        frechet_distance_of_rows(a_ND[i], b_MD[j])
        for i, j in _draws(len(a_ND), len(b_MD), config.fid_resamples, config, paired=paired)
    ]
    low, high = _percentiles(distances, config)
    mean = float(np.mean(distances))
    return Interval(max(value + low - mean, 0.0), value + high - mean)


def _draws(
    n: int, m: int, count: int, config: BootstrapConfig, *, paired: bool
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    if paired and n != m:
        raise ValueError(f"{n} and {m} images are not pairs")
    rng = _generator("two sets", config)
    for _ in range(count):
        drawn = rng.integers(0, n, n)
        yield drawn, drawn if paired else rng.integers(0, m, m)


def _times_drawn(drawn: NDArray[np.int64], count: int) -> NDArray[np.float64]:
    return np.bincount(drawn, minlength=count).astype(np.float64)


def _generator(what: str, config: BootstrapConfig) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(keyed_seed("bootstrap", what, config.seed)))


def _percentiles(values: Sequence[float], config: BootstrapConfig) -> Interval:
    tail = (1 - config.level) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return Interval(float(low), float(high))
