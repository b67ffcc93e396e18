"""Reconstruction quality per image: PSNR, SSIM, MS-SSIM.

Both images are rounded to 8 bits first, since that is what is stored and seen.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ldm.structural_similarity import ssim, ssim_and_ms_ssim

__all__ = ["MS_SSIM_MIN_PX", "Quality", "nearest_label_share", "psnr", "reconstruction_quality"]

# At the fifth scale, 16 times smaller, the 11-pixel window must still fit: torchmetrics' own limit.
MS_SSIM_MIN_PX = 16 * 11


@dataclass(frozen=True)
class Quality:
    """Quality of one reconstruction: PSNR in dB, SSIM and MS-SSIM in [0, 1] (None where too small)."""

    psnr_db: float
    ssim: float
    ms_ssim: float | None


def psnr(a_B3HW: Tensor, b_B3HW: Tensor) -> Tensor:
    """10 · log10(1 / MSE) per image, in dB, (B,) float64; images in [0, 1], equal ones give inf."""
    mse = (a_B3HW.double() - b_B3HW.double()).square().flatten(1).mean(1)
    return -10 * torch.log10(mse)


def reconstruction_quality(original_B3HW: Tensor, reconstruction_B3HW: Tensor) -> list[Quality]:
    """Quality of each image of a batch; both float in [-1, 1].

    SSIM after Wang et al. 2004 (Gaussian window, σ 1.5), MS-SSIM after Wang et al. 2003, as in
    torchmetrics, with data range 1.
    """
    a, b = _eight_bits(original_B3HW), _eight_bits(reconstruction_B3HW)
    psnr_B = psnr(a, b)
    large = min(a.shape[-2:]) >= MS_SSIM_MIN_PX
    ssim_B, ms_B = ssim_and_ms_ssim(a, b) if large else (ssim(a, b), None)
    return [
        Quality(float(psnr_B[i]), float(ssim_B[i]), None if ms_B is None else float(ms_B[i]))
        for i in range(len(a))
    ]


def nearest_label_share(
    samples_B3HW: Tensor, asked_B: Tensor, crops_N3HW: Tensor, labels_N: Tensor, *, side_px: int = 16
) -> float:
    """Share of samples whose nearest crop (Euclidean, both reduced to ``side_px``²) has the asked label.

    Images float in [-1, 1] of one size; labels int64. Chance is the asked label's share of the crops.
    """
    samples, crops = (
        interpolate(x, (side_px, side_px), mode="bilinear", antialias=True).flatten(1)
        for x in (samples_B3HW, crops_N3HW)
    )
    nearest_B = torch.cdist(samples, crops).argmin(1)
    return float((labels_N[nearest_B] == asked_B).double().mean())


def _eight_bits(image_B3HW: Tensor) -> Tensor:
    """[-1, 1] → [0, 1] in steps of 1/255, float64: SSIM's variances are differences of near values."""
    return image_B3HW.float().clamp(-1, 1).add(1).mul(127.5).round().double().div(255)
