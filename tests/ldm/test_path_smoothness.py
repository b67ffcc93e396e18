"""Figures of paths and edits, against closed forms and against the distances called one by one."""

import math

import numpy as np
import pytest
import torch

from ldm.edit_measures import kept
from ldm.features import load_extractor
from ldm.path_smoothness import frame_features, gradient_energy, smoothness, to_nearest_end
from ldm.perceptual import Perceptual, load_perceptual

FRAMES = torch.rand(5, 3, 24, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def perceptual() -> Perceptual:
    return load_perceptual("random")


def distance(perceptual: Perceptual, a: int, b: int) -> float:
    return math.sqrt(float(perceptual(FRAMES[a : a + 1], FRAMES[b : b + 1])))


def test_figures_of_a_path_are_those_of_its_steps(perceptual: Perceptual) -> None:
    found = smoothness(perceptual, frame_features(perceptual, FRAMES))
    steps = np.array([distance(perceptual, i, i + 1) for i in range(4)])
    assert found.step_mean == pytest.approx(steps.mean(), rel=1e-5)
    assert found.step_cv == pytest.approx(steps.std() / steps.mean(), rel=1e-4)
    assert found.max_over_mean == pytest.approx(steps.max() / steps.mean(), rel=1e-5)
    assert found.length == pytest.approx(steps.sum(), rel=1e-5)
    assert found.detour == pytest.approx(steps.sum() / distance(perceptual, 0, 4), rel=1e-5)


def test_a_path_that_waits_and_jumps_has_the_figures_of_a_jump(perceptual: Perceptual) -> None:
    a, b = FRAMES[:2]
    found = smoothness(perceptual, frame_features(perceptual, torch.stack([a, a, a, b])))
    # Steps 0, 0, d: standard deviation ÷ mean is the root of 2.
    assert found.step_cv == pytest.approx(math.sqrt(2))
    assert found.max_over_mean == pytest.approx(3)
    assert found.detour == pytest.approx(1)


def test_there_and_back_has_no_end_to_measure_by(perceptual: Perceptual) -> None:
    found = smoothness(perceptual, frame_features(perceptual, FRAMES[[0, 1, 0]]))
    assert found.step_cv == pytest.approx(0, abs=1e-6)
    assert found.detour == math.inf


def test_the_nearest_end_is_the_nearer_of_the_two(perceptual: Perceptual) -> None:
    features = frame_features(perceptual, FRAMES)
    expected = np.mean([min(distance(perceptual, i, 0), distance(perceptual, i, 4)) for i in (1, 2, 3)])
    assert to_nearest_end(perceptual, features, [features[0], features[4]]) == pytest.approx(
        expected, rel=1e-5
    )


def test_gradient_energy_of_stripes_and_of_a_flat_image() -> None:
    flat, stripes = torch.zeros(3, 8, 8), torch.zeros(3, 8, 8)
    stripes[:, ::2] = 1
    slope = torch.arange(8.0).expand(3, 8, 8) / 2
    assert gradient_energy(torch.stack([flat, stripes, slope])).tolist() == [0, 1, 0.25]


def test_what_is_kept_of_the_original(perceptual: Perceptual) -> None:
    original, extractor = FRAMES[0], load_extractor("random")
    mask = torch.zeros(24, 32, dtype=torch.bool)
    mask[:6] = True
    edited = original.clone()
    edited[:, mask] = -original[:, mask]
    half = original + 0.2  # 0.1 in [0, 1], except where it is clamped
    half[original > 0.8] = original[original > 0.8]
    same, inside, everywhere = kept(
        torch.stack([original, edited, half]), original, perceptual, extractor, mask
    )
    assert (same.psnr_db, same.psnr_outside_db, same.distance) == (math.inf, math.inf, 0)
    assert same.cosine == pytest.approx(1)
    mse = float(original[:, mask].square().sum() / original.numel())
    assert inside.psnr_db == pytest.approx(-10 * math.log10(mse), rel=1e-5)
    assert inside.psnr_outside_db == math.inf
    share = float((original[:, ~mask] <= 0.8).float().mean())
    assert everywhere.psnr_outside_db == pytest.approx(-10 * math.log10(0.01 * share), rel=1e-4)
    expected = float(perceptual(original[None], edited[None]))
    assert inside.distance == pytest.approx(expected, rel=1e-5)
    a, b = (extractor(x[None])[0].double() for x in (original, edited))
    assert inside.cosine == pytest.approx(float(a @ b / a.norm() / b.norm()), abs=1e-5)


def test_what_was_not_asked_for_is_not_computed() -> None:
    (found,) = kept(FRAMES[1:2], FRAMES[0])
    assert (found.psnr_outside_db, found.distance, found.cosine) == (None, None, None)
