"""Paths and grids between latents: straight lines, and great circles with constant angle steps.

Latents are float tensors of one shape, taken as vectors. A great circle is about the origin, so it
means something where the origin is the mean: in noise, and in whitened latents.
"""

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from ldm.errors import UserError

__all__ = ["METHODS", "Method", "between", "grid", "lerp", "path", "slerp"]

Method = Literal["lerp", "slerp"]
Blend: TypeAlias = Callable[[Tensor, Tensor, float], Tensor]
METHODS: tuple[Method, ...] = get_args(Method)

# Below it two directions are one, or opposite, as far as fp32 latents can tell.
MIN_SINE = 1e-6


def lerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """``(1 - t) a + t b``; ``a`` and ``b`` themselves at t = 0 and 1."""
    if t in (0, 1):
        return b if t else a
    return ((1 - t) * a.double() + t * b.double()).to(a.dtype)


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """The direction turned by ``t`` times the angle between the two, the length in proportion.

    Shoemake 1985, section 3.3, ``(sin((1 - t) w) a + sin(t w) b) / sin w`` for unit vectors an angle w
    apart, times a length that goes linearly from one's to the other's: equal steps of t are equal
    angles, whatever the lengths. Of the many great circles between opposite vectors it takes the one
    through `_perpendicular`. Where one is zero there is no angle, and it is `lerp`.
    """
    length_a, length_b = float(a.double().norm()), float(b.double().norm())
    if t in (0, 1) or not (length_a and length_b):
        return lerp(a, b, t)
    unit_a, unit_b = a.double().flatten() / length_a, b.double().flatten() / length_b
    # Between nearly equal vectors the arc cosine of the product has half the digits.
    angle = 2 * torch.atan2((unit_a - unit_b).norm(), (unit_a + unit_b).norm())
    turned = torch.cos(t * angle) * unit_a + torch.sin(t * angle) * _across(unit_a, unit_b)
    point: Tensor = ((1 - t) * length_a + t * length_b) * turned
    return point.view(a.shape).to(a.dtype)


def between(a: Tensor, b: Tensor, t: float, method: Method) -> Tensor:
    """The latent at ``t`` of 0 … 1. UserError where the two have not one shape."""
    if a.shape != b.shape:
        raise UserError(
            f"latents of shape {tuple(a.shape)} and {tuple(b.shape)} have no path between them",
            do="bring the images to one size, with --size-px for instance",
        )
    blend: Blend = slerp if method == "slerp" else lerp
    return blend(a, b, t)


def path(a: Tensor, b: Tensor, num_frames: int, method: Method) -> Tensor:
    """``num_frames`` latents (T, …) at equal steps of t, the two ends among them."""
    if num_frames < 2:
        raise ValueError(f"a path has two ends, got {num_frames} frames")
    return torch.stack([between(a, b, i / (num_frames - 1), method) for i in range(num_frames)])


def grid(corners: Sequence[Tensor], side: int, method: Method) -> Tensor:
    """``side`` × ``side`` latents (side², …), row by row, with ``corners`` in the corners.

    corners: top left, top right, bottom left, bottom right. First down both sides, then along each
    row: for lerp that is the bilinear surface.
    """
    top_left, top_right, bottom_left, bottom_right = corners
    left, right = path(top_left, bottom_left, side, method), path(top_right, bottom_right, side, method)
    return torch.cat([path(a, b, side, method) for a, b in zip(left, right, strict=True)])


def _across(unit_a: Tensor, unit_b: Tensor) -> Tensor:
    """The unit vector perpendicular to ``unit_a`` towards ``unit_b``."""
    rejection = unit_b - (unit_a @ unit_b) * unit_a
    sine = rejection.norm()
    return rejection / sine if sine > MIN_SINE else _perpendicular(unit_a)


def _perpendicular(unit: Tensor) -> Tensor:
    """The part across ``unit`` of the axis that it has least of, at length 1."""
    axis = torch.zeros_like(unit)
    axis[unit.abs().argmin()] = 1
    across: Tensor = axis - (unit @ axis) * unit
    return across.div(across.norm())
