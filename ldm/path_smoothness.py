"""How evenly a row of images changes: the perceptual steps between neighbours.

A step is the *root* of the perceptual distance (`ldm.perceptual`), which is a weighted squared
Euclidean distance of features: only its root adds up along a path.

Shape suffixes: T frames of a path, S = T - 1 steps between them.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ldm.perceptual import Perceptual

__all__ = ["PathSmoothness", "gradient_energy", "smoothness", "to_nearest_end"]


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
def smoothness(perceptual: Perceptual, frames_T3HW: Tensor) -> PathSmoothness:
    """Figures of a path of two or more frames, float in [-1, 1]; NaN where nothing changes at all.

    UserError where the frames are too small for the network.
    """
    features_T = [perceptual.features(frame[None]) for frame in frames_T3HW]
    steps_S = torch.cat([perceptual.between(a, b) for a, b in pairwise(features_T)]).double().sqrt()
    between_ends = perceptual.between(features_T[0], features_T[-1]).double().sqrt()
    mean, length = steps_S.mean(), steps_S.sum()
    return PathSmoothness(
        step_mean=float(mean),
        step_cv=float(steps_S.std(correction=0) / mean),
        max_over_mean=float(steps_S.max() / mean),
        length=float(length),
        detour=float(length / between_ends[0]),
    )


@torch.no_grad()
def to_nearest_end(perceptual: Perceptual, frames_T3HW: Tensor, ends_23HW: Tensor) -> float:
    """Root distance of a frame to the nearer one of two images, mean over the frames between the ends."""
    ends = [perceptual.features(end[None]) for end in ends_23HW]
    inner = [perceptual.features(frame[None]) for frame in frames_T3HW[1:-1]]
    nearest = [torch.minimum(*(perceptual.between(frame, end) for end in ends)) for frame in inner]
    return float(torch.cat(nearest).sqrt().mean())


def gradient_energy(images_B3HW: Tensor) -> Tensor:
    """Mean squared difference of neighbouring pixels (B,), down and across: what blur takes away."""
    down = images_B3HW.diff(dim=2).square().flatten(1).mean(1)
    across = images_B3HW.diff(dim=3).square().flatten(1).mean(1)
    return down + across
