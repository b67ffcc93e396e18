"""Attribute directions: what to add to a latent so that it shows more of something.

Two kinds, both from latents that have the attribute and latents that have not: the difference of the
means, and the normal of the plane that a logistic regression parts them by. Both are scaled alike:
adding the direction once goes as far, along itself, as from one mean to the other.

Latents are in the VAE's own scale. Shape suffixes: N latents, D = C·h·w values of one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ldm.errors import UserError
from ldm.latents import Whitening

__all__ = ["Direction", "DirectionMethod", "fit", "logistic_regression"]

DirectionMethod = Literal["mean", "logistic"]


@dataclass(frozen=True, eq=False)
class Direction:
    """A direction in latent space, and how far along it a latent lies.

    step_Chw: float32, what strength 1 adds; origin: the place, in steps, of the mean of the latents
    without the attribute; weight_Chw, bias: of a logistic regression, None for the difference of
    means; about: what it is of, for people, and the fingerprint of the VAE.
    """

    step_Chw: Tensor
    origin: float
    about: Mapping[str, str]
    weight_Chw: Tensor | None = None
    bias: float = 0.0

    def check(self, shape: tuple[int, ...], vae_fingerprint: str) -> None:
        """UserError for a latent of another shape or of another VAE."""
        if self.about["vae_fingerprint"] != vae_fingerprint:
            raise UserError(
                f"the direction of {self.about['attribute']!r} is of another VAE "
                f"({self.about['vae_fingerprint'][:12]}, {self.about['vae']}) than the latent "
                f"({vae_fingerprint[:12]})",
                do="make a direction with the latents of this VAE",
            )
        if tuple(self.step_Chw.shape) != shape:
            raise UserError(
                f"the direction of {self.about['attribute']!r} has the shape {tuple(self.step_Chw.shape)}, "
                f"the latent {shape}",
                do="bring the image to that size, with --size-px for instance",
            )

    def moved(self, z_Chw: Tensor, strength: float) -> Tensor:
        """``z + strength · step``; ``z`` itself at strength 0."""
        return z_Chw + strength * self.step_Chw if strength else z_Chw

    def position(self, z_NChw: Tensor) -> Tensor:
        """Where latents lie along the direction (N,) float64: 0 at the mean without, 1 at the mean with."""
        step_D = self.step_Chw.double().flatten()
        return z_NChw.double().flatten(1) @ step_D / step_D.square().sum() - self.origin

    def probability(self, z_NChw: Tensor) -> Tensor | None:
        """Of having the attribute, by the logistic regression (N,) float64; None without one."""
        if self.weight_Chw is None:
            return None
        return torch.sigmoid(z_NChw.double().flatten(1) @ self.weight_Chw.double().flatten() + self.bias)


def fit(
    with_NChw: Tensor,
    without_NChw: Tensor,
    method: DirectionMethod,
    whitening: Whitening,
    l2: float,
    about: Mapping[str, str],
) -> Direction:
    """The direction from the latents without an attribute to those with it.

    whitening: in which space the regression is regularised (``l2``); it has no part in ``mean``.
    ValueError where one of the two is empty, UserError where their means do not differ.
    """
    if not len(with_NChw) or not len(without_NChw):
        raise ValueError("a direction needs latents with and without the attribute")
    mean_with, mean_without = with_NChw.double().mean(0), without_NChw.double().mean(0)
    difference = mean_with - mean_without
    if not difference.any():
        raise UserError(f"latents with and without {about['attribute']!r} have the same mean")
    if method == "mean":
        return _along(difference, mean_without, difference, about)
    shift, scale = (
        torch.tensor(values, dtype=torch.float64).view(-1, 1, 1)
        for values in (whitening.shift_C, whitening.scale_C)
    )
    x_NChw = (torch.cat([with_NChw, without_NChw]).double() - shift) / scale
    has_N = torch.arange(len(x_NChw)) < len(with_NChw)
    white_D, bias = logistic_regression(x_NChw.flatten(1), has_N, l2)
    # w · (z - shift) / scale + b, in terms of z; and the normal of the plane as seen in whitened space.
    weight = white_D.view(difference.shape) / scale
    bias = bias - float((weight * shift).sum())
    return _along(weight * scale**2, mean_without, difference, about, weight, bias)


def logistic_regression(x_ND: Tensor, has_N: Tensor, l2: float) -> tuple[Tensor, float]:
    """Weights (D,) and bias, float64, least in ``sum_n log(1 + exp(-y_n (w · x_n + b))) + l2 / 2 |w|²``.

    has_N: bool; y is 1 where it is True, else -1. The bias is not penalised. Newton's method with a
    limited memory (Liu & Nocedal 1989) finds the minimum, which is the only one for l2 > 0.
    """
    x_ND = x_ND.double()
    y_N = torch.where(has_N, 1.0, -1.0).double()
    parameters = torch.zeros(x_ND.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS(
        [parameters],
        max_iter=1000,
        history_size=20,
        tolerance_grad=1e-9,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        solver.zero_grad()
        weight_D, bias = parameters[:-1], parameters[-1]
        total = softplus(-y_N * (x_ND @ weight_D + bias)).sum() + l2 / 2 * weight_D.square().sum()
        total.backward()  # type: ignore[no-untyped-call]
        return total

    with torch.enable_grad():
        solver.step(loss)  # type: ignore[no-untyped-call]
    weights = parameters.detach()
    return weights[:-1], float(weights[-1])


def _along(
    normal: Tensor,
    mean_without: Tensor,
    difference: Tensor,
    about: Mapping[str, str],
    weight: Tensor | None = None,
    bias: float = 0.0,
) -> Direction:
    """The direction of ``normal``, as long as the projection of ``difference`` onto it."""
    step = normal * ((difference * normal).sum() / normal.square().sum())
    step_f32 = step.float()
    # By the step as it is stored: position counts in those.
    stored = step_f32.double()
    origin = float((mean_without * stored).sum() / stored.square().sum())
    return Direction(step_f32, origin, about, None if weight is None else weight.float(), bias)
