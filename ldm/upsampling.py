"""What the U-Net of an upsampler is given: the noisy latent, and beside it a small one of the same image.

What is diffused is the residual: the large latent less the small one enlarged, whitened by its own statistics
(Li et al. 2021, "SRDiff"). It has a third to a half of the small latent's deviation in three of four channels
(f8, 64 → 256 px), so the errors of a U-Net that makes all of the latent are large beside it.

The small latent gets noise too (conditioning augmentation: Ho et al. 2021, "Cascaded Diffusion Models",
section 4.2). In training that hides the details which a sampled small latent has wrong, so the U-Net learns
to make them itself; the level of the noise, which it is told, is then free to choose when sampling. The
residual is added to the small latent without noise.

Shape suffixes: B images, C latent channels, H and W rows and columns, h and w those of the small latent.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.objective import NoiseSchedule

__all__ = ["MAX_NOISE_LEVEL", "NUM_NOISE_LEVELS", "enlarged", "noise_levels", "upsampler_input"]

# The forward process that augments, whatever the U-Net itself was trained with, a flow included: so a level
# means the same in every checkpoint. diffusers' pipeline calls it the low_res_scheduler.
AUGMENTATION = NoiseSchedule(prediction="epsilon")
NUM_NOISE_LEVELS = AUGMENTATION.num_train_timesteps
# The default of diffusers' StableDiffusionUpscalePipeline.
MAX_NOISE_LEVEL = 350


def enlarged(low_BChw: Tensor, size_HW: Sequence[int]) -> Tensor:
    """Bicubic, (B, C, H, W): what the residual is added to. Linear in ``low_BChw``, and in any scale."""
    return F.interpolate(low_BChw, size=tuple(size_HW), mode="bicubic")


def noise_levels(u_B: Tensor, max_noise_level: int) -> Tensor:
    """Levels int64 (B,), uniform over 0 … ``max_noise_level``, from ``u_B``, uniform in [0, 1)."""
    return (u_B * (max_noise_level + 1)).long().clamp(max=max_noise_level)


def upsampler_input(x_t_BCHW: Tensor, low_BChw: Tensor, noise_BChw: Tensor, level_B: Tensor) -> Tensor:
    """``[x_t, up(alpha low + sigma noise)]``, (B, 2C, H, W), with alpha and sigma those of ``level_B``.

    x_t_BCHW: the noisy latent as the U-Net sees it; low_BChw: clean, whitened in the same way; noise_BChw:
    standard normal; level_B: int64, timesteps of a DDPM, which are the U-Net's class labels. up repeats every
    value. ValueError where H and W are not the same whole multiple of h and w.
    """
    (height, width), (low_height, low_width) = x_t_BCHW.shape[2:], low_BChw.shape[2:]
    factor = height // low_height
    if (height, width) != (factor * low_height, factor * low_width):
        raise ValueError(
            f"{height}×{width} is no whole multiple of the low-resolution {low_height}×{low_width}"
        )
    augmented_BChw = AUGMENTATION.add_noise(low_BChw, noise_BChw, level_B)
    return torch.cat([x_t_BCHW, F.interpolate(augmented_BChw, size=(height, width), mode="nearest")], dim=1)
