"""Distances between the features of two sets of images: Fréchet, kernel, precision and recall.

Shape suffixes: N and M images, D features.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ldm.feature_stats import FeatureStats

__all__ = [
    "Coverage",
    "frechet_distance",
    "frechet_distance_of_rows",
    "kernel_distance",
    "polynomial_kernel",
    "precision_recall",
    "squared_distances",
    "weighted_kernel_distance",
]

Float64 = NDArray[np.float64]
Features = NDArray[np.floating]


class Coverage(NamedTuple):
    """Which images lie within the other set's manifold: (M,) of the generated, (N,) of the real, bool."""

    precise_M: NDArray[np.bool_]
    recalled_N: NDArray[np.bool_]


def frechet_distance(a: FeatureStats, b: FeatureStats) -> float:
    """‖μa − μb‖² + tr(Σa + Σb − 2 (Σa Σb)^½), the squared Fréchet distance of two Gaussians; ≥ 0.

    Heusel et al. 2017, eq. 6. The trace of the root is Σ √λ over the eigenvalues of
    Σa^½ Σb Σa^½: symmetric, so they are real, where those of Σa Σb come out complex for few images.
    """
    root_a = _root(a.covariance_DD)
    eigenvalues = np.linalg.eigvalsh(root_a @ b.covariance_DD @ root_a)
    trace_of_root = np.sqrt(eigenvalues.clip(min=0)).sum()
    traces = np.trace(a.covariance_DD) + np.trace(b.covariance_DD)
    delta = a.mean_D - b.mean_D
    return max(float(delta @ delta + traces - 2 * trace_of_root), 0.0)


def frechet_distance_of_rows(a_ND: Features, b_MD: Features) -> float:
    """`frechet_distance` of two small sets, at the cost of the smaller of images and features.

    With the centred sets A and B, tr (Σa Σb)^½ is the sum of the singular values of A Bᵀ over
    √((N − 1)(M − 1)): a matrix of images by images.
    """
    a, b = np.asarray(a_ND, np.float64), np.asarray(b_MD, np.float64)
    if max(len(a), len(b)) >= a.shape[1]:
        return frechet_distance(FeatureStats.of(a), FeatureStats.of(b))
    delta = a.mean(0) - b.mean(0)
    a, b = (a - a.mean(0)) / (len(a) - 1) ** 0.5, (b - b.mean(0)) / (len(b) - 1) ** 0.5
    trace_of_root = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return max(float(delta @ delta + (a * a).sum() + (b * b).sum() - 2 * trace_of_root), 0.0)


def kernel_distance(a_ND: Features, b_MD: Features, *, paired: bool = False) -> float:
    """Unbiased squared MMD with the kernel (x·y / D + 1)³: KID over all pairs; can be below 0.

    Bińkowski et al. 2018, section 4. NaN where a set has fewer than two images. paired: image i of
    one set is made from image i of the other. The two are then not compared with each other, since
    they are alike for another reason than that the sets are (Gretton et al. 2012, eq. 4).
    """
    kernels = polynomial_kernel(a_ND, a_ND), polynomial_kernel(b_MD, b_MD), polynomial_kernel(a_ND, b_MD)
    return weighted_kernel_distance(*kernels, np.ones(len(a_ND)), np.ones(len(b_MD)), paired=paired)


def weighted_kernel_distance(
    kernel_NN: Float64,
    kernel_MM: Float64,
    kernel_NM: Float64,
    weights_N: Float64,
    weights_M: Float64,
    *,
    paired: bool = False,
) -> float:
    """`kernel_distance` where image i counts ``weights[i]`` times, and is never compared with itself.

    A bootstrap draws an image twice; were the two compared, its own similarity would look like the
    set's. paired: the weights of both sets are equal.
    """
    within = _mean_of_pairs(kernel_NN, weights_N) + _mean_of_pairs(kernel_MM, weights_M)
    if paired:
        return float(within - 2 * _mean_of_pairs(kernel_NM, weights_N))
    return float(within - 2 * (weights_N @ kernel_NM @ weights_M) / (weights_N.sum() * weights_M.sum()))


def polynomial_kernel(a_ND: Features, b_MD: Features) -> Float64:
    """(x·y / D + 1)³ for every pair, (N, M) float64."""
    a, b = np.asarray(a_ND, np.float64), np.asarray(b_MD, np.float64)
    kernel: Float64 = (a @ b.T / a.shape[1] + 1) ** 3
    return kernel


def precision_recall(real_ND: Features, generated_MD: Features, k: int = 3) -> Coverage:
    """Improved precision and recall: the means of the two arrays. ValueError unless k < N and k < M.

    Kynkäänniemi et al. 2019, eq. 1 and 2: an image lies within a set's manifold when it is no
    further from one of its images than that image's k-th nearest neighbour in its own set.
    """
    if not 0 < k < min(len(real_ND), len(generated_MD)):
        raise ValueError(f"k = {k} neighbours of {len(real_ND)} and {len(generated_MD)} images")
    across_NM = squared_distances(real_ND, generated_MD)
    radii_N = _kth_nearest(squared_distances(real_ND, real_ND), k)
    radii_M = _kth_nearest(squared_distances(generated_MD, generated_MD), k)
    within_N = np.less_equal(across_NM, radii_M[None, :])
    return Coverage(np.any(across_NM <= radii_N[:, None], axis=0), np.any(within_N, axis=1))


def squared_distances(a_ND: Features, b_MD: Features) -> Float64:
    """‖x − y‖² of every pair, (N, M) float64, ≥ 0."""
    a, b = np.asarray(a_ND, np.float64), np.asarray(b_MD, np.float64)
    squares = (a * a).sum(1)[:, None] + (b * b).sum(1)[None, :] - 2 * a @ b.T
    clipped: Float64 = squares.clip(min=0)
    return clipped


def _root(symmetric_DD: Float64) -> Float64:
    """The square root of a positive semi-definite matrix; eigenvalues below 0 are rounding."""
    values, vectors = np.linalg.eigh(symmetric_DD)
    root: Float64 = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    return root


def _mean_of_pairs(kernel_NN: Float64, weights_N: Float64) -> float:
    weight = weights_N.sum() ** 2 - (weights_N**2).sum()
    total = weights_N @ kernel_NN @ weights_N - (weights_N**2 * np.diag(kernel_NN)).sum()
    return float(total / weight) if weight else float("nan")


def _kth_nearest(squares_NN: Float64, k: int) -> Float64:
    """Squared distance to the k-th nearest of the others; each row holds the image's own 0 too."""
    others = squares_NN.copy()
    np.fill_diagonal(others, np.inf)
    return np.partition(others, k - 1, axis=1)[:, k - 1]
