"""A cheap look at a latent: the linear map to RGB that fits a VAE's decoder best on a few patches.

The latent channels of an f=8 VAE hold little but blurred colour, so a linear map shows what is there, at one
pixel a latent; the full decoder costs some 10⁵ operations for each of those.

Shape suffixes: C latent channels, h and w latent rows and columns, N places.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ldm.autoencoder import Autoencoder
from ldm.image_tensors import from_model
from ldm.latents import Whitening, keyed_normal
from ldm.seeds import keyed_seed

__all__ = ["LatentPreview"]

PATCH = 16
NUM_PATCHES = 4


class LatentPreview:
    """Latents → small RGB images, by a linear map fitted to one VAE."""

    def __init__(self, map_D3: Tensor) -> None:
        """map_D3: (C + 1, 3), a row for each channel and one for the constant."""
        self.map_D3 = map_D3

    @classmethod
    def fit(cls, autoencoder: Autoencoder, latent_Chw: Tensor) -> "LatentPreview":
        """Decodes up to 4 patches of 16×16 latents along the diagonal of ``latent_Chw`` (the VAE's scale)."""
        pairs = [_pixels(autoencoder, patch_Chw) for patch_Chw in _patches(latent_Chw)]
        inputs_ND, rgb_N3 = (torch.cat(side).double() for side in zip(*pairs, strict=True))
        # gelsd finds a solution where a patch is of one colour, and leaves columns that depend on others.
        return cls(torch.linalg.lstsq(inputs_ND, rgb_N3, driver="gelsd").solution.float())

    @classmethod
    def fit_to_any(cls, autoencoder: Autoencoder, whitening: Whitening) -> "LatentPreview":
        """As `fit`, where there is no latent yet: to one that is smooth in parts, as clean ones are.

        whitening: says what values latents have.
        """
        shape = (autoencoder.channels, NUM_PATCHES * PATCH, NUM_PATCHES * PATCH)
        noise_1Chw = keyed_normal([keyed_seed("preview")], shape)
        smooth_1Chw = F.interpolate(F.avg_pool2d(noise_1Chw, 4) * 4, shape[1:], mode="bilinear")
        return cls.fit(autoencoder, whitening.denormalise(smooth_1Chw + 0.1 * noise_1Chw)[0])

    def __call__(self, latent_Chw: Tensor) -> NDArray[np.uint8]:
        """uint8 (h, w, 3), one pixel a latent; latent_Chw in the VAE's own scale."""
        rgb_hw3 = _with_one(latent_Chw) @ self.map_D3
        image: NDArray[np.uint8] = from_model(rgb_hw3.permute(2, 0, 1)[None])[0]
        return image


def _patches(latent_Chw: Tensor) -> list[Tensor]:
    height, width = latent_Chw.shape[1:]
    shares = np.linspace(0, 1, NUM_PATCHES)
    tops = (int(share * max(0, height - PATCH)) for share in shares)
    lefts = (int(share * max(0, width - PATCH)) for share in shares)
    corners = sorted(set(zip(tops, lefts, strict=True)))
    return [latent_Chw[:, top : top + PATCH, left : left + PATCH] for top, left in corners]


def _pixels(autoencoder: Autoencoder, patch_Chw: Tensor) -> tuple[Tensor, Tensor]:
    """(N, C + 1) latents with a one, and (N, 3) the mean colour of the pixels that each became."""
    image_13HW = autoencoder.decode(patch_Chw[None]).cpu()
    rgb_hw3 = F.avg_pool2d(image_13HW, autoencoder.f)[0].permute(1, 2, 0)
    return _with_one(patch_Chw).flatten(0, 1), rgb_hw3.flatten(0, 1)


def _with_one(latent_Chw: Tensor) -> Tensor:
    """(h, w, C + 1) float32."""
    return torch.cat([latent_Chw.float().cpu(), torch.ones(1, *latent_Chw.shape[1:])]).permute(1, 2, 0)
