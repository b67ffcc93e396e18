"""SSIM and MS-SSIM as torchmetrics defines them, with a separable window.

Theirs is one convolution of 11×11 taps, for which torch has no fast kernel in double precision: a
second and more for an image of 256 pixels.
"""

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, pad

__all__ = ["ssim", "ssim_and_ms_ssim"]

SIGMA, RADIUS = 1.5, 5
# (K · data range)² of Wang et al. 2004, section III.B, with data range 1.
C1, C2 = 0.01**2, 0.03**2
# Wang et al. 2003, section 3.2: a power for each scale, the finest first.
POWERS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)


def ssim(a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
    """Structural similarity per image, (B,): Wang et al. 2004, Gaussian window of 11 pixels with σ 1.5.

    Images in [0, 1], mirrored at the border, more than 5 pixels high and wide; double precision, as variances
    are differences of near values.
    """
    return _similarity_and_contrast(a_BCHW, b_BCHW)[0]


def ssim_and_ms_ssim(a_BCHW: Tensor, b_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """That, and the same over five scales, (B,) each: Wang et al. 2003. At least 176 pixels high and wide."""
    scales = [_similarity_and_contrast(a_BCHW, b_BCHW)]
    for _ in POWERS[1:]:
        a_BCHW, b_BCHW = avg_pool2d(a_BCHW, 2), avg_pool2d(b_BCHW, 2)
        scales.append(_similarity_and_contrast(a_BCHW, b_BCHW))
    factors = [contrast_B for _, contrast_B in scales[:-1]] + [scales[-1][0]]
    powered = [factor_B.relu() ** power for factor_B, power in zip(factors, POWERS, strict=True)]
    return scales[0][0], torch.stack(powered).prod(0)


def _similarity_and_contrast(a_BCHW: Tensor, b_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Means over every pixel, and of contrast over those whose window lies in the image."""
    products = torch.cat([a_BCHW, b_BCHW, a_BCHW * a_BCHW, b_BCHW * b_BCHW, a_BCHW * b_BCHW])
    mean_a, mean_b, mean_aa, mean_bb, mean_ab = _window_mean(products).chunk(5)
    variances = (mean_aa - mean_a**2).clamp(min=0) + (mean_bb - mean_b**2).clamp(min=0)
    contrast = (2 * (mean_ab - mean_a * mean_b) + C2) / (variances + C2)
    luminance = (2 * mean_a * mean_b + C1) / (mean_a**2 + mean_b**2 + C1)
    inside = contrast[..., RADIUS:-RADIUS, RADIUS:-RADIUS]
    return (luminance * contrast).flatten(1).mean(1), inside.flatten(1).mean(1)


def _window_mean(image_NCHW: Tensor) -> Tensor:
    """The Gaussian mean around every pixel: along rows, then along columns."""
    taps = torch.exp(-(torch.arange(-RADIUS, RADIUS + 1, dtype=torch.float64) ** 2) / (2 * SIGMA**2))
    weights = (taps / taps.sum()).tolist()
    mean = pad(image_NCHW, (RADIUS,) * 4, mode="reflect")
    for dim in (-1, -2):
        length = mean.shape[dim] - 2 * RADIUS
        total = torch.zeros_like(mean.narrow(dim, 0, length))
        for start, weight in enumerate(weights):
            total.add_(mean.narrow(dim, start, length), alpha=weight)
        mean = total
    return mean
