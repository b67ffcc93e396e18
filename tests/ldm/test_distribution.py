"""Distances of distributions against closed forms, SciPy, torchmetrics and loops over all pairs."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torchmetrics.image.kid import poly_mmd

from ldm.distribution import (
    frechet_distance,
    frechet_distance_of_rows,
    kernel_distance,
    precision_recall,
    squared_distances,
    weighted_kernel_distance,
)
from ldm.distribution import polynomial_kernel as kernel
from ldm.feature_stats import FeatureStats


def rows(seed: int, count: int, width: int, shift: float = 0.0) -> np.ndarray:
    """Correlated features."""
    rng = np.random.default_rng(seed)
    return rng.normal(shift, 1, (count, width)) @ rng.normal(0, width**-0.5, (width, width)) + shift


def gaussian(mean: np.ndarray, covariance: np.ndarray) -> FeatureStats:
    return FeatureStats(11, mean, 10 * covariance)


def test_frechet_of_commuting_covariances_is_the_closed_form() -> None:
    """Σa = Q diag(p) Qᵀ and Σb = Q diag(q) Qᵀ: ‖μa − μb‖² + Σ (√p − √q)²."""
    rng = np.random.default_rng(0)
    rotation = np.linalg.qr(rng.normal(size=(9, 9)))[0]
    p, q = rng.uniform(0, 4, (2, 9))
    p[0] = q[3] = 0.0  # a direction that one set does not vary in
    mean_a, mean_b = rng.normal(size=(2, 9))
    got = frechet_distance(
        gaussian(mean_a, rotation * p @ rotation.T), gaussian(mean_b, rotation * q @ rotation.T)
    )
    expected = ((mean_a - mean_b) ** 2).sum() + ((np.sqrt(p) - np.sqrt(q)) ** 2).sum()
    assert got == pytest.approx(expected, abs=1e-6)


def test_frechet_is_the_one_with_scipys_root() -> None:
    a, b = rows(0, 60, 12), rows(1, 80, 12, shift=0.3)
    covariance_a, covariance_b = np.cov(a.T), np.cov(b.T)
    root = sqrtm(covariance_a @ covariance_b).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(covariance_a + covariance_b - 2 * root)
    got = frechet_distance(FeatureStats.of(a), FeatureStats.of(b))
    assert got == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(FeatureStats.of(b), FeatureStats.of(a)) == pytest.approx(got, rel=1e-9)
    assert frechet_distance_of_rows(a, b) == got


@pytest.mark.parametrize(("count_a", "count_b"), [(7, 7), (5, 19), (19, 5)])
def test_frechet_of_fewer_images_than_features(count_a: int, count_b: int) -> None:
    a, b = rows(2, count_a, 20), rows(3, count_b, 20, shift=0.2)
    expected = frechet_distance(FeatureStats.of(a), FeatureStats.of(b))
    assert frechet_distance_of_rows(a, b) == pytest.approx(expected, rel=1e-6)


def test_frechet_of_a_set_to_itself_is_0() -> None:
    for stats in (FeatureStats.of(rows(0, 50, 8)), FeatureStats.of(rows(0, 4, 8))):
        assert frechet_distance(stats, stats) == pytest.approx(0, abs=1e-6)


def test_kernel_distance_is_that_of_torchmetrics() -> None:
    a, b = rows(0, 40, 16), rows(1, 40, 16, shift=0.4)
    expected = float(poly_mmd(torch.from_numpy(a), torch.from_numpy(b)))
    assert kernel_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_kernel_distance_of_sets_of_two_sizes_is_the_mean_over_pairs() -> None:
    a, b = rows(0, 6, 4), rows(1, 9, 4)

    def k(x: np.ndarray, y: np.ndarray) -> float:
        return float(sum(p * q for p, q in zip(x, y, strict=True)) / 4 + 1) ** 3

    within = [np.mean([k(x, y) for x in s for y in s if x is not y]) for s in (list(a), list(b))]
    across = np.mean([k(x, y) for x in a for y in b])
    assert kernel_distance(a, b) == pytest.approx(sum(within) - 2 * across, rel=1e-9)
    assert np.isnan(kernel_distance(a[:1], b))


def test_kernel_distance_is_unbiased() -> None:
    values = [kernel_distance(*np.random.default_rng(i).normal(size=(2, 8, 3))) for i in range(2000)]
    assert np.mean(values) == pytest.approx(0, abs=4 * np.std(values) / len(values) ** 0.5)


def test_a_weight_is_a_number_of_times_that_an_image_counts_without_itself() -> None:
    a, b = rows(0, 5, 4), rows(1, 4, 4)
    weights = np.array([2.0, 0, 1, 1, 3])
    repeated = np.repeat(a, weights.astype(int), axis=0)
    which = np.repeat(np.arange(5), weights.astype(int))
    within = kernel(repeated, repeated)[which[:, None] != which[None, :]].mean()
    expected = within + kernel(b, b)[~np.eye(4, dtype=bool)].mean() - 2 * kernel(repeated, b).mean()
    got = weighted_kernel_distance(kernel(a, a), kernel(b, b), kernel(a, b), weights, np.ones(4))
    assert got == pytest.approx(expected, rel=1e-9)


def test_an_image_is_not_compared_with_what_was_made_from_it() -> None:
    a, b = rows(0, 6, 4), rows(1, 6, 4)
    apart = ~np.eye(6, dtype=bool)
    expected = kernel(a, a)[apart].mean() + kernel(b, b)[apart].mean() - 2 * kernel(a, b)[apart].mean()
    assert kernel_distance(a, b, paired=True) == pytest.approx(expected, rel=1e-9)
    assert kernel_distance(a, a, paired=True) == pytest.approx(0, abs=1e-12)


def test_paired_kernel_distance_is_unbiased() -> None:
    """Of copies with a little noise, whose distribution is all but the same; plain KID is far below 0."""
    draws = [np.random.default_rng(i).normal(size=(2, 8, 3)) for i in range(2000)]
    paired, plain = (
        [kernel_distance(a, a + 0.01 * noise, paired=paired) for a, noise in draws]
        for paired in (True, False)
    )
    assert np.mean(paired) == pytest.approx(0, abs=4 * np.std(paired) / len(paired) ** 0.5 + 1e-3)
    assert np.mean(plain) < -0.5


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_are_those_of_loops_over_all_pairs(k: int) -> None:
    real, generated = rows(0, 30, 3), rows(1, 25, 3, shift=0.7)

    def within(image: np.ndarray, manifold: np.ndarray) -> bool:
        for i, centre in enumerate(manifold):
            others = sorted(np.linalg.norm(centre - m) for j, m in enumerate(manifold) if j != i)
            if np.linalg.norm(centre - image) <= others[k - 1]:
                return True
        return False

    got = precision_recall(real, generated, k)
    assert got.precise_M.tolist() == [within(image, real) for image in generated]
    assert got.recalled_N.tolist() == [within(image, generated) for image in real]
    assert 0 < got.precise_M.mean() < 1 and 0 < got.recalled_N.mean() < 1


def test_precision_and_recall_at_the_ends() -> None:
    real = rows(0, 20, 3)
    narrow, far = real[:1] + 1e-3 * rows(1, 20, 3), real + 1000
    assert precision_recall(real, real).precise_M.all() and precision_recall(real, real).recalled_N.all()
    assert precision_recall(real, narrow).precise_M.all()
    assert precision_recall(real, narrow).recalled_N.sum() <= 1
    assert not precision_recall(real, far).precise_M.any()
    with pytest.raises(ValueError, match="k = 3 neighbours of 3 and 20"):
        precision_recall(real[:3], real)


def test_squared_distances() -> None:
    a, b = rows(0, 4, 5), rows(1, 6, 5)
    expected = [[((x - y) ** 2).sum() for y in b] for x in a]
    np.testing.assert_allclose(squared_distances(a, b), expected, rtol=1e-9)
    assert squared_distances(a * 1e8, a * 1e8).min() >= 0
