"""What is kept of the features of a set of images: mergeable statistics and a bounded sample.

Shape suffixes: N images, D features.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ldm.seeds import keyed_seed

__all__ = ["FeatureSample", "FeatureStats", "FeatureSummary"]

Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class FeatureStats:
    """Count, mean (D,) and scatter matrix Σ (x − mean)(x − mean)ᵀ (D, D), float64; merges exactly."""

    count: int
    mean_D: Float64
    m2_DD: Float64

    @classmethod
    def of(cls, features_ND: NDArray[np.floating]) -> "FeatureStats":
        """Statistics of one batch; no rows give a count of 0."""
        x = np.asarray(features_ND, np.float64)
        if not len(x):
            return cls(0, np.zeros(x.shape[1]), np.zeros((x.shape[1],) * 2))
        mean = x.mean(0)
        return cls(len(x), mean, (x - mean).T @ (x - mean))

    def merge(self, other: "FeatureStats") -> "FeatureStats":
        """Statistics of both parts together: Chan, Golub & LeVeque (1983), in D dimensions."""
        if self.mean_D.shape != other.mean_D.shape:
            raise ValueError(
                f"cannot merge statistics of {len(self.mean_D)} and {len(other.mean_D)} features"
            )
        count = self.count + other.count
        if not count:
            return self
        delta = other.mean_D - self.mean_D
        between = np.outer(delta, delta) * (self.count * other.count / count)
        return FeatureStats(
            count, self.mean_D + delta * (other.count / count), self.m2_DD + other.m2_DD + between
        )

    @property
    def covariance_DD(self) -> Float64:
        """Unbiased, as in the reference FID; zeros for fewer than two images."""
        return self.m2_DD / max(self.count - 1, 1)


@dataclass(frozen=True)
class FeatureSample:
    """The features of the ``size`` images whose keyed hashes are smallest: the same for any merge order.

    ids name the images; hashes_N uint64 ascending (equal ones in the order of ids), features_ND float32.
    """

    size: int
    ids: tuple[str, ...]
    hashes_N: NDArray[np.uint64]
    features_ND: NDArray[np.float32]

    @classmethod
    def of(cls, size: int, ids: Sequence[str], features_ND: NDArray[np.floating]) -> "FeatureSample":
        """The sample of one batch; every id names one image of the whole set, however it is cut up."""
        hashes = np.array([keyed_seed("kept", key) for key in ids], np.uint64)
        return cls._smallest(size, tuple(ids), hashes, np.asarray(features_ND, np.float32))

    def merge(self, other: "FeatureSample") -> "FeatureSample":
        """The sample of both parts together."""
        if self.size != other.size:
            raise ValueError(f"cannot merge samples of {self.size} and {other.size} images")
        return self._smallest(
            self.size,
            self.ids + other.ids,
            np.concatenate([self.hashes_N, other.hashes_N]),
            np.concatenate([self.features_ND, other.features_ND]),
        )

    @classmethod
    def _smallest(
        cls,
        size: int,
        ids: tuple[str, ...],
        hashes_N: NDArray[np.uint64],
        features_ND: NDArray[np.float32],
    ) -> "FeatureSample":
        order = sorted(range(len(ids)), key=lambda i: (int(hashes_N[i]), ids[i]))[:size]
        return cls(size, tuple(ids[i] for i in order), hashes_N[order], features_ND[order])


@dataclass(frozen=True)
class FeatureSummary:
    """Both, of one set of images: all that FID, KID, precision and recall need of it."""

    stats: FeatureStats
    sample: FeatureSample

    @classmethod
    def of(cls, size: int, ids: Sequence[str], features_ND: NDArray[np.floating]) -> "FeatureSummary":
        """Of one batch; size: how many images the sample keeps."""
        return cls(FeatureStats.of(features_ND), FeatureSample.of(size, ids, features_ND))

    def merge(self, other: "FeatureSummary") -> "FeatureSummary":
        """Of both parts together."""
        return FeatureSummary(self.stats.merge(other.stats), self.sample.merge(other.sample))
