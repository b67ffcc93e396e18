"""How evenly a row of images changes: the perceptual steps between neighbours.

A step is the *root* of the perceptual distance (`ldm.perceptual`), which is a weighted squared
Euclidean distance of features: only its root adds up along a path.

Shape suffixes: T frames of a path, S = T - 1 steps between them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import torch
from torch import Tensor

from ldm.perceptual import Perceptual

__all__ = ["PathSmoothness", "frame_features", "gradient_energy", "smoothness", "to_nearest_end"]

Features: TypeAlias = list[Tensor]


@dataclass(frozen=True)
class PathSmoothness:
    """Figures of the steps of one path.

    step_mean; step_cv: standard deviation ÷ mean, 0 for a path of constant speed; max_over_mean: the
    largest step ÷ mean, 1 at best; length: the sum; detour: length ÷ the distance of the two ends, 1 for
    a path that is straight to the eye of the network.
    """

    step_mean: float
    step_cv: float
    max_over_mean: float
    length: float
    detour: float


@torch.no_grad()
def frame_features(perceptual: Perceptual, frames_T3HW: Tensor) -> list[Features]:
    """What the perceptual distance compares, of each frame, float in [-1, 1].

    UserError where the frames are too small for the network.
    """
    return [perceptual.features(frame[None]) for frame in frames_T3HW]


def smoothness(perceptual: Perceptual, frames_T: Sequence[Features]) -> PathSmoothness:
    """Figures of a path of two or more frames; NaN where nothing changes at all."""
    steps_S = torch.cat([_step(perceptual, a, b) for a, b in pairwise(frames_T)])
    mean, length = steps_S.mean(), steps_S.sum()
    return PathSmoothness(
        step_mean=float(mean),
        step_cv=float(steps_S.std(correction=0) / mean),
        max_over_mean=float(steps_S.max() / mean),
        length=float(length),
        detour=float(length / _step(perceptual, frames_T[0], frames_T[-1])[0]),
    )


def to_nearest_end(perceptual: Perceptual, frames_T: Sequence[Features], ends_2: Sequence[Features]) -> float:
    """Root distance of a frame to the nearer of two images, mean over the frames between the ends."""
    a, b = ends_2
    nearest = [
        torch.minimum(_step(perceptual, frame, a), _step(perceptual, frame, b)) for frame in frames_T[1:-1]
    ]
    return float(torch.cat(nearest).mean())


def _step(perceptual: Perceptual, a: Features, b: Features) -> Tensor:
    return perceptual.between(a, b).double().sqrt()


def gradient_energy(images_B3HW: Tensor) -> Tensor:
    """Mean squared difference of neighbouring pixels (B,), down and across: what blur takes away."""
    down = images_B3HW.diff(dim=2).square().flatten(1).mean(1)
    across = images_B3HW.diff(dim=3).square().flatten(1).mean(1)
    return down + across
